"""The packed cache of a whole model, for use with the ops in a model of your own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skvq_ext.door import Door
from skvq_ext.geometry import Geometry
from skvq_ext.layer_cache import LayerCache, readable_format
from skvq_ext.memory import memory
from skvq_ext.plan import LayerPlan, Plan
from skvq_ext.ragged import Ragged
from skvq_ext.scheme import Scheme
from skvq_ext.split_cache import check_readable, make_layer_cache

__all__ = ["DEFAULT_SCHEME", "LayerCache", "Ragged", "SkvqCache"]

DEFAULT_SCHEME = "k2-v1.5-g128-w128-sink5-fp8"


class SkvqCache:
    """The packed cache of a whole model, for use with a model of your own.

    In each layer: `append` the new keys and values, then `attend` with the new queries. Sequences
    may differ in length; give cu_seqlens where they get different numbers of tokens at once.
    """

    def __init__(
        self,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scheme: str | Scheme | None = None,
        plan: Plan | None = None,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_len: int | None = None,
        sliding_window: int | Sequence[int] = 0,
        exact: bool = False,
    ) -> None:
        """Args: scheme, None = that of the plan, or DEFAULT_SCHEME without one; plan from
        calibration, None = Hadamard and a fixed clip; dtype float32, float16 or
        bfloat16 (on CUDA one of the last two), of k, v, q, sinks and window; max_len, tokens per
        sequence to allocate for at once, None = grow as needed; sliding_window, tokens a query
        sees, 0 = all, or one per layer; exact, on the CPU read packed pages in float32, at
        about half the speed of integer products (see `ops.decode_attention`).
        Raises: ValueError where scheme, plan and sizes do not fit together, or the device has no
        kernel for scheme and dtype."""
        windows = (
            [sliding_window] * num_layers if isinstance(sliding_window, int) else sliding_window
        )
        geometry = Geometry(
            num_layers, num_q_heads, num_kv_heads, head_dim, sliding_windows=tuple(windows)
        )
        self.scheme, plan = resolve(scheme, plan, geometry)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is not supported; use float32, float16 or bfloat16.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        formats = {part.scheme(self.scheme) for _, part in plan.named_parts()}
        for each in sorted(formats, key=str):  # before anything is allocated there
            readable_format(each, head_dim, dtype, device)
        # a default plan repeats one layer
        distinct = {id(layer): layer for layer in plan.layers if isinstance(layer, LayerPlan)}
        doors = {key: Door(layer, num_q_heads, device) for key, layer in distinct.items()}
        self.layers = [
            make_layer_cache(
                layer,
                self.scheme,
                num_q_heads=num_q_heads,
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                max_len=max_len,
                sliding_window=window,
                exact=exact,
                door=doors.get(id(layer)),
            )
            for layer, window in zip(plan.layers, windows, strict=True)
        ]

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.layers[0].batch_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, as the first layer has them."""
        return self.layers[0].lengths

    def append(
        self, layer: int, k: Tensor, v: Tensor, cu_seqlens: Tensor | Ragged | None = None
    ) -> None:
        """Adds tokens to one layer; see `LayerCache.append`."""
        self.layers[layer].append(k, v, cu_seqlens)

    def attend(
        self,
        layer: int,
        q: Tensor,
        cu_seqlens_q: Tensor | Ragged | None = None,
        *,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        learned_sinks: Tensor | None = None,
        queries_in_cache: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention over one layer; see `LayerCache.attend`."""
        return self.layers[layer].attend(
            q,
            cu_seqlens_q,
            softmax_scale=softmax_scale,
            softcap=softcap,
            learned_sinks=learned_sinks,
            queries_in_cache=queries_in_cache,
        )

    def crop(self, n: int) -> None:
        """Keeps the first n tokens of every sequence, or without its newest -n if n is negative.

        Exact for the last `rollback` tokens (see the scheme), for 0, and while nothing is packed.
        Raises: ValueError for anything else, and then nothing has changed.
        """
        cut = [[min(m, n) if n >= 0 else max(0, m + n) for m in x.lengths] for x in self.layers]
        for layer, lengths in zip(self.layers, cut, strict=True):
            layer.check_crop(lengths)
        for layer, lengths in zip(self.layers, cut, strict=True):
            layer.crop(lengths)

    def to(self, device: torch.device | str) -> SkvqCache:
        """Moves the cache to a device; packed pages are repacked where another arrangement is read.

        Everything lies at new addresses afterwards: graphs captured before must be captured again.
        Returns: itself. Raises: ValueError where the device has no kernel for scheme and dtype.
        """
        parts = [part for layer in self.layers for part in layer.parts]
        check_readable(parts, device)
        old = {id(part.door): part.door for part in parts}  # layers may share one
        moved: dict[int, Tensor] = {}  # and doors their Hadamard matrices
        new = {key: door.to(device, moved) for key, door in old.items()}
        for layer in self.layers:
            layer.to(device, new)
        return self

    def reset(self) -> None:
        """Empties the cache."""
        for layer in self.layers:
            layer.reset()

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence indices[i] was, as beam search needs it."""
        rows = self._rows(indices)
        if len(rows) != self.batch_size:
            raise ValueError(
                f"reorder needs one index per sequence ({self.batch_size}), got {len(rows)}; use "
                "select to change the batch."
            )
        self.select(rows)

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these sequences, in this order; an index may appear more than once."""
        rows = self._rows(indices)
        for layer in self.layers:
            layer.take(rows)

    def repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side. Packed pages are shared."""
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        self.select([b for b in range(self.batch_size) for _ in range(repeats)])

    def memory(self) -> dict[str, int]:
        """Bytes allocated by part, their total, and a full-precision cache's for comparison."""
        return memory(self.layers)

    def _rows(self, indices: Tensor | Sequence[int]) -> list[int]:
        return check_rows(indices, self.batch_size)


def check_rows(indices: Tensor | Sequence[int], batch_size: int) -> list[int]:
    """Sequence numbers as a list. Raises: ValueError on an empty list or one out of range."""
    rows = [int(i) for i in (indices.tolist() if isinstance(indices, Tensor) else indices)]
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(
            f"sequences {rows} were asked for; this cache holds 0 .. {batch_size - 1}."
        )
    return rows


def resolve(
    scheme: str | Scheme | None,
    plan: Plan | None,
    geometry: Geometry,
    key_scales: Tensor | None = None,
) -> tuple[Scheme, Plan]:
    """The scheme, and the plan of all layers: the given one if it fits, else the default one.

    Without a scheme that of the plan is taken, or DEFAULT_SCHEME. Args: key_scales of the default
    plan, see `Plan.default`. Raises: SchemeError, PlanError.
    """
    if scheme is None:
        scheme = DEFAULT_SCHEME if plan is None else plan.scheme
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if plan is None:
        return scheme, Plan.default(geometry, scheme, key_scales)
    plan.check(geometry, scheme)
    return scheme, plan
