"""Logic and Shift Instructions, and those of the integer ones that move bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.instructions.registry import instruction
from ptx.machine import Machine
from ptx.numbers import SCALARS, Array
from ptx.program import Instruction

U32 = SCALARS["u32"]
LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def words(machine: Machine, ins: Instruction, *which: int) -> list[Array]:
    return [machine.read(ins.operands[i], U32) for i in which]


@instruction("and", "or", "xor")
def logic(machine: Machine, ins: Instruction) -> None:
    function = LOGIC[ins.opcode]
    if ins.scalar.kind == "p":
        x, y = (machine.predicate(o) for o in ins.operands[1:])
        machine.write_bits(ins.operands[0], function(x, y))
        return
    x, y = (machine.bits(o, ins.scalar.size) for o in ins.operands[1:])
    machine.write_bits(ins.operands[0], function(x, y))


@instruction("not")
def invert(machine: Machine, ins: Instruction) -> None:
    if ins.scalar.kind == "p":
        machine.write_bits(ins.operands[0], ~machine.predicate(ins.operands[1]))
    else:
        machine.write_bits(ins.operands[0], ~machine.bits(ins.operands[1], ins.scalar.size))


@instruction("shl", "shr")
def shift(machine: Machine, ins: Instruction) -> None:
    """Amounts of the width and more leave zeros, or copies of the sign."""
    width = 8 * ins.scalar.size
    x = machine.read(ins.operands[1], ins.scalar)
    amount = machine.read(ins.operands[2], U32)
    inside = np.minimum(amount, width - 1).astype(x.dtype)
    if ins.opcode == "shr" and ins.scalar.kind == "s":
        value = x >> inside
    else:
        shifted = x << inside if ins.opcode == "shl" else x >> inside
        value = np.where(amount < width, shifted, np.zeros_like(x))
    machine.write(ins.operands[0], value, ins.scalar)


@instruction("shf", modifiers="l r wrap clamp")
def funnel(machine: Machine, ins: Instruction) -> None:
    low, high, amount = words(machine, ins, 1, 2, 3)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    amount = (amount & np.uint32(31) if ins.has("wrap") else np.minimum(amount, 32)).astype(
        np.uint64
    )
    shifted = both >> amount if ins.has("r") else both << amount >> np.uint64(32)
    machine.write(ins.operands[0], shifted.astype(np.uint32), U32)


def field_mask(length: Array) -> Array:
    return (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)


@instruction("bfi")
def insert_field(machine: Machine, ins: Instruction) -> None:
    size = ins.scalar.size
    x, y = (machine.bits(o, size).astype(np.uint64) for o in ins.operands[1:3])
    at, length = (machine.read(o, U32) & np.uint32(255) for o in ins.operands[3:])
    at = at.astype(np.uint64)
    mask = np.where(
        at < 8 * size, field_mask(length) << np.minimum(at, np.uint64(63)), np.uint64(0)
    )
    value = y & ~mask | x << np.minimum(at, np.uint64(63)) & mask
    machine.write_bits(ins.operands[0], value.astype(ins.scalar.storage))


@instruction("bfe")
def extract_field(machine: Machine, ins: Instruction) -> None:
    """The sign of a signed field is its highest bit that exists."""
    width = 8 * ins.scalar.size
    x = machine.bits(ins.operands[1], ins.scalar.size).astype(np.uint64)
    at, length = (machine.read(o, U32) & np.uint32(255) for o in ins.operands[2:])
    mask = field_mask(length)
    value = np.where(at < width, x >> np.minimum(at, 63).astype(np.uint64), np.uint64(0)) & mask
    if ins.scalar.kind == "s":
        top = np.minimum(at.astype(np.int64) + length - 1, width - 1).clip(0).astype(np.uint64)
        negative = (x >> top & np.uint64(1) != 0) & (length > 0)
        here = field_mask(
            np.minimum(length.astype(np.int64), (width - at.astype(np.int64)).clip(0))
        )
        value = np.where(negative, value | ~here, value)
    machine.write_bits(ins.operands[0], value.astype(ins.scalar.storage))


@instruction("lop3")
def lop3(machine: Machine, ins: Instruction) -> None:
    x, y, z, table = words(machine, ins, 1, 2, 3, 4)
    value = np.zeros(machine.n, np.uint32)
    for i in range(8):
        if int(table[0]) >> i & 1:
            value |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    machine.write(ins.operands[0], value, U32)


@instruction("prmt")
def permute_bytes(machine: Machine, ins: Instruction) -> None:
    low, high, selector = words(machine, ins, 1, 2, 3)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    value = np.zeros(machine.n, np.uint32)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (np.uint64(8) * (chosen & np.uint32(7)).astype(np.uint64)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        value |= np.where(chosen & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
    machine.write(ins.operands[0], value, U32)


def reversed_bits(x: Array) -> Array:
    octets = np.ascontiguousarray(x)[..., None].view(np.uint8)[..., ::-1]
    return np.packbits(np.unpackbits(octets, axis=-1, bitorder="little"), axis=-1).view(x.dtype)[
        ..., 0
    ]


def count_leading_zeros(x: Array) -> Array:
    width = 8 * x.dtype.itemsize
    length = np.zeros(x.shape, np.uint32)
    for i in range(width):
        length = np.where(x >> x.dtype.type(i) & x.dtype.type(1), np.uint32(i + 1), length)
    return np.uint32(width) - length


@instruction("brev")
def reverse(machine: Machine, ins: Instruction) -> None:
    machine.write_bits(
        ins.operands[0], reversed_bits(machine.bits(ins.operands[1], ins.scalar.size))
    )


@instruction("clz", "popc")
def count(machine: Machine, ins: Instruction) -> None:
    x = machine.bits(ins.operands[1], ins.scalar.size)
    value = count_leading_zeros(x) if ins.opcode == "clz" else np.bitwise_count(x).astype(np.uint32)
    machine.write(ins.operands[0], value, U32)


@instruction("bfind", modifiers="shiftamt")
def find_bit(machine: Machine, ins: Instruction) -> None:
    x = machine.bits(ins.operands[1], ins.scalar.size)
    if ins.scalar.kind == "s":
        x = np.where(x.view(ins.scalar.compute) < 0, ~x, x)
    zeros, none = count_leading_zeros(x), np.uint32(0xFFFFFFFF)
    value = zeros if ins.has("shiftamt") else np.uint32(8 * ins.scalar.size - 1) - zeros
    machine.write(ins.operands[0], np.where(x == 0, none, value), U32)
