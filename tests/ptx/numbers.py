"""Scalar types of PTX and arithmetic that rounds once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNSIGNED = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


@dataclass(frozen=True)
class Scalar:
    """A type as it ends an opcode: how registers hold it and what numpy computes it in."""

    name: str
    size: int  # bytes in a register or in memory; 0: a predicate
    kind: str  # u, s, b, f, p
    compute: np.dtype[Any]
    lanes: int = 1  # 2 for packed pairs of halves

    @property
    def storage(self) -> np.dtype[Any]:
        return UNSIGNED[self.size]

    @property
    def is_bf16(self) -> bool:
        return self.name.startswith("bf16")


def _scalars() -> dict[str, Scalar]:
    table = {"pred": Scalar("pred", 0, "p", np.dtype(np.bool_))}
    for size, unsigned in UNSIGNED.items():
        bits = 8 * size
        table[f"u{bits}"] = Scalar(f"u{bits}", size, "u", unsigned)
        table[f"b{bits}"] = Scalar(f"b{bits}", size, "b", unsigned)
        table[f"s{bits}"] = Scalar(f"s{bits}", size, "s", np.dtype(f"i{size}"))
    for bits in (16, 32, 64):
        table[f"f{bits}"] = Scalar(f"f{bits}", bits // 8, "f", np.dtype(f"f{bits // 8}"))
    # numpy has no bf16: float32 holds its sums, products and quotients with enough bits that rounding the result
    # again is rounding once (24 >= 2 * 8 + 2).
    table["bf16"] = Scalar("bf16", 2, "f", np.dtype(np.float32))
    table["f16x2"] = Scalar("f16x2", 4, "f", np.dtype(np.float16), 2)
    table["bf16x2"] = Scalar("bf16x2", 4, "f", np.dtype(np.float32), 2)
    table["e4m3x2"] = Scalar("e4m3x2", 2, "f", np.dtype(np.float16), 2)
    return table


SCALARS = _scalars()


def bf16_to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(x: Array) -> Array:
    """To nearest, ties to even; NaN becomes the canonical one."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _e4m3_values() -> Array:
    """OCP 8-bit floating point, E4M3: bias 7, no infinity, NaN where all other bits are set."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(code & 127 == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float16)


E4M3_VALUES = _e4m3_values()


def float_to_e4m3(x: Array) -> Array:
    """To nearest, ties to even, saturating at 448."""
    wide = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    exponent = np.maximum(np.floor(np.log2(np.where(wide > 0, wide, 1.0))), -6.0)
    steps = np.rint(np.where(np.isnan(x), 0.0, wide) * 2.0 ** (3.0 - exponent))
    # A value that rounds up to the next power of two has 16 steps: the carry runs into the exponent.
    code = np.where(steps < 8, steps, steps - 8 + 8 * (exponent + 7))
    code = np.where(np.isnan(x), 127.0, code).astype(np.uint8)
    return code | np.signbit(x).astype(np.uint8) << np.uint8(7)


def unpack(bits: Array, scalar: Scalar) -> Array:
    """Register contents as numbers; packed types get a last axis of two, low half first."""
    if scalar.lanes == 2:
        parts = np.ascontiguousarray(bits)[..., None].view(UNSIGNED[scalar.size // 2])
        if scalar.name == "e4m3x2":
            return E4M3_VALUES[parts]
        return bf16_to_float(parts) if scalar.is_bf16 else parts.view(np.float16)
    return bf16_to_float(bits) if scalar.is_bf16 else bits.view(scalar.compute)


def pack(x: Array, scalar: Scalar) -> Array:
    """Numbers as register contents, rounded to nearest where they are wider than the type."""
    if scalar.name == "e4m3x2":
        parts = float_to_e4m3(x)
    elif scalar.is_bf16:
        parts = float_to_bf16(
            narrow(x) if x.dtype == np.float64 else x.astype(np.float32, copy=False)
        )
    else:
        parts = x.astype(scalar.compute, copy=False)
    if scalar.lanes == 2:
        return np.ascontiguousarray(parts).view(scalar.storage)[..., 0]
    return np.ascontiguousarray(parts).view(scalar.storage)


def narrow(x: Array) -> Array:
    """float64 to float32 rounded to odd: what is rounded again to few bits is then rounded once in effect."""
    cut = x.astype(np.float32)
    back = cut.astype(np.float64)
    inexact = (back != x) & np.isfinite(x) & np.isfinite(cut)
    toward_zero = np.where(
        inexact & (np.abs(back) > np.abs(x)), np.nextafter(cut, np.float32(0)), cut
    )
    odd = toward_zero.view(np.uint32) | inexact.astype(np.uint32)
    return odd.view(np.float32)


def fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of numbers with at most 24 bits, as float64 rounded to odd.

    The product is exact in float64; the sum's error is known exactly (Knuth's two-sum), so rounding the result
    again, to the type, is rounding once.
    """
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    inexact = (error != 0) & np.isfinite(total)
    bits = np.ascontiguousarray(total).view(np.int64)
    # One step towards zero where the sum was rounded away from it, then the last bit set.
    away = inexact & (np.signbit(error) != np.signbit(total))
    return np.where(inexact, (bits - away) | 1, bits).view(np.float64)


def directed(x: Array, mode: str) -> Array:
    """float64 that was rounded to odd, to float32 by the modes rn, rz, rm (down) and rp (up)."""
    cut = x.astype(np.float32)
    back = cut.astype(np.float64)
    if mode == "rn":
        return cut
    down, up = np.nextafter(cut, np.float32(-np.inf)), np.nextafter(cut, np.float32(np.inf))
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(x), np.where(x > 0, down, up), cut)
    return np.where(back > x, down, cut) if mode == "rm" else np.where(back < x, up, cut)


def flush(x: Array) -> Array:
    """Subnormal float32 become zeros of their sign (.ftz)."""
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def smaller(x: Array, y: Array) -> Array:
    """min of PTX: a NaN loses, -0 is less than +0."""
    return np.where((x == y) & np.signbit(x), x, np.fmin(x, y))


def larger(x: Array, y: Array) -> Array:
    return np.where((x == y) & np.signbit(x), y, np.fmax(x, y))


ROUND_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integer(x: Array, rounding: str, target: Scalar) -> Array:
    """Float to integer: saturates, NaN gives 0."""
    limits = np.iinfo(target.compute)
    y = ROUND_TO_INTEGER[rounding](
        np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    )
    low, high = y <= float(limits.min), y >= float(limits.max)
    inside = np.where(low | high, 0.0, y).astype(target.compute)
    inside = np.where(high, target.compute.type(limits.max), inside)
    return np.where(low, target.compute.type(limits.min), inside).astype(target.compute)
