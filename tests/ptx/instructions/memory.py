"""mov, ld, st and atomics. Loads and stores of every space, vectors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction
from ptx.machine import Machine
from ptx.numbers import UNSIGNED, Array, Scalar, larger, pack, smaller, unpack
from ptx.program import Instruction, Name, Vector

SPACES = ("global", "shared", "local", "param", "const")
HINTS = (
    "volatile relaxed weak acquire release acq_rel cta gpu sys cluster nc ca cg cs lu cv wb wt "
    "L1::no_allocate L1::evict_first L1::evict_last L2::64B L2::128B L2::256B shared::cta"
)
VECTORS = "v2 v4"


def space_of(ins: Instruction) -> str:
    names = (m.removesuffix("::cta") for m in ins.modifiers)
    return next((m for m in names if m in SPACES), "generic")


@instruction("mov")
def move(machine: Machine, ins: Instruction) -> None:
    target, source = ins.operands
    if isinstance(source, Vector):
        join(machine, ins, source)
    elif isinstance(target, Vector):
        split(machine, ins, target)
    elif ins.scalar.kind == "p":
        machine.write_bits(target, machine.predicate(source))
    else:
        value = machine.bits(source, ins.scalar.size)
        if isinstance(
            source, Name
        ):  # an address or a special register: never wider than what is asked for
            value = machine.spread(value)
        machine.write_bits(target, value)


def join(machine: Machine, ins: Instruction, source: Vector) -> None:
    part = ins.scalar.size // len(source.items)
    value = np.zeros(machine.n, ins.scalar.storage)
    for i, item in enumerate(source.items):
        bits = machine.bits(item, part).astype(ins.scalar.storage)
        value = value | bits << ins.scalar.storage.type(8 * part * i)
    machine.write_bits(ins.operands[0], value)


def split(machine: Machine, ins: Instruction, target: Vector) -> None:
    part = ins.scalar.size // len(target.items)
    value = machine.bits(ins.operands[1], ins.scalar.size)
    for i, item in enumerate(target.items):
        shifted = value >> ins.scalar.storage.type(8 * part * i)
        machine.write_bits(item, shifted.astype(UNSIGNED[part]))


@instruction("ld", modifiers=f"{HINTS} {VECTORS} {' '.join(SPACES)}")
@instruction("ldu", modifiers=f"{VECTORS} global")
def load(machine: Machine, ins: Instruction) -> None:
    targets, scalar = machine.items(ins.operands[0]), ins.scalar
    values = machine.load(
        space_of(ins), machine.address(ins.operands[1]), scalar.size, len(targets)
    )
    for target, value in zip(targets, values, strict=True):
        # A register may be wider than what is loaded: signed numbers are extended by their sign.
        if scalar.kind == "s":
            value = value.view(scalar.compute).astype(np.int64).view(np.uint64)
        machine.write_bits(target, value)


@instruction("st", modifiers=f"{HINTS} {VECTORS} {' '.join(SPACES)}")
def store(machine: Machine, ins: Instruction) -> None:
    values = [machine.bits(item, ins.scalar.size) for item in machine.items(ins.operands[1])]
    machine.store(space_of(ins), machine.address(ins.operands[0]), values)


UPDATES: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: smaller(old, x) if old.dtype.kind == "f" else np.minimum(old, x),
    "max": lambda old, x: larger(old, x) if old.dtype.kind == "f" else np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "cas": lambda old, expected, x: np.where(old == expected, x, old),
}


@instruction("atom", "red", modifiers=f"{HINTS} {' '.join(SPACES)} {' '.join(UPDATES)} noftz")
def atomic(machine: Machine, ins: Instruction) -> None:
    """One thread after the other, in the order of their numbers."""
    update = UPDATES[next(m for m in ins.modifiers if m in UPDATES)]
    first = 0 if ins.opcode == "red" else 1
    address, scalar = machine.address(ins.operands[first]), ins.scalar
    inputs = [machine.spread(machine.bits(o, scalar.size)) for o in ins.operands[first + 1 :]]
    results = np.zeros(machine.n, scalar.storage)
    for backing, index, who in machine.locate(space_of(ins), address, scalar.size, write=True):
        view = backing.views[scalar.size]
        for i in np.flatnonzero(who):
            at = int(index[i]) // scalar.size
            results[i] = view[at]
            view[at] = updated(update, view[at : at + 1], [x[i : i + 1] for x in inputs], scalar)
    if ins.opcode == "atom":
        machine.write_bits(ins.operands[0], results)


def updated(update: Callable[..., Any], old: Array, inputs: list[Array], scalar: Scalar) -> Any:
    new = update(unpack(old, scalar), *(unpack(x, scalar) for x in inputs))
    return pack(np.asarray(new), scalar)[0]


@instruction(
    "membar",
    "fence",
    modifiers="cta gl sys gpu cluster sc acq_rel proxy async async::generic "
    "mbarrier_init release acquire global shared::cta",
)
def fence(machine: Machine, ins: Instruction) -> None:
    """Memory is in order here."""


@instruction("trap")
def trap(machine: Machine, ins: Instruction) -> None:
    first = int(np.argmax(machine.active))
    raise PtxError(f"the kernel trapped: {machine.thread_name(first)}")


@instruction("griddepcontrol", modifiers="launch_dependents wait")
@instruction("prefetch", modifiers="global L1 L2")
def hint(machine: Machine, ins: Instruction) -> None:
    """Says when something could start; here everything before it is finished."""
