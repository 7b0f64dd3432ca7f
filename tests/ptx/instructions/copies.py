"""Asynchronous copies and mbarrier.

From issue to wait the destination holds garbage, and the bytes land only when somebody waits for them: a wait that is
missing and a buffer that is filled again too soon both show in the numbers.
"""

from __future__ import annotations

import numpy as np

from ptx.errors import PtxError
from ptx.instructions.registry import instruction
from ptx.machine import Machine
from ptx.memory import GARBAGE, GLOBAL_WINDOW, ORIGIN
from ptx.numbers import SCALARS, Array
from ptx.program import Immediate, Instruction
from ptx.transfers import Barrier, BulkCopy, Copies

U32 = SCALARS["u32"]
SHARED = "shared shared::cta"


def is_bulk(ins: Instruction) -> bool:
    return ins.has("bulk")


@instruction(
    "cp",
    modifiers=f"async ca cg global L2::64B L2::128B L2::256B {SHARED}",
    applies=lambda ins: ins.has("global") and not is_bulk(ins),
)
def copy(machine: Machine, ins: Instruction) -> None:
    size = int(np.max(machine.bits(ins.operands[2], 4)))
    source_bytes = np.full(machine.n, size, np.int64)
    if len(ins.operands) > 3:
        source_bytes = machine.spread(machine.bits(ins.operands[3], 4)).astype(np.int64)
    machine.check(
        machine.active & (source_bytes > size), "source size", source_bytes, f"is more than {size}"
    )
    to, source = machine.address(ins.operands[0]), machine.address(ins.operands[1])
    ((_, target, _),) = machine.locate("shared", to, size, write=True)
    machine.check(machine.active & (source % size != 0), "source", source, "is not aligned")
    start = source - GLOBAL_WINDOW
    reading = machine.active & (source_bytes > 0)
    wrong = machine.launch.memory.outside(start, np.maximum(source_bytes, 1), write=False)
    machine.check(reading & wrong, "source", source, "is out of bounds")
    who = np.flatnonzero(machine.active)
    for offset in range(size):
        machine.shared.bytes[target[who] + offset] = GARBAGE
    group = machine.transfers.committed[who] + 1
    machine.transfers.pending.append(
        Copies(who, target[who], start[who], source_bytes[who], size, group)
    )


@instruction("cp", modifiers="async commit_group", applies=lambda ins: ins.has("commit_group"))
def commit(machine: Machine, ins: Instruction) -> None:
    if ins.has("bulk"):
        raise PtxError(f"groups of bulk copies are not known here: {ins.text}")
    machine.transfers.committed += machine.active


@instruction(
    "cp",
    modifiers="async wait_group wait_all",
    applies=lambda ins: ins.has("wait_group") or ins.has("wait_all"),
)
def wait(machine: Machine, ins: Instruction) -> None:
    """wait_group n lets the last n groups be under way; wait_all waits for copies outside a group too."""
    if ins.has("wait_all"):
        due = machine.transfers.committed + 1
    else:
        assert isinstance(ins.operands[0], Immediate)
        due = machine.transfers.committed - ins.operands[0].bits
    machine.transfers.land(machine, np.where(machine.active, due, 0))


# ---- mbarrier ----


def barrier_keys(machine: Machine, ins: Instruction, operand: int) -> Array:
    """Offset of each thread's barrier in the shared memory of all blocks."""
    address = machine.address(ins.operands[operand])
    ((_, index, _),) = machine.locate("shared", address, 8, write=True)
    return index


def known_barrier(machine: Machine, key: int) -> Barrier:
    barrier = machine.transfers.barriers.get(key)
    if barrier is None:
        raise PtxError(
            f"no mbarrier was initialised at shared address {key % machine.shared_stride + ORIGIN:#x}"
        )
    return barrier


@instruction("mbarrier", modifiers=f"init {SHARED}", applies=lambda ins: ins.has("init"))
def init(machine: Machine, ins: Instruction) -> None:
    keys, count = barrier_keys(machine, ins, 0), machine.bits(ins.operands[1], 4)
    count = machine.spread(count)
    for i in np.flatnonzero(machine.active):
        machine.transfers.barriers[int(keys[i])] = Barrier(int(count[i]), int(count[i]))


@instruction(
    "mbarrier",
    modifiers=f"arrive expect_tx release cta {SHARED}",
    applies=lambda ins: ins.has("arrive"),
)
def arrive(machine: Machine, ins: Instruction) -> None:
    if ins.operands[0] is not None:
        raise PtxError(f"the state that an arrival returns is not known here: {ins.text}")
    keys = barrier_keys(machine, ins, 1)
    expected = np.zeros(machine.n, np.int64)
    if ins.has("expect_tx"):
        expected = machine.spread(machine.bits(ins.operands[2], 4)).astype(np.int64)
    for i in np.flatnonzero(machine.active):
        barrier = known_barrier(machine, int(keys[i]))
        barrier.expected_bytes += int(expected[i])
        barrier.arrive()


@instruction(
    "mbarrier",
    modifiers=f"try_wait parity acquire cta {SHARED}",
    applies=lambda ins: ins.has("try_wait") and ins.has("parity"),
)
def try_wait(machine: Machine, ins: Instruction) -> None:
    """Blocks until the phase is over, as it may: the loop around it then ends at its first turn."""
    keys = barrier_keys(machine, ins, 1)
    parity = machine.spread(machine.bits(ins.operands[2], 4)) & 1
    done = np.zeros(machine.n, np.bool_)
    for key in np.unique(keys[machine.active]):
        barrier = known_barrier(machine, int(key))
        here = machine.active & (keys == key)
        for wanted in np.unique(parity[here]):
            if barrier.phase & 1 == wanted:
                barrier.deliver(machine)
            if barrier.phase & 1 != wanted:
                done |= here & (parity == wanted)
    blocked = machine.active & ~done
    if blocked.any():
        machine.left_behind = blocked
        machine.active = machine.active & done
    machine.write_bits(ins.operands[0], done)


@instruction(
    "cp",
    modifiers="async bulk shared::cluster shared::cta global mbarrier::complete_tx::bytes",
    applies=lambda ins: is_bulk(ins) and ins.has("mbarrier::complete_tx::bytes"),
)
def copy_bulk(machine: Machine, ins: Instruction) -> None:
    to, source = machine.address(ins.operands[0]), machine.address(ins.operands[1])
    size = machine.spread(machine.bits(ins.operands[2], 4)).astype(np.int64)
    keys = barrier_keys(machine, ins, 3)
    for what, value in (("destination", to), ("source", source), ("size", size)):
        machine.check(machine.active & (value % 16 != 0), what, value, "is no multiple of 16")
    offset = to - ORIGIN
    outside = (offset < 0) | (offset + size > machine.shared_size)
    machine.check(machine.active & outside, "destination", to, "is out of bounds")
    for i in np.flatnonzero(machine.active):
        target = int(offset[i]) + int(machine.block_of[i]) * machine.shared_stride
        start, count = int(source[i]) - GLOBAL_WINDOW, int(size[i])
        if not machine.launch.memory.check_range(start, count, write=False):
            raise PtxError(
                f"{count} bytes at {int(source[i]):#x} are out of bounds: {machine.thread_name(i)}"
            )
        machine.shared.bytes[target : target + count] = GARBAGE
        known_barrier(machine, int(keys[i])).under_way.append(BulkCopy(target, start, count))
