"""Bytes of keys and values against context, for every method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skvq_ext.cache import SkvqCache
from skvq_ext.evaluate.method import FullPrecision, Method, Packed
from skvq_ext.evaluate.result import MemoryResult, MethodMemory
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.format import TILE_TOKENS
from skvq_ext.geometry import Geometry

CONTEXTS = (1024, 4096, 32_768, 131_072, 1_000_000)
ROW_BITS = 16  # of a value that is not packed: what models are run in where memory matters


def measure_memory(
    geometry: Geometry, methods: Sequence[Method], contexts: Sequence[int] = CONTEXTS
) -> MemoryResult:
    """Bytes of one sequence by context; nothing is run. Raises: EvaluationError."""
    if not contexts or min(contexts) < 1:
        raise EvaluationError(f"contexts {list(contexts)}: give one or more, of 1 token or more.")
    protocol = (
        "Keys and values of one sequence, weights aside; rows that are not packed count as "
        f"{ROW_BITS} bits a value, whatever dtype was run here. 'Allocated': all that the cache's "
        "own allocator lays out, with window, sinks, page table and plan. 'Stated': the bits behind "
        "the window times all values; exact tokens would come on top."
    )
    found = tuple(_method(geometry, method, contexts) for method in methods)
    return MemoryResult(protocol, tuple(contexts), found)


def _method(geometry: Geometry, method: Method, contexts: Sequence[int]) -> MethodMemory:
    windows = geometry.sliding_windows or (0,) * geometry.num_layers
    if isinstance(method, Packed):
        total = tuple(_allocated(_layout(method, context, windows)) for context in contexts)
        return MethodMemory(method.name, True, total, _page_bytes(_layout(method, 1, windows)))
    exact = isinstance(method, FullPrecision)
    value = (ROW_BITS if exact else method.bits) / 8
    row = 2 * geometry.num_kv_heads * geometry.head_dim * value
    total = tuple(
        round(row * sum(min(context, window or context) for window in windows))
        for context in contexts
    )
    return MethodMemory(method.name, exact, total, row * windows.count(0))


def _layout(method: Packed, context: int, windows: Sequence[int]) -> SkvqCache:
    """The cache of one sequence of `context` tokens on torch's meta device: sizes and no memory."""
    g = method.geometry
    sizes = (g.num_layers, g.num_q_heads, g.num_kv_heads, g.head_dim)
    return SkvqCache(
        *sizes,
        scheme=method.scheme,
        plan=method.plan,
        dtype=torch.bfloat16,
        device="meta",
        max_len=context,
        sliding_window=windows,
    )


def _allocated(cache: SkvqCache) -> int:
    """Bytes of everything in it; tables that doors share count once."""
    parts = [part for layer in cache.layers for part in layer.parts]
    doors = {id(table): table.nbytes for part in parts for table in part.door.tensors()}
    return sum(x.nbytes for part in parts for x in part.tensors) + sum(doors.values())


def _page_bytes(cache: SkvqCache) -> float:
    """Bytes of one more token in all layers that keep every token."""
    parts = [part for layer in cache.layers for part in layer.parts if not part.sliding_window]
    records = sum(part.tensors.pages.shape[1:].numel() for part in parts)
    return records / TILE_TOKENS
