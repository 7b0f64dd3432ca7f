"""The published arithmetic: per token and group, asymmetric, clipped about zero.

    lo, hi = clip * min, clip * max;  zero = lo;  scale = max((hi - lo) / (levels - 1), 1e-5)
    code = round(clamp((x - zero) / scale, 0, levels - 1))
    what is read = code * FP8(scale) + FP8(zero)

as the code released with the paper computes it (SKVQ, section 3 of the paper gives no more than
"clipped dynamic quantization"). Codes are computed against the scale and zero before rounding to
FP8; `round_first` computes them against what will be read, which costs nothing and is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.published.packing import LEVELS, Packing

_LEAST_SCALE = 1e-5
_DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
_LARGEST = {"fp8": 448.0, "fp16": 65504.0}
_SMALLEST = {"fp8": 2.0**-9, "fp16": 2.0**-24}


@dataclass(frozen=True)
class Grouping:
    """Which channels of a layer's K or V form a group, and how far each group is clipped.

    permutation: int16 [channels], the channel at each place. edges: int16 [groups + 1], first place
    of each group, then the number of channels. clip: f32 [groups], in (0, 1].
    """

    permutation: Tensor
    edges: Tensor
    clip: Tensor

    def with_clip(self, clip: Tensor) -> Grouping:
        """The same groups with other ratios, f32 [groups]."""
        return Grouping(self.permutation, self.edges, clip)

    def group_of_channel(self) -> Tensor:
        """int64 [channels]."""
        groups = torch.arange(len(self.edges) - 1)
        of_place = groups.repeat_interleave(self.edges.long().diff())
        return of_place[self.permutation.long().argsort()]


def encode(
    x: Tensor, clip: Tensor | float, levels: int, meta: str, round_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of groups that lie in the last dimension.

    Args: x f32 [..., channels]; clip, a ratio or f32 that broadcasts against [..., 1]; levels;
    meta, "fp8" or "fp16", what scale and zero are stored as; round_first, see the module.
    Returns: codes uint8 like x; scale and zero in that type, [..., 1]. Groups that hold a NaN or
    an infinity have NaN for both.
    """
    low, high = x.amin(-1, keepdim=True) * clip, x.amax(-1, keepdim=True) * clip
    top = float(levels - 1)
    finite = x.isfinite().all(-1, keepdim=True)
    zero, largest = low, _LARGEST[meta]
    # Half precision is what the original computes in without FP8: there nothing is rounded later.
    if round_first or meta == "fp16":
        zero = zero.clamp(-largest, largest).to(_DTYPES[meta]).float()
    scale = ((high - zero) / top).clamp(min=_LEAST_SCALE)
    if round_first or meta == "fp16":
        scale = scale.clamp(_SMALLEST[meta], largest).to(_DTYPES[meta]).float()
    codes = ((x - zero) / scale).clamp(0.0, top).round()
    stored = [
        torch.where(finite, value, torch.nan).clamp(-largest, largest).to(_DTYPES[meta])
        for value in (scale, zero)
    ]
    return torch.where(finite, codes, 0.0).to(torch.uint8), stored[0], stored[1]


def fake_quantize(
    x: Tensor, clip: Tensor | float, levels: int, meta: str, round_first: bool = False
) -> Tensor:
    """What is read back of groups in the last dimension, f32. Args: as `encode`."""
    codes, scale, zero = encode(x, clip, levels, meta, round_first)
    return codes.float() * scale.float() + zero.float()


class Quantizer:
    """K or V of a layer to packed bytes and back."""

    def __init__(
        self,
        grouping: Grouping,
        bits: str,
        meta: str,
        round_first: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args: bits, a key of LEVELS; meta, round_first: as `encode`."""
        device = torch.device(device)
        self.meta, self.round_first, self.levels = meta, round_first, LEVELS[bits]
        self._sizes = grouping.edges.long().diff().tolist()
        self.permutation = grouping.permutation.to(device)
        self._clip = grouping.clip.to(device)
        self._group = grouping.group_of_channel().int().to(device)
        self.packing = Packing(grouping.permutation, grouping.edges, bits).to(device)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token, scales and zeros included."""
        return self.packing.row_bytes + 2 * len(self._sizes) * _DTYPES[self.meta].itemsize

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, channels], any float dtype.

        Returns: bytes uint8 [tokens, packing.row_bytes]; scale and zero [tokens, groups, 2] in the
        type they are stored as.
        """
        places = x.float().index_select(1, self.permutation.int())
        codes, metas = torch.empty_like(places, dtype=torch.uint8), []
        first = 0
        for size, clip in zip(self._sizes, self._clip, strict=True):
            part = slice(first, first + size)
            how = self.levels, self.meta, self.round_first
            codes[:, part], scale, zero = encode(places[:, part], clip, *how)
            metas.append(torch.cat([scale, zero], dim=1))
            first += size
        by_channel = torch.empty_like(codes)
        by_channel.index_copy_(1, self.permutation.long(), codes)
        return self.packing.pack(by_channel), torch.stack(metas, dim=1)

    def unpack(self, rows: Tensor, meta: Tensor) -> Tensor:
        """f32 [tokens, channels] of what `pack` returned."""
        scale, zero = (part.index_select(1, self._group) for part in meta.float().unbind(-1))
        # Codes and FP8 scales have few bits: the product is exact, so one rounding it is anyway.
        return torch.addcmul(zero, self.packing.unpack(rows), scale)

    def work_tables(self) -> list[Tensor]:
        """All tables but the permutation, for counting their bytes."""
        return [self._clip, self._group, *self.packing.tables()]
