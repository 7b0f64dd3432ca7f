"""Reorder files of the original SKVQ (`*-minmax-rod_idx-cluster_<C>.pt`), read and checked.

{"reorder_indices": [(k, v)] * layers, "cluster_st_inds": [(k, v)] * layers}, int64 tensors:
the channel at each place [channels], and the first place of each group [groups + 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skvq_ext.published.quantizer import Grouping
from skvq_ext.published.reorder import ReorderError, grouping

_INDICES, _EDGES = "reorder_indices", "cluster_st_inds"
_SIDES = ("K", "V")


def read_reorder_file(
    path: str | Path, num_layers: int, channels: int
) -> list[tuple[Grouping, Grouping]]:
    """Groupings of K and V of every layer, without clip.

    Such files are pickled; only tensors, numbers, lists and dicts are let through, no code.

    Args: path; num_layers and channels (KV heads times head_dim) of the model it is for.
    Raises: ReorderError where it is no such file, damaged, or for another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ReorderError(f"no reorder file at {path}; leave it out to run K-Means here.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or malicious pickle makes of itself
        raise ReorderError(
            f"{path} is not a reorder file of SKVQ, or holds more than tensors: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if not isinstance(content, Mapping) or not {_INDICES, _EDGES} <= content.keys():
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content)
        raise ReorderError(
            f"{path}: a reorder file holds {_INDICES!r} and {_EDGES!r}, this one {found}. Files of "
            "channel statistics are not what is asked for."
        )
    indices, edges = (_layers(path, content, name, num_layers) for name in (_INDICES, _EDGES))
    return [
        (
            _grouping(path, layer, 0, indices, edges, channels),
            _grouping(path, layer, 1, indices, edges, channels),
        )
        for layer in range(num_layers)
    ]


def _layers(path: Path, content: Mapping[str, Any], name: str, num_layers: int) -> list[Any]:
    layers = content[name]
    if not isinstance(layers, list | tuple) or len(layers) != num_layers:
        found = f"{len(layers)} layers" if isinstance(layers, list | tuple) else type(layers)
        raise ReorderError(f"{path}: {name!r} has {found}, the model has {num_layers} layers.")
    return list(layers)


def _grouping(
    path: Path, layer: int, side: int, indices: list[Any], edges: list[Any], channels: int
) -> Grouping:
    where = f"{path}, layer {layer}, {_SIDES[side]}"
    order, starts = (
        _vector(f"{where}: {name}", layers[layer], side)
        for name, layers in ((_INDICES, indices), (_EDGES, edges))
    )
    if len(order) != channels:
        raise ReorderError(
            f"{where}: {len(order)} channels, the model has {channels} (KV heads times head_dim). "
            "The file is for another model."
        )
    if not torch.equal(order.sort().values, torch.arange(channels)):
        raise ReorderError(f"{where}: {_INDICES!r} is not a permutation of 0 .. {channels - 1}.")
    if starts[0] != 0 or starts[-1] != channels or bool((starts.diff() <= 0).any()):
        raise ReorderError(
            f"{where}: {_EDGES!r} must rise from 0 to {channels}, found {starts.tolist()[:4]} .. "
            f"{int(starts[-1])}."
        )
    return grouping(order, starts)


def _vector(where: str, pair: Any, side: int) -> Tensor:
    if not isinstance(pair, list | tuple) or len(pair) != len(_SIDES):
        raise ReorderError(f"{where} is not a pair of tensors (K, V).")
    x = pair[side]
    if not isinstance(x, Tensor) or x.dim() != 1 or x.is_floating_point() or len(x) < 1:
        found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x)
        raise ReorderError(f"{where} is {found}, not a vector of whole numbers.")
    return x.long()
