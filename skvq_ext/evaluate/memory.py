"""Bytes of keys and values against context, for every method."""

from __future__ import annotations

from collections.abc import Sequence

from skvq_ext.evaluate.method import FullPrecision, Method, Packed
from skvq_ext.evaluate.result import MemoryResult, MethodMemory
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.geometry import Geometry
from skvq_ext.ledger import Ledger

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
    if isinstance(method, Packed):
        ledger = Ledger(geometry, method.scheme)
        total = tuple(ledger.at(context).total for context in contexts)
        return MethodMemory(method.name, True, total, ledger.bytes_per_token)
    exact = isinstance(method, FullPrecision)
    value = (ROW_BITS if exact else method.bits) / 8
    windows = geometry.sliding_windows or (0,) * geometry.num_layers
    row = 2 * geometry.num_kv_heads * geometry.head_dim * value
    total = tuple(
        round(row * sum(min(context, window or context) for window in windows))
        for context in contexts
    )
    return MethodMemory(method.name, exact, total, row * windows.count(0))
