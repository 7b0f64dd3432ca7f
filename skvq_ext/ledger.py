"""The memory ledger: bytes a packed cache allocates for a model, beside a full-precision one.

Every size comes from the cache itself, laid out for one sequence on torch's meta device: there is
no second rule that could disagree with the allocator.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from skvq_ext.door import Door
from skvq_ext.format import TILE_TOKENS
from skvq_ext.geometry import Geometry, GeometryError
from skvq_ext.layer_cache import LayerCache
from skvq_ext.plan import LayerPlan, Plan, TensorPlan
from skvq_ext.scheme import Scheme


def _gemma3(layers: int, q_heads: int, kv_heads: int, head_dim: int, window: int) -> Geometry:
    """Every sixth layer sees everything, the others see a window."""
    windows = tuple(window if (i + 1) % 6 else 0 for i in range(layers))
    return Geometry(layers, q_heads, kv_heads, head_dim, sliding_windows=windows)


GEOMETRIES = {
    "llama-2-7b": Geometry(32, 32, 32, 128),
    "llama-2-13b": Geometry(40, 40, 40, 128),
    "llama-3-8b": Geometry(32, 32, 8, 128),
    "llama-3-70b": Geometry(80, 64, 8, 128),
    "mistral-7b": Geometry(32, 32, 8, 128),
    "qwen2.5-7b": Geometry(28, 28, 4, 128),
    "qwen3-8b": Geometry(36, 32, 8, 128),
    "gemma-3-270m": _gemma3(18, 4, 1, 256, 512),
    "gemma-3-1b": _gemma3(26, 4, 1, 256, 512),
    "gemma-3-4b": _gemma3(34, 8, 4, 256, 1024),
    "gemma-3-12b": _gemma3(48, 16, 8, 256, 1024),
    "gemma-3-27b": _gemma3(62, 32, 16, 128, 1024),
    "falcon-7b": Geometry(32, 71, 1, 64),
    "smollm2-135m": Geometry(30, 9, 3, 64),
    "smollm2-1.7b": Geometry(24, 32, 32, 64),
}


def find_geometry(source: str) -> Geometry:
    """A geometry by name (see GEOMETRIES), from a config.json, or from a directory with one.

    Raises: GeometryError.
    """
    name = source.lower()
    for known in (name, f"{name}-135m"):
        if known in GEOMETRIES:
            return GEOMETRIES[known]
    path = Path(source).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise GeometryError(
            f"no geometry {source!r}: it is neither a config.json, nor a directory with one, nor "
            f"one of {', '.join(GEOMETRIES)}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GeometryError(f"{path} is not a model configuration in JSON: {error}.") from None
    if not isinstance(config, dict):
        raise GeometryError(f"{path} is not a model configuration: it holds no JSON object.")
    return Geometry.from_config(config)


@dataclass(frozen=True)
class LedgerRow:
    """Bytes for one sequence of `context` tokens, weights aside.

    full_precision: rows of the cache's dtype, as many as each layer looks back to. The other parts
    are the packed cache: pages (codes, scales, zeros), page_table, sinks, ring (window, the tile
    that fills, rollback), lengths, plan (door tables, clip, exponents); total is their sum.
    """

    context: int
    full_precision: int
    pages: int
    page_table: int
    sinks: int
    ring: int
    lengths: int
    plan: int
    total: int

    @property
    def ratio(self) -> float:
        """How many times smaller the packed cache is."""
        return self.full_precision / self.total


@dataclass(frozen=True)
class Ledger:
    """The bytes of one geometry and scheme. dtype: of full-precision rows.

    The plan is counted as a calibrated one, with everything calibration may use.
    """

    geometry: Geometry
    scheme: Scheme
    dtype: torch.dtype = torch.bfloat16

    @property
    def record_bytes(self) -> int:
        """Bytes of 64 tokens of one KV head, K and V with scales and zeros."""
        return self.scheme.record_format(self.geometry.head_dim).record_bytes

    @property
    def bits_per_value(self) -> float:
        """Average bits per stored value, scales and zeros included."""
        return self.scheme.record_format(self.geometry.head_dim).bits_per_value

    @property
    def bytes_per_token(self) -> float:
        """Packed bytes that one more token costs at long context, in all layers that keep it."""
        records = self._endless_layers * self.geometry.num_kv_heads * self.record_bytes
        return records / TILE_TOKENS

    @property
    def full_bytes_per_token(self) -> int:
        """The same for a full-precision cache."""
        return self._endless_layers * self._row_bytes

    def at(self, context: int) -> LedgerRow:
        """Bytes at `context` tokens (1 or more)."""
        if context < 1:
            raise ValueError(f"the context must be at least 1 token, got {context}.")
        parts: Counter[str] = Counter(plan=self._plan_bytes)
        full = 0
        for window, layers in self._windows.items():
            full += layers * self._row_bytes * (min(context, window) if window else context)
            for name, size in self._layer(context, window).items():
                parts[name] += layers * size
        return LedgerRow(context, full, total=parts.total(), **parts)

    def _layer(self, context: int, window: int) -> dict[str, int]:
        cache = LayerCache(
            self._layer_plan,
            self.scheme,
            num_q_heads=self.geometry.num_q_heads,
            dtype=self.dtype,
            device="meta",
            max_len=context,
            sliding_window=window,
            door=self._door,
        )
        t = cache.tensors
        return {
            "pages": t.pages.nbytes,
            "page_table": t.page_table.nbytes,
            "sinks": t.sink_k.nbytes + t.sink_v.nbytes,
            "ring": t.ring_k.nbytes + t.ring_v.nbytes,
            "lengths": t.kv_len.nbytes,
            "plan": t.k_clip.nbytes + t.v_clip.nbytes + t.exponents.nbytes,
        }

    @cached_property
    def _windows(self) -> Counter[int]:
        """Layers by sliding window, 0 = all."""
        geometry = self.geometry
        return Counter(geometry.sliding_windows or (0,) * geometry.num_layers)

    @property
    def _endless_layers(self) -> int:
        return self._windows[0]

    @property
    def _row_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.geometry.num_kv_heads * self.geometry.head_dim * self.dtype.itemsize

    @cached_property
    def _layer_plan(self) -> LayerPlan:
        """A plan that uses all a calibration may: shift, scale, rotation, permuted bands."""
        plain = replace(self.scheme, transform=frozenset({"hadamard"}))
        plan = Plan.default(replace(self.geometry, num_layers=1, sliding_windows=None), plain)
        (part,) = (part for _, part in plan.named_parts())
        for tensor in vars(part.plan).values():
            _use_all(tensor)
        return part.plan

    @cached_property
    def _door(self) -> Door:
        return Door(self._layer_plan, self.geometry.num_q_heads)

    @property
    def _plan_bytes(self) -> int:
        """Tables of all doors; the Hadamard matrices are shared by the layers."""
        shared = self._door.shared_nbytes()
        return shared + self.geometry.num_layers * (self._door.nbytes() - shared)


def _use_all(tensor: TensorPlan) -> None:
    tensor.shift = tensor.shift + 1
    tensor.scale = tensor.scale * 2
    if len(tensor.band_edges) > 2:
        tensor.permutation = tensor.permutation.flip(-1)
