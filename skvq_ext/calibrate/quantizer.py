"""How rows of one head are quantized and read back, and the clip and exponents that suit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.door import Door
from skvq_ext.plan import LayerPlan, TensorPlan, TensorShape

CLIPS = tuple(1 - step / 25 for step in range(18))  # 1.00, 0.96 .. 0.32

_HEADROOM = 8.0  # unseen tokens may have scales and zeros this many times the largest seen
_LARGEST = 448.0  # of E4M3; fp16 reaches further
_ROWS = 1024  # that a clip ratio is first guessed from


@dataclass(frozen=True)
class HeadQuantizer:
    """Quantizes rows of one head as the packed cache would: door, groups, codes, scale and zero."""

    tensor: TensorPlan  # of one head
    shape: TensorShape
    meta: str

    def read_back(self, x: Tensor) -> Tensor:
        """What the cache gives back for rows x f32 [n, D] of the model."""
        door = Door(LayerPlan(self.tensor, self.tensor), 1)
        rows = door.map_v(x[:, None])[:, 0]
        back = torch.empty_like(rows)
        clip, exponents = self.tensor.clip[0], self.tensor.exponents[0].tolist()
        for code, columns, edges, chosen in _runs(self.shape):
            back[:, columns] = _there_and_back(
                rows[:, columns], edges, clip[chosen], code, self.meta, exponents
            )
        return door.unmap_o(back[:, None])[:, 0]

    def fitted(self, x: Tensor) -> HeadQuantizer:
        """With the exponents and, per group, the clip ratio of least squared error on rows x."""
        door = Door(LayerPlan(self.tensor, self.tensor), 1)
        rows = door.map_v(x[:, None])
        exponents = choose_exponents(rows, self.shape, self.tensor.exponents)
        some = rows[:: max(1, len(rows) // _ROWS), 0]
        clip = _choose_clip(some, self.shape, exponents[0].tolist(), self.meta)
        return self.with_tables(clip[None], exponents)

    def spread(self, factors: Sequence[float]) -> HeadQuantizer:
        """With clip ratios times each factor, at most 1, of which every token takes the best."""
        choices = (self.tensor.clip[..., None] * torch.tensor(factors)).clamp(max=1.0)
        return self.with_tables(choices, self.tensor.exponents)

    def scaled(self, factor: float) -> HeadQuantizer:
        """With all clip ratios times a factor, at most 1."""
        return self.with_tables((self.tensor.clip * factor).clamp(max=1.0), self.tensor.exponents)

    def with_tables(self, clip: Tensor, exponents: Tensor) -> HeadQuantizer:
        """With other clip ratios f32 [1, groups] or [1, groups, choices] and exponents i32 [1, 2]."""
        values = vars(self.tensor) | {"clip": clip, "exponents": exponents}
        return HeadQuantizer(TensorPlan(**values), self.shape, self.meta)


def _runs(shape: TensorShape) -> list[tuple[str, slice, Tensor, slice]]:
    """Neighbouring groups of one code: (code, channels, edges from 0 on, groups)."""
    found, first = [], 0
    for code, run in groupby(zip(shape.codes, shape.groups, strict=True), key=lambda pair: pair[0]):
        groups = [group for _, group in run]
        start, stop = groups[0][0], groups[-1][1]
        edges = torch.tensor([start, *(end for _, end in groups)], dtype=torch.int32) - start
        found.append((code, slice(start, stop), edges, slice(first, first + len(groups))))
        first += len(groups)
    return found


def _there_and_back(
    x: Tensor, edges: Tensor, clip: Tensor, code: str, meta: str, exponents: list[int]
) -> Tensor:
    """x f32 [n, channels] quantized in groups and read again."""
    options = {"scale_exponent": exponents[0], "zero_exponent": exponents[1]}
    codes, scales = ops.quantize_pack(
        x.contiguous(), edges, clip.contiguous(), code=code, meta=meta, **options
    )
    return ops.dequantize_unpack(codes, scales, edges, code=code, **options)


def choose_exponents(rows: Tensor, shape: TensorShape, default: Tensor) -> Tensor:
    """Powers of two that put the observed scales and zeros near the top of E4M3's normal range.

    Args: rows f32 [n, H, D] as the cache sees them; default i32 [H, 2] for heads without any range.
    Returns: i32 [H, 2], of scale and zero.
    """
    largest = torch.zeros(2, rows.shape[1])
    for (start, stop), levels in zip(shape.groups, shape.levels, strict=True):
        low, high = rows[..., start:stop].aminmax(dim=-1)
        largest[0] = largest[0].maximum(((high - low) / (levels - 1)).amax(0))
        largest[1] = largest[1].maximum(low.abs().maximum(high.abs()).amax(0))
    chosen = (largest * (_HEADROOM / _LARGEST)).log2().ceil()
    return torch.where(largest.T > 0, chosen.T, default).clamp(-100, 100).int()


def _choose_clip(rows: Tensor, shape: TensorShape, exponents: list[int], meta: str) -> Tensor:
    """The clip ratio of least squared error per group; 1 is a candidate and wins ties.

    Args: rows f32 [n, D] as the cache sees them. Returns: f32 [groups], values of CLIPS.
    """
    ratios, clip = torch.tensor(CLIPS), torch.empty(len(shape.groups))
    for index, ((start, stop), code) in enumerate(zip(shape.groups, shape.codes, strict=True)):
        x = rows[:, start:stop].repeat(1, len(CLIPS))
        edges = torch.arange(len(CLIPS) + 1, dtype=torch.int32) * (stop - start)
        back = _there_and_back(x, edges, ratios, code, meta, exponents)
        squares = (back - x).square().view(len(x), len(CLIPS), -1)
        clip[index] = ratios[squares.sum((0, 2), dtype=torch.float64).argmin()]
    return clip
