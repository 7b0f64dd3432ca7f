"""The keys that attention reads from a method's cache, for the error of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.format import TILE_TOKENS
from skvq_ext.hf.cache import SkvqHFLayer
from skvq_ext.layer_cache import LayerCache
from skvq_ext.pages import packed_tiles


def read_logits(
    layer: Any, returned: Tensor, query: Tensor, scale: float, seen: int
) -> Tensor | None:
    """Logits of the newest token's query as the method's cache makes them.

    Args: layer of the cache, after it has attended; returned, keys that its `update` returned
    [1, num_kv_heads, rows, head_dim]; query [num_q_heads, head_dim], not mapped; scale, factor of
    q . k; seen, newest tokens that the query sees, itself included.
    Returns: f32 [num_q_heads, seen], before softcap; None where the keys cannot be read.
    """
    if isinstance(layer, SkvqHFLayer):
        assert layer.cache is not None
        return _packed_logits(layer.cache, query, scale, seen)
    if returned.shape[2] < seen:
        return None
    return _dots(query.float(), returned[0, :, -seen:].float(), scale)


def exact_logits(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """As `read_logits`, of exact keys [num_kv_heads, seen, head_dim]."""
    return _dots(query.float(), keys.float(), scale)


def _dots(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    grouped = query.view(keys.shape[0], -1, keys.shape[2])
    return (grouped @ keys.mT).flatten(0, 1) * scale


def _packed_logits(cache: LayerCache, query: Tensor, scale: float, seen: int) -> Tensor:
    """The shift of the keys, which their rows lack, is added as attention adds it."""
    keys = packed_keys(cache, seen)
    logits = _dots(cache.door.map_q(query[None])[0].float(), keys, scale)
    shift = cache.door.logit_shift(query[None], scale)
    return logits if shift is None else logits + shift[0, :, None]


def packed_keys(cache: LayerCache, newest: int) -> Tensor:
    """The newest keys of the first sequence in the cache's own space, read from its own bytes.

    Returns: f32 [num_kv_heads, newest, head_dim].
    """
    t, scheme, length = cache.tensors, cache.scheme, cache.lengths[0]
    sinks = min(scheme.sinks, length)
    tiles = packed_tiles(length, scheme.sinks, scheme.window)
    packed = sinks + tiles * TILE_TOKENS  # first position behind the pages
    first = length - newest
    skipped = min(tiles, max(0, first - sinks) // TILE_TOKENS)  # tiles no longer seen have no page
    pages = t.page_table[0, skipped:tiles]
    # The operator reads pages on the CPU, in any arrangement.
    k, _ = ops.unpack_pages(
        t.pages.cpu(),
        pages.cpu().int(),
        t.exponents.cpu(),
        cache.format.args,
        cache.format.head_dim,
    )
    history = k.to(t.ring_k.device).transpose(0, 1).flatten(1, 2)
    slots = torch.arange(packed, length, device=t.ring_k.device) % t.ring_k.shape[1]
    window = t.ring_k[0, slots].transpose(0, 1).float()
    begin = t.sink_k[0, :sinks].transpose(0, 1).float()
    rows = torch.cat([history, window], 1)
    missing = begin.new_zeros(rows.shape[0], skipped * TILE_TOKENS, rows.shape[2])
    return torch.cat([begin, missing, rows], 1)[:, first:]
