"""Floating-Point Instructions of the PTX ISA, single, half and bf16 alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction, is_float
from ptx.machine import Machine
from ptx.numbers import Array, directed, flush, fused, larger, pack, smaller, unpack
from ptx.program import Instruction


def operands(machine: Machine, ins: Instruction) -> list[Array]:
    values = [machine.read(o, ins.scalar) for o in ins.operands[1:]]
    return [flush(v) for v in values] if ins.has("ftz") else values


def finish(machine: Machine, ins: Instruction, value: Array) -> None:
    """Rounds to the type, then what .ftz, .sat and .relu ask for."""
    rounded = unpack(pack(value, ins.scalar), ins.scalar)
    if ins.has("ftz"):
        rounded = flush(rounded)
    if ins.has("sat"):
        rounded = np.where(np.isnan(rounded), 0, np.clip(rounded, 0, 1)).astype(rounded.dtype)
    if ins.has("relu"):
        rounded = np.where(rounded > 0, rounded, np.zeros_like(rounded))
    machine.write(ins.operands[0], rounded, ins.scalar)


BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


@instruction("add", "sub", "mul", modifiers="rn ftz sat", applies=is_float)
@instruction("div", modifiers="rn ftz full approx", applies=is_float)
def binary(machine: Machine, ins: Instruction) -> None:
    """Quotients are exact here even where .full or .approx allow an error."""
    x, y = operands(machine, ins)
    finish(machine, ins, BINARY[ins.opcode](x, y))


@instruction("min", "max", modifiers="ftz NaN", applies=is_float)
def extremum(machine: Machine, ins: Instruction) -> None:
    x, y = operands(machine, ins)
    value = smaller(x, y) if ins.opcode == "min" else larger(x, y)
    if ins.has("NaN"):
        value = np.where(np.isnan(x) | np.isnan(y), np.nan, value).astype(value.dtype)
    finish(machine, ins, value)


@instruction("fma", modifiers="rn rz rm rp ftz sat relu", applies=is_float)
def fma(machine: Machine, ins: Instruction) -> None:
    mode = ins.modifiers[0]
    if ins.scalar.name == "f64" or (mode != "rn" and ins.scalar.name != "f32"):
        raise PtxError(f"this sum of a product cannot be rounded here: {ins.text}")
    value = fused(*operands(machine, ins))
    finish(machine, ins, value if mode == "rn" else directed(value, mode))


@instruction("neg", "abs", modifiers="ftz", applies=is_float)
def sign(machine: Machine, ins: Instruction) -> None:
    (x,) = operands(machine, ins)
    finish(machine, ins, -x if ins.opcode == "neg" else np.abs(x))


@instruction("copysign", applies=is_float)
def copysign(machine: Machine, ins: Instruction) -> None:
    x, y = operands(machine, ins)
    finish(machine, ins, np.copysign(y, x))


UNARY: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*UNARY, modifiers="rn approx ftz", applies=is_float)
def unary(machine: Machine, ins: Instruction) -> None:
    """float64, rounded once: right for .rn, and inside the error that .approx allows."""
    (x,) = operands(machine, ins)
    finish(machine, ins, UNARY[ins.opcode](x.astype(np.float64)))


CLASSES: dict[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
}


@instruction("testp", modifiers=" ".join(CLASSES))
def testp(machine: Machine, ins: Instruction) -> None:
    (x,) = operands(machine, ins)
    machine.write_bits(ins.operands[0], machine.spread(CLASSES[ins.modifiers[0]](x)))
