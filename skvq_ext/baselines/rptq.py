"""RPTQ: channels of similar range are put together, and each cluster has its own scale and zero.

Source: arXiv 2304.01089 (K-Means over the minimum and maximum of each channel), as SKVQ's tables
use it (its repository's "rptq": reorder and pre_rope, no clip, scales per token). Clusters reach
across the KV heads of a layer and are uneven. RPTQ's own scales are static, made once; here they are
made per token, which is more accurate and costs the bits that are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from skvq_ext.baselines.coding import (
    Coded,
    Pair,
    across_heads,
    check_divides,
    group_bits,
    per_head,
    uniform,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.evaluate.method import Method
from skvq_ext.plan import DEFAULT_EXPONENTS


@dataclass(frozen=True)
class RptqOptions(Options):
    """g: mean channels of a cluster; across or perhead: whether clusters span the KV heads."""

    g: int = 64
    meta: str = words("fp8", "fp16")
    rope: str = words("pre", "post")
    heads: str = words("across", "perhead")


@dataclass(frozen=True)
class Clustered:
    """Codes each token's clusters of channels; clusters: per layer, int64 indices into the channels
    of all KV heads, one after the other."""

    width: str
    meta: str
    exponents: tuple[int, int]
    clusters: tuple[tuple[Tensor, ...], ...]

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        tokens = across_heads(x)
        values, bits = torch.empty_like(tokens), 0.0
        for cluster in self.clusters[layer]:
            coded = uniform(tokens[:, cluster], self.width, self.meta, self.exponents)
            values[:, cluster], bits = coded.values, bits + coded.bits
        return Coded(per_head(values, len(x)), bits)


def cluster_channels(rows: Tensor, count: int, seed: int) -> list[Tensor]:
    """Clusters of channels by their range.

    Args: rows f32 [n, channels]; count of clusters. Returns: int64 channels of each cluster.
    """
    points = torch.stack(torch.aminmax(rows, dim=0), dim=-1).numpy()
    labels = KMeans(n_clusters=count, n_init=10, random_state=seed).fit(points).labels_
    return [torch.from_numpy(labels == label).nonzero()[:, 0] for label in set(labels.tolist())]


def build(options: RptqOptions, source: Source) -> Method:
    """Calibrates the clusters."""
    geometry = source.geometry
    heads = geometry.num_kv_heads if options.heads == "across" else 1
    span = heads * geometry.head_dim  # channels that are clustered together
    check_divides("g", options.g, span, "the channels of a token, or of a head,")
    clusters: dict[str, list[tuple[Tensor, ...]]] = {"k": [], "v": []}
    for layer, rows in enumerate(source.rows(options.sink)):
        for side, x in (("k", source.keys(rows, layer, options.rope)), ("v", rows.v)):
            found: list[Tensor] = []
            for number, some in enumerate(across_heads(x).split(span, dim=1)):
                parts = cluster_channels(some, span // options.g, source.seed)
                found += [part + number * span for part in parts]
            clusters[side].append(tuple(found))
    k, v = (
        Clustered(width, options.meta, DEFAULT_EXPONENTS[side], tuple(clusters[side]))
        for side, width in options.sides
    )
    pair = Pair(source.key_coder(k, options.rope), v)
    bits = [group_bits(width, options.g, options.meta) for _, width in options.sides]
    deviations = (
        f"clusters of channels {options.heads} heads, scales per token, keys {options.rope}-RoPE, "
        "no clip; the table of clusters, once per model, is not counted"
    )
    return Simulated.of("rptq", options, average(*bits), lambda: pair, deviations)
