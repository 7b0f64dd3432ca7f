"""GEAR: rounded values, plus a few outliers kept apart, plus a low-rank matrix for what is missing.

Source: arXiv 2403.05527, X = quantized + low-rank + sparse: outliers are the largest and smallest members of
each vector (K: a channel, V: a token), the backbone is KIVI's, the residual of each head is
approximated with rank r by power iteration. Here the low-rank factors come from a singular value
decomposition, which is at least as good, and cover the tokens that leave the window together (64, or
`block`), where GEAR decomposes a whole prompt at once and then every 20 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.baselines.coding import (
    INDEX_BITS,
    VALUE_BITS,
    BaselineError,
    Coded,
    Pair,
    across_heads,
    check_divides,
    ends_of,
    extremes,
    group_bits,
    kept,
    per_head,
    uniform,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.evaluate.method import Method
from skvq_ext.format import TILE_TOKENS


@dataclass(frozen=True)
class GearOptions(Options):
    """g: tokens of a key channel, and channels of a value token, that share a scale and a zero;
    rank: of the correction; outliers: percent of each vector; block: tokens that are decomposed."""

    g: int = 32
    rank: int = 2
    outliers: float = 2.0
    block: int = TILE_TOKENS
    meta: str = words("fp16", "fp8")


@dataclass(frozen=True)
class Gear:
    """Codes rows of K (by_channel) or V.

    ends: outliers at each end of a vector: a channel over the tokens of K, a token over the channels
    of all heads of V.
    """

    width: str
    group: int
    meta: str
    rank: int
    ends: int
    by_channel: bool

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        apart = self._outliers(x)
        backbone, bits = self._backbone(x, apart)
        residual = torch.where(apart, 0.0, x - backbone)
        left, right = factors(residual, self.rank)
        values = torch.where(apart, kept(x), backbone + left @ right.mT)
        bits += float(apart.sum()) * (VALUE_BITS + INDEX_BITS)
        bits += (left.numel() + right.numel()) * VALUE_BITS
        return Coded(values, bits)

    def _outliers(self, x: Tensor) -> Tensor:
        if self.by_channel:
            return extremes(x.mT, self.ends).mT
        return per_head(extremes(across_heads(x), self.ends), len(x))

    def _backbone(self, x: Tensor, apart: Tensor) -> Coded:
        """Groups as KIVI makes them; outliers stand at the middle of the others and widen nothing."""
        rows, gone = (x.mT, apart.mT) if self.by_channel else (x, apart)
        groups, gone = (t.unflatten(-1, (-1, self.group)) for t in (rows, gone))
        low = torch.where(gone, torch.inf, groups).amin(-1, keepdim=True)
        high = torch.where(gone, -torch.inf, groups).amax(-1, keepdim=True)
        middle = torch.where(low > high, 0.0, (low + high) / 2)  # a group of outliers only
        values, bits = uniform(torch.where(gone, middle, groups), self.width, self.meta)
        values = values.flatten(-2)
        return Coded(values.mT if self.by_channel else values, bits)


def factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of each matrix by A B^T, as fp16 keeps it.

    Args: x f32 [..., tokens, channels]. Returns: A [..., tokens, rank], B [..., channels, rank].
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    root = s[..., None, :rank].sqrt()
    return kept(u[..., :rank] * root), kept(vh.mT[..., :rank] * root)


def build(options: GearOptions, source: Source) -> Method:
    """Needs no calibration."""
    dim, heads = source.geometry.head_dim, source.geometry.num_kv_heads
    check_divides("g", options.g, options.block, "block")
    check_divides("g", options.g, dim, "head_dim")
    if not 0 <= options.rank <= min(dim, options.block):
        raise BaselineError(f"rank{options.rank}: the rank is at most {min(dim, options.block)}.")
    if not 0.0 <= options.outliers < 100.0:
        raise BaselineError(f"outliers{options.outliers:g}: give a percentage below 100.")
    members = {"k": options.block, "v": heads * dim}
    ends = {side: ends_of(count, options.outliers) for side, count in members.items()}
    k, v = (
        Gear(width, options.g, options.meta, options.rank, ends[side], side == "k")
        for side, width in options.sides
    )
    pair = Pair(k, v)
    low_rank = options.rank * (options.block + dim) * VALUE_BITS / (options.block * dim)
    bits = [
        group_bits(width, options.g, options.meta)
        + 2 * ends[side] / members[side] * (VALUE_BITS + INDEX_BITS)
        + low_rank
        for side, width in options.sides
    ]
    deviations = (
        f"KIVI backbone, rank {options.rank} per head and {options.block} tokens, "
        f"{2 * ends['k']} of {members['k']} and {2 * ends['v']} of {members['v']} numbers apart"
    )
    return Simulated.of(
        "gear", options, average(*bits), lambda: pair, deviations, tile=options.block
    )
