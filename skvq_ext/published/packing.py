"""Integer codes in bytes, groups of any size: what is stored for the published method.

A row holds the codes of one token, one group of channels after the other, each from a byte on.
2 and 4 bits are 4 and 2 to a byte, lowest bits first; 3 bits are a plane of their low two bits and
then a plane of the third bit, each from a byte on; three levels ("1.5 bits") are 5 to a byte, base
3, lowest digit first. They are the rows that `skvq_ext.ops.dequantize_unpack` reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

LEVELS = {"4": 16, "3": 8, "2": 4, "1.5": 3}
# Digits of a code, lowest first: (base, digits to a byte).
_DIGITS = {"4": ((16, 2),), "3": ((4, 4), (2, 8)), "2": ((4, 4),), "1.5": ((3, 5),)}


class _Plane(NamedTuple):
    """One digit of every code.

    slot: int32 [channels], byte of the row times digits to a byte, plus the place in that byte.
    values: f32 [256, digits to a byte], what the digits of a byte count in a code. weights: uint8
    [digits to a byte], what they count in the byte. below: what the digit counts in a code.
    """

    slot: Tensor
    values: Tensor
    weights: Tensor
    base: int
    below: int


class Packing:
    """Where in a row of bytes the code of each channel lies."""

    def __init__(self, permutation: Tensor, edges: Tensor, bits: str) -> None:
        """Args: permutation, int [channels], the channel at each place; edges, int [groups + 1],
        first place of each group, then the number of channels; bits, a key of LEVELS.
        """
        self.bits, self.channels = bits, len(permutation)
        sizes = edges.long().diff()
        planes = [per_byte for _, per_byte in _DIGITS[bits]]
        lengths = torch.stack([-(-sizes // per_byte) for per_byte in planes], dim=1)
        self.row_bytes = int(lengths.sum())
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        place = torch.arange(self.channels) - edges[:-1].long().repeat_interleave(sizes)
        inverse = permutation.long().argsort()
        self._planes, below = [], 1
        for index, (base, per_byte) in enumerate(_DIGITS[bits]):
            slot = starts[:, index].repeat_interleave(sizes) * per_byte + place
            weights = base ** torch.arange(per_byte)
            values = torch.arange(256)[:, None] // weights % base * below
            self._planes.append(
                _Plane(slot[inverse].int(), values.float(), weights.to(torch.uint8), base, below)
            )
            below *= base

    def to(self, device: torch.device) -> Packing:
        """The same with its tables on another device; itself where they are there already."""
        if self._planes[0].slot.device == device:
            return self
        moved = Packing.__new__(Packing)
        moved.bits, moved.channels, moved.row_bytes = self.bits, self.channels, self.row_bytes
        moved._planes = [
            _Plane(p.slot.to(device), p.values.to(device), p.weights.to(device), p.base, p.below)
            for p in self._planes
        ]
        return moved

    def pack(self, codes: Tensor) -> Tensor:
        """Codes uint8 [tokens, channels], below LEVELS, to bytes uint8 [tokens, row_bytes]."""
        rows = codes.new_zeros(len(codes), self.row_bytes)
        for slot, _, weights, base, below in self._planes:
            digits = codes.new_zeros(len(codes), self.row_bytes * len(weights))
            digits.index_copy_(1, slot.long(), codes // below % base)
            bytes_ = digits.view(len(codes), self.row_bytes, -1) * weights
            rows += bytes_.sum(-1, dtype=torch.uint8)  # every byte belongs to one plane
        return rows

    def unpack(self, rows: Tensor) -> Tensor:
        """Bytes uint8 [tokens, row_bytes] to codes, whole numbers as f32 [tokens, channels]."""
        index = rows.int()
        digits = [
            embedding(index, plane.values).flatten(1).index_select(1, plane.slot)
            for plane in self._planes
        ]
        return digits[0] if len(digits) == 1 else digits[0] + digits[1]

    def tables(self) -> list[Tensor]:
        """The tables that are held, for counting their bytes."""
        return [table for p in self._planes for table in (p.slot, p.values, p.weights)]
