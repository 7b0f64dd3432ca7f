"""The keys that attention reads from a method's cache, for the error of the logits."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.format import TILE_TOKENS
from skvq_ext.hf import SkvqHFCache
from skvq_ext.layer_cache import LayerCache
from skvq_ext.pages import packed_tiles
from skvq_ext.plan import parts_of


@runtime_checkable
class ReadsKeys(Protocol):
    """A layer of a cache whose `update` does not return all keys, but that can tell them."""

    def read_keys(self) -> Tensor:
        """All keys as the newest token's query reads them, [num_kv_heads, tokens, head_dim]."""
        ...


def read_logits(
    cache: Any, layer: int, returned: Tensor, query: Tensor, scale: float, seen: int
) -> Tensor | None:
    """Logits of the newest token's query as a method's cache makes them.

    Args: cache, after its layer has attended; layer, index; returned, keys that its `update`
    returned [1, num_kv_heads, rows, head_dim]; query [num_q_heads, head_dim], not mapped; scale,
    factor of q . k; seen, newest tokens that the query sees, itself included.
    Returns: f32 [num_q_heads, seen], before softcap; None where the keys cannot be read.
    """
    if isinstance(cache, SkvqHFCache):
        return _packed_logits(cache, layer, returned.shape[1], query, scale, seen)
    rows = cache.layers[layer]
    keys = rows.read_keys() if isinstance(rows, ReadsKeys) else returned[0]
    if keys.shape[1] < seen:
        return None
    return scaled_dots(query, keys[:, -seen:], scale)


def scaled_dots(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale * q . k of query [num_q_heads, head_dim] and keys [num_kv_heads, n, head_dim].

    Returns: f32 [num_q_heads, n].
    """
    grouped = query.float().view(keys.shape[0], -1, keys.shape[2])
    return (grouped @ keys.float().mT).flatten(0, 1) * scale


def _packed_logits(
    cache: SkvqHFCache, layer: int, num_kv_heads: int, query: Tensor, scale: float, seen: int
) -> Tensor:
    """Part by part of the heads, where they are stored in several formats."""
    parts = parts_of(cache.plan.layers[layer], cache.scheme, num_kv_heads)
    grouped = query.view(num_kv_heads, -1, query.shape[1])
    logits = query.new_empty(*grouped.shape[:2], seen, dtype=torch.float32)
    rows: Any = cache.layers[layer]
    for part, stored in zip(parts, rows.cache.parts, strict=True):
        heads = list(part.heads)
        found = _part_logits(stored, grouped[heads].flatten(0, 1), scale, seen)
        logits[heads] = found.unflatten(0, (len(heads), -1))
    return logits.flatten(0, 1)


def _part_logits(cache: LayerCache, query: Tensor, scale: float, seen: int) -> Tensor:
    """The shift of the keys, which their rows lack, is added as attention adds it."""
    keys = packed_keys(cache, seen)
    logits = scaled_dots(cache.door.map_q(query[None])[0], keys, scale)
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
