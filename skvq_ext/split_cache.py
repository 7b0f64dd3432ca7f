"""One layer whose heads are stored in several formats: a packed cache for each part of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skvq_ext.door import Door
from skvq_ext.layer_cache import LayerCache, readable_format
from skvq_ext.plan import LayerPlan, SplitPlan
from skvq_ext.ragged import Ragged
from skvq_ext.scheme import Scheme


class SplitLayerCache:
    """The packed keys and values of one layer, its heads parted by format.

    It does what `LayerCache` does, one part after another; a decode step takes one call of each
    operator per part.
    """

    def __init__(
        self, plan: SplitPlan, scheme: Scheme, *, num_q_heads: int, **options: Any
    ) -> None:
        """Args: plan of this layer; scheme of the whole cache; the rest as of `LayerCache`."""
        self.scheme, self.exact = scheme, bool(options.get("exact", False))
        num_kv_heads = sum(len(part.heads) for part in plan.parts)
        group = num_q_heads // num_kv_heads
        self.parts = tuple(
            LayerCache(
                part.plan, part.scheme(scheme), num_q_heads=group * len(part.heads), **options
            )
            for part in plan.parts
        )
        device = options.get("device", "cpu")
        self._heads = [torch.tensor(part.heads, device=device) for part in plan.parts]
        self._q_heads = [
            (heads[:, None] * group + torch.arange(group, device=device)).flatten()
            for heads in self._heads
        ]

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.parts[0].batch_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence. With max_len this reads the device."""
        return self.parts[0].lengths

    def append(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | Ragged | None = None) -> None:
        """Adds tokens to every sequence; see `LayerCache.append`."""
        for part in self.parts:
            part.check_append(k, v, cu_seqlens, num_kv_heads=sum(map(len, self._heads)))
        for part, heads in zip(self.parts, self._heads, strict=True):
            part.append(k.index_select(1, heads), v.index_select(1, heads), cu_seqlens)

    def attend(
        self,
        q: Tensor,
        cu_seqlens_q: Tensor | Ragged | None = None,
        *,
        learned_sinks: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q over everything cached; see `LayerCache.attend`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for part, heads in zip(self.parts, self._q_heads, strict=True):
            sinks = None if learned_sinks is None else learned_sinks.index_select(0, heads)
            mine = q.index_select(1, heads)
            found = part.attend(mine, cu_seqlens_q, learned_sinks=sinks, **options)
            out.index_copy_(1, heads, found[0])
            lse.index_copy_(1, heads, found[1])
        return out, lse

    def check_crop(self, lengths: Sequence[int]) -> None:
        """Raises: ValueError where a sequence cannot be cut to lengths[b] tokens exactly."""
        self.parts[0].check_crop(lengths)

    def crop(self, lengths: Sequence[int]) -> None:
        """Cuts sequence b to its first lengths[b] tokens. Raises: ValueError, see `check_crop`."""
        for part in self.parts:
            part.crop(lengths)

    def reset(self) -> None:
        """Empties every sequence and, without max_len, gives the pages back."""
        for part in self.parts:
            part.reset()

    def take(self, rows: Sequence[int]) -> None:
        """Makes sequence i what sequence rows[i] was; the batch becomes len(rows) sequences."""
        for part in self.parts:
            part.take(rows)

    def to(
        self, device: torch.device | str, doors: Mapping[int, Door] | None = None
    ) -> SplitLayerCache:
        """Moves everything to a device, or nothing; see `LayerCache.to`. Returns: itself."""
        check_readable(self.parts, device)
        for part in self.parts:
            part.to(device, doors)
        self._heads = [heads.to(device) for heads in self._heads]
        self._q_heads = [heads.to(device) for heads in self._q_heads]
        return self


def check_readable(parts: Iterable[LayerCache], device: torch.device | str) -> None:
    """Raises: ValueError where a device has no kernel for the scheme and dtype of one of these."""
    for part in parts:
        readable_format(part.scheme, part.format.head_dim, part.tensors.ring_k.dtype, device)


def make_layer_cache(
    plan: LayerPlan | SplitPlan, scheme: Scheme, *, door: Door | None = None, **options: Any
) -> LayerCache | SplitLayerCache:
    """The cache of one layer, whatever its plan is. Args: as of `LayerCache`."""
    if isinstance(plan, SplitPlan):
        return SplitLayerCache(plan, scheme, **options)
    return LayerCache(plan, scheme, door=door, **options)
