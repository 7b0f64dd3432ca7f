"""Instructions by which the lanes of a warp exchange values. All lanes that are named must have come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction
from ptx.machine import WARP, Machine
from ptx.numbers import SCALARS, Array
from ptx.program import Instruction, Operand, Pair

U32 = SCALARS["u32"]
LANES = np.arange(WARP)


def by_warp(machine: Machine, value: Array) -> Array:
    return machine.spread(value).reshape(-1, WARP)


def members_of(machine: Machine, operand: Operand) -> Array:
    """Converges on the mask of members; [warps, lane, other lane] says who belongs to whom."""
    mask = by_warp(machine, machine.bits(operand, 4))
    machine.converge(mask.ravel())
    return mask[:, :, None] >> LANES.astype(np.uint32) & 1 != 0


@instruction("shfl", modifiers="sync up down bfly idx")
def shuffle(machine: Machine, ins: Instruction) -> None:
    """ "shfl.sync": the operand c holds the highest lane in bits 0 to 4 and the bits that split the warp in 8 to 12."""
    members = members_of(machine, ins.operands[4])
    mode = ins.modifiers[1]
    amount = by_warp(machine, machine.bits(ins.operands[2], 4)).astype(np.int64) & 31
    control = by_warp(machine, machine.bits(ins.operands[3], 4)).astype(np.int64)
    segment, clamp = control >> 8 & 31, control & 31
    highest = LANES & segment | clamp & ~segment
    if mode == "up":
        source = LANES - amount
        valid = source >= highest
    else:
        lowest = LANES & segment
        source = {
            "down": LANES + amount,
            "bfly": LANES ^ amount,
            "idx": lowest | amount & ~segment,
        }[mode]
        valid = source <= highest
    source = np.where(valid, source, LANES)
    outside = ~np.take_along_axis(members, source[:, :, None], axis=2)[:, :, 0]
    machine.check(
        machine.active & outside.ravel(), "lane", source.ravel(), "is read but is no member"
    )
    value = np.take_along_axis(by_warp(machine, machine.bits(ins.operands[1], 4)), source, axis=1)
    target = ins.operands[0]
    if isinstance(target, Pair):
        machine.write_bits(target.first, value.ravel())
        machine.write_bits(target.second, valid.ravel())
    else:
        machine.write_bits(target, value.ravel())


@instruction("vote", modifiers="sync any all uni ballot")
def vote(machine: Machine, ins: Instruction) -> None:
    members = members_of(machine, ins.operands[2])
    votes = by_warp(machine, machine.predicate(ins.operands[1]))[:, None, :]
    mode = ins.modifiers[1]
    if mode == "ballot":
        bits = (members & votes).astype(np.uint32) << LANES.astype(np.uint32)
        machine.write(ins.operands[0], bits.sum(axis=2, dtype=np.uint32).ravel(), U32)
        return
    yes, no = (members & votes).any(2), (members & ~votes).any(2)
    result = {"any": yes, "all": ~no, "uni": ~(yes & no)}[mode]
    machine.write_bits(ins.operands[0], result.ravel())


REDUCE: dict[str, tuple[Callable[..., Any], Callable[[np.dtype[Any]], int]]] = {
    "add": (np.add.reduce, lambda _: 0),
    "or": (np.bitwise_or.reduce, lambda _: 0),
    "xor": (np.bitwise_xor.reduce, lambda _: 0),
    "and": (np.bitwise_and.reduce, lambda t: int(np.iinfo(t).max) if t.kind == "u" else -1),
    "min": (np.minimum.reduce, lambda t: int(np.iinfo(t).max)),
    "max": (np.maximum.reduce, lambda t: int(np.iinfo(t).min)),
}


@instruction("redux", modifiers=f"sync {' '.join(REDUCE)}")
def reduce(machine: Machine, ins: Instruction) -> None:
    members = members_of(machine, ins.operands[2])
    function, neutral = REDUCE[ins.modifiers[1]]
    values = by_warp(machine, machine.read(ins.operands[1], ins.scalar))[:, None, :]
    kept = np.where(members, values, ins.scalar.compute.type(neutral(ins.scalar.compute)))
    machine.write(
        ins.operands[0],
        function(kept, axis=2, dtype=kept.dtype).ravel()
        if ins.modifiers[1] == "add"
        else function(kept, axis=2).ravel(),
        ins.scalar,
    )


@instruction("match", modifiers="any all sync")
def match(machine: Machine, ins: Instruction) -> None:
    members = members_of(machine, ins.operands[2])
    values = by_warp(machine, machine.bits(ins.operands[1], ins.scalar.size))
    same = (values[:, :, None] == values[:, None, :]) & members
    if ins.has("all"):
        everyone = (same == members).all(2)
        same = members & everyone[:, :, None]
    bits = (same.astype(np.uint32) << LANES.astype(np.uint32)).sum(axis=2, dtype=np.uint32)
    target = ins.operands[0]
    if isinstance(target, Pair):
        machine.write_bits(target.first, bits.ravel())
        machine.write_bits(target.second, (bits != 0).ravel())
    else:
        machine.write_bits(target, bits.ravel())


@instruction("elect", modifiers="sync")
def elect(machine: Machine, ins: Instruction) -> None:
    """The lowest member; hardware may choose another."""
    members = members_of(machine, ins.operands[1])
    leader = members.argmax(2)
    target = ins.operands[0]
    if not isinstance(target, Pair):
        raise PtxError(f"elect without a predicate: {ins.text}")
    machine.write_bits(target.first, leader.astype(np.uint32).ravel())
    machine.write_bits(target.second, (leader == LANES).ravel())


@instruction("bar", modifiers="warp sync", applies=lambda ins: ins.has("warp"))
def warp_barrier(machine: Machine, ins: Instruction) -> None:
    machine.converge(machine.bits(ins.operands[0], 4))
