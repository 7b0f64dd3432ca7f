"""mma, ldmatrix and movmatrix, with the fragments as the PTX ISA draws them.

"Warp Level Matrix Multiply-Accumulate Instructions": with groupID = lane / 4 and threadID_in_group = lane % 4,

    A (16 x 16): row = groupID, + 8 in registers 1 and 3; column = 2 threadID_in_group + {0, 1}, + 8 in registers 2, 3
    B (16 x 8):  row = 2 threadID_in_group + {0, 1}, + 8 in register 1; column = groupID
    C (16 x 8):  row = groupID, + 8 in registers 2 and 3; column = 2 threadID_in_group + {0, 1}
"""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction
from ptx.machine import WARP, Machine
from ptx.numbers import SCALARS, Array, Scalar, unpack
from ptx.program import Instruction, Operand

ALL_LANES = np.full(1, 0xFFFFFFFF, np.uint32)
F32, B32 = SCALARS["f32"], SCALARS["b32"]
LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4


def pairs(machine: Machine, operand: Operand, scalar: Scalar) -> Array:
    """[warps, lane, 2] of one register of halves, as float64."""
    bits = machine.spread(machine.bits(operand, 4))
    return unpack(bits, scalar).astype(np.float64).reshape(-1, WARP, 2)


@instruction("mma", modifiers="sync aligned m16n8k16 row col")
def multiply(machine: Machine, ins: Instruction) -> None:
    """Sums are exact and rounded once; tensor cores round on the way, so results are compared with a tolerance."""
    machine.converge(ALL_LANES)
    names = tuple(s.name for s in ins.scalars)
    if names not in (("f32", "f16", "f16", "f32"), ("f32", "bf16", "bf16", "f32")):
        raise PtxError(f"these types of matrices are not known here: {ins.text}")
    halves = SCALARS[f"{names[1]}x2"]
    d, a, b, c = (machine.items(o) for o in ins.operands)
    warps = machine.n // WARP
    left, right = np.empty((warps, 16, 16)), np.empty((warps, 16, 8))
    total = np.empty((warps, 16, 8))
    for reg, operand in enumerate(a):
        values = pairs(machine, operand, halves)
        for half in range(2):
            left[:, GROUP + 8 * (reg % 2), 2 * IN_GROUP + half + 8 * (reg // 2)] = values[..., half]
    for reg, operand in enumerate(b):
        values = pairs(machine, operand, halves)
        for half in range(2):
            right[:, 2 * IN_GROUP + half + 8 * reg, GROUP] = values[..., half]
    rows = [GROUP + 8 * (reg // 2) for reg in range(4)]
    columns = [2 * IN_GROUP + reg % 2 for reg in range(4)]
    for reg, operand in enumerate(c):
        values = machine.spread(machine.read(operand, F32))
        total[:, rows[reg], columns[reg]] = values.reshape(-1, WARP)
    total += left @ right
    for reg, operand in enumerate(d):
        machine.write(operand, total[:, rows[reg], columns[reg]].ravel(), F32)


def fragment(matrix: Array, transposed: bool) -> Array:
    """Registers [warps, lane] of 8 x 8 matrices [warps, row, column] of 16-bit elements."""
    if transposed:
        matrix = matrix.transpose(0, 2, 1)
    low, high = (matrix[:, GROUP, 2 * IN_GROUP + half].astype(np.uint32) for half in range(2))
    return low | high << np.uint32(16)


@instruction("movmatrix", modifiers="sync aligned m8n8 trans")
def transpose(machine: Machine, ins: Instruction) -> None:
    machine.converge(ALL_LANES)
    bits = machine.spread(machine.bits(ins.operands[1], 4)).reshape(-1, WARP)
    matrix = np.empty((len(bits), 8, 8), np.uint16)
    for half in range(2):
        matrix[:, GROUP, 2 * IN_GROUP + half] = bits >> np.uint32(16 * half) & np.uint32(0xFFFF)
    machine.write_bits(ins.operands[0], fragment(matrix, transposed=True).ravel())


@instruction("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def load(machine: Machine, ins: Instruction) -> None:
    """Lane 8 i + j names the 16 bytes of row j of matrix i; lanes beyond the last matrix name nothing."""
    machine.converge(ALL_LANES)
    targets = machine.items(ins.operands[0])
    address = machine.address(ins.operands[1])
    naming = machine.active & (machine.lane < 8 * len(targets))
    rows = np.empty((machine.n, 8), np.uint16)
    for backing, index, who in machine.locate("shared", address, 16, write=False, who=naming):
        start = np.where(who, index, 0)
        for element in range(8):
            rows[:, element] = backing.gather(start + 2 * element, 2)
    by_warp = rows.reshape(-1, WARP, 8)
    for i, target in enumerate(targets):
        matrix = by_warp[:, 8 * i : 8 * i + 8]
        machine.write_bits(target, fragment(matrix, ins.has("trans")).ravel())
