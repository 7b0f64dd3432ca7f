"""Integer Arithmetic Instructions of the PTX ISA, and comparisons of all types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.instructions.registry import instruction, is_integer
from ptx.machine import Machine
from ptx.numbers import SCALARS, Array, Scalar
from ptx.program import Instruction, Pair

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
}


def operands(machine: Machine, ins: Instruction, *which: int) -> list[Array]:
    return [machine.read(ins.operands[i], ins.scalar) for i in which]


@instruction("add", "sub", "min", "max", applies=is_integer)
def binary(machine: Machine, ins: Instruction) -> None:
    x, y = operands(machine, ins, 1, 2)
    machine.write(ins.operands[0], BINARY[ins.opcode](x, y), ins.scalar)


def twice_as_wide(scalar: Scalar) -> Scalar:
    return SCALARS[f"{scalar.kind}{16 * scalar.size}"]


def high_product(x: Array, y: Array, scalar: Scalar) -> Array:
    if scalar.size < 8:
        wide = twice_as_wide(scalar).compute
        return (x.astype(wide) * y.astype(wide) >> wide.type(8 * scalar.size)).astype(
            scalar.compute
        )
    exact = x.astype(object) * y.astype(object) // (1 << 64)
    return (exact & ((1 << 64) - 1)).astype(np.uint64).view(scalar.compute)


def product(machine: Machine, ins: Instruction) -> tuple[Array, Scalar]:
    x, y = operands(machine, ins, 1, 2)
    if ins.has("wide"):
        wide = twice_as_wide(ins.scalar)
        return x.astype(wide.compute) * y.astype(wide.compute), wide
    if ins.has("hi"):
        return high_product(*np.broadcast_arrays(x, y), ins.scalar), ins.scalar
    return x * y, ins.scalar


@instruction("mul", modifiers="lo hi wide", applies=is_integer)
def mul(machine: Machine, ins: Instruction) -> None:
    value, scalar = product(machine, ins)
    machine.write(ins.operands[0], value, scalar)


@instruction("mad", modifiers="lo hi wide", applies=is_integer)
def mad(machine: Machine, ins: Instruction) -> None:
    value, scalar = product(machine, ins)
    machine.write(ins.operands[0], value + machine.read(ins.operands[3], scalar), scalar)


@instruction("div", "rem", applies=is_integer)
def div(machine: Machine, ins: Instruction) -> None:
    x, y = operands(machine, ins, 1, 2)
    machine.check(machine.active & machine.spread(y == 0), "divisor", y, "in a division")
    y = np.where(y == 0, 1, y).astype(y.dtype)
    remainder = np.fmod(x, y)  # truncates, as C and PTX do
    value = remainder if ins.opcode == "rem" else (x - remainder) // y
    machine.write(ins.operands[0], value, ins.scalar)


@instruction("neg", "abs", applies=is_integer)
def sign(machine: Machine, ins: Instruction) -> None:
    x = machine.read(ins.operands[1], ins.scalar)
    machine.write(ins.operands[0], -x if ins.opcode == "neg" else np.abs(x), ins.scalar)


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
WITH_NAN = ("equ", "neu", "ltu", "leu", "gtu", "geu")
COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def compare(name: str, x: Array, y: Array, scalar: Scalar) -> Array:
    """A comparison is false where a number is NaN, and one that ends in u is true there."""
    if scalar.kind != "f":
        return COMPARE[name](x, y)
    nan = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return nan if name == "nan" else ~nan
    if name in WITH_NAN:
        return COMPARE[name[:-1]](x, y) | nan
    return COMPARE[name](x, y) & ~nan


@instruction("setp", modifiers=" ".join((*COMPARE, *WITH_NAN, *COMBINE, "num", "nan")))
def setp(machine: Machine, ins: Instruction) -> None:
    x, y = operands(machine, ins, 1, 2)
    result = machine.spread(compare(ins.modifiers[0], x, y, ins.scalar))
    opposite = ~result
    combine = next((COMBINE[m] for m in ins.modifiers if m in COMBINE), None)
    if combine is not None:
        other = machine.predicate(ins.operands[3])
        result, opposite = combine(result, other), combine(opposite, other)
    target = ins.operands[0]
    if isinstance(target, Pair):
        machine.write_bits(target.first, result)
        machine.write_bits(target.second, opposite)
    else:
        machine.write_bits(target, result)


@instruction("selp")
def selp(machine: Machine, ins: Instruction) -> None:
    x, y = (machine.bits(o, ins.scalar.size) for o in ins.operands[1:3])
    machine.write_bits(ins.operands[0], np.where(machine.predicate(ins.operands[3]), x, y))


def parts(x: Array, count: int, signed: bool) -> Array:
    """The bytes or halves of 32-bit words, as int64."""
    kind = f"{'i' if signed else 'u'}{4 // count}"
    return np.ascontiguousarray(x)[..., None].view(kind).astype(np.int64)


@instruction("dp4a", "dp2a", modifiers="lo hi")
def dot(machine: Machine, ins: Instruction) -> None:
    """Four bytes times four bytes, or two halves times two of four bytes, added to c."""
    first, second = ins.scalars
    x, y, c = (machine.spread(machine.bits(o, 4)) for o in ins.operands[1:])
    left = parts(x, 4 if ins.opcode == "dp4a" else 2, first.kind == "s")
    right = parts(y, 4, second.kind == "s")
    if ins.opcode == "dp2a":
        right = right[:, 2:] if ins.has("hi") else right[:, :2]
    total = (left * right).sum(axis=1) + c.astype(np.int64)
    machine.write_bits(ins.operands[0], total.astype(np.uint32))
