"""Channel reorder as published: K-Means over the channels of all KV heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq_ext.published.quantizer import Grouping

_RESTARTS = 10  # n_init of the original
MOST_CHANNELS = 32767  # permutations are int16


class ReorderError(ValueError):
    """Channels that cannot be grouped as asked, or a reorder file that does not fit."""


def neighbours(channels: int, group: int) -> Grouping:
    """Groups of `group` adjacent channels: no reorder.

    Raises: ReorderError where they do not divide the channels.
    """
    if channels % group:
        raise ReorderError(
            f"g{group} does not divide the {channels} channels of all KV heads of a layer. Choose "
            "a divisor, or add 'reorder', whose groups may be uneven."
        )
    edges = torch.arange(0, channels + 1, group)
    return grouping(torch.arange(channels), edges)


def cluster(low: Tensor, high: Tensor, group: int, seed: int) -> Grouping:
    """Groups channels of like range: K-Means over the points (min, max).

    As calibration.py of the original, with a seed: channels // group clusters, however uneven; the
    channels in the order of their cluster. Where the ranges have fewer different values than that
    (dead channels), there are so many fewer groups.

    Args: low, high, f32 [channels], smallest and largest value over the calibration text; group,
    the mean size of a group; seed of K-Means.
    Raises: ReorderError.
    """
    from sklearn.cluster import KMeans

    channels = len(low)
    count = channels // group
    if count < 1:
        raise ReorderError(
            f"g{group} is more than the {channels} channels of all KV heads of a layer. Choose a "
            "smaller group."
        )
    points = torch.stack([low, high], dim=1).double().cpu()
    count = min(count, len(points.unique(dim=0)))
    fitted = KMeans(count, n_init=_RESTARTS, random_state=seed).fit(points.numpy())
    labels = torch.from_numpy(fitted.labels_).long()
    sizes = labels.bincount()
    return grouping(labels.argsort(stable=True), edges_of(sizes[sizes > 0]))


def edges_of(sizes: Tensor) -> Tensor:
    """[0, cumulative sizes], int64 [groups + 1]."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def grouping(permutation: Tensor, edges: Tensor) -> Grouping:
    """A grouping that does not clip, with int16 tables.

    Args: permutation int64 [channels]; edges int64 [groups + 1].
    Raises: ReorderError for more channels than int16 counts.
    """
    if len(permutation) > MOST_CHANNELS:
        raise ReorderError(
            f"{len(permutation)} channels of all KV heads of a layer: the published format counts "
            f"them in int16, up to {MOST_CHANNELS}."
        )
    return Grouping(permutation.short(), edges.short(), torch.ones(len(edges) - 1))
