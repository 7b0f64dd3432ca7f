"""What all baselines are made of: rounding to levels, and the count of bits that would be stored.

A coder gets rows that leave the window and returns what would be read back, with the bits it would
store for them: codes, scales, zeros, outliers, factors. Tables that are made once per model are not
counted: they do not grow with the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from skvq_ext.ops import format_table
from skvq_ext.reference import quantize_group
from skvq_ext.rope import Rope

META_BITS = {"fp8": 8, "fp16": 16}
VALUE_BITS = 16  # of a number that is kept as it is
INDEX_BITS = 16  # of its place in a vector
CODE_BITS = {code["name"]: float(code["bits"]) for code in format_table()["codes"]}


class BaselineError(ValueError):
    """A baseline that does not exist, does not fit the model, or is used as it cannot be."""


class Coded(NamedTuple):
    """Rows as they would be read back, float32, and the bits that would be stored for them."""

    values: Tensor
    bits: float


class Coder(Protocol):
    """Codes rows of K or of V in one layer: x f32 [num_kv_heads, tokens, head_dim], the first of
    them at position `start`."""

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """The rows read back."""
        ...


class Seen(NamedTuple):
    """One stretch of queries and what they attended to.

    query [num_q_heads, n, head_dim], the first at position `first`; keys [num_kv_heads, kv_len,
    head_dim]; visible bool [n, kv_len]; scale, softcap and learned_sinks as in `exact.Softmax`.
    """

    query: Tensor
    keys: Tensor
    visible: Tensor
    first: int
    scale: float
    softcap: float
    learned_sinks: Tensor | None


class Quantizer(Protocol):
    """What a cache asks of a method; one object serves one cache and may have a memory."""

    def code(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Coded, Coded]:
        """Codes a tile: k, v f32 [num_kv_heads, tokens, head_dim], the first at `start`."""
        ...

    def watch(self, layer: int, seen: Seen) -> None:
        """Is told of every attention before tiles leave the window."""
        ...


@dataclass(frozen=True)
class Pair:
    """A quantizer that treats K and V apart and remembers nothing."""

    k: Coder
    v: Coder

    def code(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Coded, Coded]:
        """See `Quantizer`."""
        return self.k(layer, k, start), self.v(layer, v, start)

    def watch(self, layer: int, seen: Seen) -> None:
        """Nothing is learned from attention."""


@dataclass(frozen=True)
class PreRope:
    """Codes keys as they were before RoPE."""

    coder: Coder
    rope: Rope

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        plain = self.rope.unrotate(x, positions, layer)
        values, bits = self.coder(layer, plain, start)
        return Coded(self.rope.rotate(values, positions, layer), bits)


@dataclass(frozen=True)
class Rotated:
    """Codes rows times an orthogonal matrix; matrices: f32 [head_dim, head_dim] per layer, or
    [num_kv_heads, head_dim, head_dim], or one for all layers."""

    coder: Coder
    matrices: tuple[Tensor, ...]

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        matrix = self.matrices[layer if len(self.matrices) > 1 else 0].to(x.device)
        values, bits = self.coder(layer, x @ matrix, start)
        return Coded(values @ matrix.mT, bits)


@dataclass(frozen=True)
class PerToken:
    """Groups of channels of each token and head share a scale and a zero.

    group: channels, a divisor of head_dim; exponents, of scale and zero, for fp8.
    """

    width: str
    group: int
    meta: str
    exponents: tuple[int, int] = (0, 0)

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        groups = x.unflatten(-1, (-1, self.group))
        values, bits = uniform(groups, self.width, self.meta, self.exponents)
        return Coded(values.flatten(-2), bits)


@dataclass(frozen=True)
class PerChannel:
    """Groups of tokens of each channel and head share a scale and a zero; group: tokens."""

    width: str
    group: int
    meta: str

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        groups = x.mT.unflatten(-1, (-1, self.group))
        values, bits = uniform(groups, self.width, self.meta)
        return Coded(values.flatten(-2).mT, bits)


def uniform(groups: Tensor, width: str, meta: str, exponents: tuple[int, int] = (0, 0)) -> Coded:
    """Rounds each group to evenly spaced levels between its ends.

    Args: groups f32 [..., members]; width, a number format such as "2"; meta, "fp8" or "fp16";
    exponents, of scale and zero. The codes are computed against the rounded scale and zero, which
    is kinder to a method than rounding those afterwards.
    """
    found = quantize_group(groups, width, meta, 1.0, *exponents)
    meta_bits = (found.scale.numel() + found.zero.numel()) * META_BITS[meta]
    return Coded(found.dequantize(), groups.numel() * CODE_BITS[width] + meta_bits)


def group_bits(width: str, group: float, meta: str) -> float:
    """Bits per value of evenly spaced levels with a scale and a zero per `group` values."""
    return CODE_BITS[width] + 2 * META_BITS[meta] / group


def extremes(vectors: Tensor, count: int) -> Tensor:
    """The places of the `count` largest and the `count` smallest members of each vector.

    Args: vectors [..., members]. Returns: bool like vectors.
    """
    mask = torch.zeros_like(vectors, dtype=torch.bool)
    if count:
        order = vectors.argsort(dim=-1, stable=True)
        ends = torch.cat([order[..., :count], order[..., -count:]], dim=-1)
        mask.scatter_(-1, ends, True)
    return mask


def ends_of(members: int, percent: float) -> int:
    """Outliers at each end of a vector: half the share, at least one where there is a share."""
    return min(max(1, round(percent / 200 * members)), (members - 1) // 2) if percent else 0


def across_heads(x: Tensor) -> Tensor:
    """[num_kv_heads, tokens, head_dim] to the tokens' channels of all heads, [tokens, channels]."""
    return x.transpose(0, 1).flatten(1)


def per_head(tokens: Tensor, heads: int) -> Tensor:
    """The inverse of `across_heads`."""
    return tokens.view(len(tokens), heads, -1).transpose(0, 1)


def kept(x: Tensor) -> Tensor:
    """Numbers that are stored one by one, as fp16 keeps them."""
    return x.clamp(-65504.0, 65504.0).half().float()


def check_divides(what: str, group: int, total: int, of: str) -> None:
    """Raises: BaselineError where `total` does not fall into whole groups."""
    if group < 1 or total % group:
        raise BaselineError(
            f"{what}{group}: groups of {group} do not divide {of} {total}; give a divisor of it."
        )
