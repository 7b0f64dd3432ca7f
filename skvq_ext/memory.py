"""What a packed cache has allocated, by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skvq_ext.layer_cache import LayerCache
    from skvq_ext.split_cache import SplitLayerCache

_PARTS = {
    "pages": "pages",
    "page_table": "page_table",
    "sink_k": "sinks",
    "sink_v": "sinks",
    "ring_k": "ring",
    "ring_v": "ring",
    "kv_len": "lengths",
    "k_clip": "plan",
    "v_clip": "plan",
    "exponents": "plan",
}


def memory(layers: Iterable[LayerCache | SplitLayerCache]) -> dict[str, int]:
    """Bytes by part, from the allocator: whole storages, each counted once.

    Returns: "pages", "page_table", "sinks", "ring", "lengths", "plan" (tables of the doors, clip,
    exponents), their "total", and "full_precision": what rows of the cache's dtype would take for
    the same lengths.
    """
    parts = dict.fromkeys(_PARTS.values(), 0)
    seen: set[int] = set()
    full_precision = 0
    for cache in (part for layer in layers for part in layer.parts):
        full_precision += cache.full_precision_bytes()
        tables = [("plan", table) for table in cache.door.tensors()]
        for name, tensor in cache.tensors._asdict().items():
            tables.append((_PARTS[name], tensor))
        for name, tensor in tables:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                parts[name] += storage.nbytes()
    return parts | {"total": sum(parts.values()), "full_precision": full_precision}
