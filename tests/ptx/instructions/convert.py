"""cvt and cvta of "Data Movement and Conversion Instructions"."""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction
from ptx.machine import ADDRESS, Machine
from ptx.memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_SIZE
from ptx.numbers import ROUND_TO_INTEGER, Array, flush, to_integer
from ptx.program import Instruction

ROUNDING = " ".join(ROUND_TO_INTEGER)


def rounding_of(ins: Instruction) -> str | None:
    return next((m for m in ins.modifiers if m in ROUND_TO_INTEGER), None)


def is_pair(ins: Instruction) -> bool:
    return any(s.lanes == 2 for s in ins.scalars)


@instruction("cvt", modifiers="rn satfinite relu", applies=is_pair)
def convert_pair(machine: Machine, ins: Instruction) -> None:
    """Two floats become one register, the first in the upper half; or a register of two becomes another."""
    target, source = ins.scalars[-2:]
    if len(ins.operands) == 3:
        high, low = (machine.spread(machine.read(o, source)) for o in ins.operands[1:])
        value = np.stack([low, high], axis=-1)
    else:
        value = machine.read(ins.operands[1], source)
    if (target.name == "e4m3x2") != ins.has("satfinite"):
        raise PtxError(f".satfinite is for e4m3x2 alone here: {ins.text}")
    if ins.has("relu"):
        value = np.where(value > 0, value, np.zeros_like(value))
    machine.write(ins.operands[0], value, target)


@instruction("cvt", modifiers=f"rn sat ftz {ROUNDING}", applies=lambda ins: not is_pair(ins))
def convert(machine: Machine, ins: Instruction) -> None:
    target, source = ins.scalars[-2:]
    x = machine.read(ins.operands[1], source)
    if ins.has("ftz"):
        x = flush(x)
    rounding = rounding_of(ins)
    value: Array
    if target.kind == "f":
        if source.kind == "f" and rounding is not None:
            x = ROUND_TO_INTEGER[rounding](x)
        elif source.size > target.size and not ins.has("rn"):
            raise PtxError(f"this rounding is not known here: {ins.text}")
        value = x if target.is_bf16 else x.astype(target.compute)
        if target.is_bf16 and source.kind != "f":
            value = x.astype(np.float64)
        if ins.has("ftz"):
            value = flush(value)
        if ins.has("sat"):
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
    elif source.kind == "f":
        if rounding is None:
            raise PtxError(f"a float becomes an integer without rounding: {ins.text}")
        value = to_integer(x, rounding, target)
    else:
        if ins.has("sat"):
            limits = np.iinfo(target.compute)
            low, high = (
                max(limits.min, np.iinfo(x.dtype).min),
                min(limits.max, np.iinfo(x.dtype).max),
            )
            x = np.clip(x, low, high)
        value = x.astype(target.compute)
    write_extended(machine, ins, value)


def write_extended(machine: Machine, ins: Instruction, value: Array) -> None:
    """A register may be wider than the type: integers are extended by their sign."""
    target, operand = ins.scalars[-2], ins.operands[0]
    if target.kind == "s":
        machine.write_bits(operand, value.astype(np.int64).view(np.uint64))
    else:
        machine.write(operand, value, target)


WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


@instruction("cvta", modifiers="to global const shared local param shared::cta")
def convert_address(machine: Machine, ins: Instruction) -> None:
    """Addresses of global and constant memory are generic already."""
    address = machine.bits(ins.operands[1], ADDRESS.size)
    space = ins.modifiers[-2].removesuffix("::cta")
    window = np.uint64(WINDOWS.get(space, 0))
    if not ins.has("to"):
        machine.write_bits(ins.operands[0], address + window)
        return
    if space in WINDOWS:
        outside = (address < window) | (address >= window + np.uint64(WINDOW_SIZE))
        outside = machine.spread(outside)
        machine.check(machine.active & outside, "address", address, f"is not in {space} memory")
    machine.write_bits(ins.operands[0], address - window)


@instruction("isspacep", modifiers="global const shared local param shared::cta")
def is_in_space(machine: Machine, ins: Instruction) -> None:
    address = machine.bits(ins.operands[1], ADDRESS.size)
    space = ins.modifiers[0].removesuffix("::cta")
    windows = {s: (address >= w) & (address < w + WINDOW_SIZE) for s, w in WINDOWS.items()}
    inside = windows[space] if space in windows else ~np.logical_or.reduce(list(windows.values()))
    machine.write_bits(ins.operands[0], machine.spread(inside))
