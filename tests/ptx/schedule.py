"""Who runs next.

Threads that stand at the same instruction form a group. The group with the lowest place in the code goes first, so
that groups which parted meet again behind the branch. A group stops at a barrier of its block, or at an instruction
that needs lanes which are elsewhere, or at a wait for copies that others still have to issue; when all have stopped,
complete barriers open and the others try again. If nothing moves then, that is a deadlock and an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator

from ptx.errors import PtxError
from ptx.instructions import executor
from ptx.machine import WARP, Machine
from ptx.numbers import Array
from ptx.program import Immediate, Instruction, Label

Group = tuple[int, Array]
EXITS = ("ret", "exit")


def merged(groups: list[Group]) -> list[Group]:
    """One group a place, lowest place first."""
    places: dict[int, Array] = {}
    for pc, threads in groups:
        places[pc] = places[pc] | threads if pc in places else threads
    return sorted(places.items(), key=lambda group: group[0])


class Schedule:
    """Runs a machine to the end. With a seed, the warps of a block run one after the other, each as far as it gets
    alone, in an order that is drawn anew after each barrier: what lacks a barrier then reads what is not there."""

    def __init__(self, machine: Machine, seed: int | None) -> None:
        self.machine = machine
        self.code = machine.launch.kernel.code
        self.generator: Generator | None = None if seed is None else np.random.default_rng(seed)
        self.waiting: list[Group] = []  # at barriers of their block
        self.parked: list[Group] = []  # will try the same instruction again
        self.steps = 0  # instructions executed for at least one thread
        self.at = 0  # instruction under way, for reports

    def run(self) -> None:
        ready: list[Group] = [(0, self.machine.everyone)]
        before = -1
        with np.errstate(all="ignore"):
            while ready:
                if before == self.steps:
                    self.deadlock()
                before = self.steps
                for warps in self.turns():
                    mine = [(pc, self.whole(threads & warps)) for pc, threads in ready]
                    self.run_groups([group for group in mine if group[1].any()])
                ready = self.parked + self.open_barriers()
                self.parked = []
            if self.waiting:
                self.deadlock()

    def turns(self) -> Iterator[Array]:
        if self.generator is None:
            yield self.machine.everyone
            return
        for warp in self.generator.permutation(self.machine.threads // WARP):
            yield self.machine.warp_in_block == warp

    def whole(self, threads: Array) -> Array:
        """The machine's own mask of everyone where it is that, so that it can be told by identity."""
        return self.machine.everyone if threads.all() else threads

    def run_groups(self, groups: list[Group]) -> None:
        while groups:
            (pc, threads), *groups = merged(groups)
            if pc == len(self.code):
                raise PtxError("threads ran past the end of the kernel")
            until = groups[0][0] if groups else len(self.code)
            groups += self.run_group(pc, self.whole(threads), until)

    def run_group(self, pc: int, threads: Array, until: int) -> list[Group]:
        """Runs one group until it parts, stops, or reaches the place of another; what is left of it."""
        while pc < until:
            instruction, self.at = self.code[pc], pc
            chosen = threads
            if instruction.predicate is not None:
                chosen = self.whole(threads & self.machine.predicate(instruction.predicate))
                if not chosen.any():
                    pc += 1
                    self.steps += 1
                    continue
            if instruction.opcode in ("bra", "brx"):
                self.steps += 1
                return self.branch(instruction, pc, threads, chosen)
            if instruction.opcode in EXITS:
                self.steps += 1
                rest = threads & ~chosen
                return [(pc + 1, rest)] if rest.any() else []
            if instruction.opcode in ("bar", "barrier") and "warp" not in instruction.modifiers:
                self.arrive(instruction, pc, chosen)
                threads = threads & ~chosen
            else:
                threads = self.execute(instruction, pc, threads, chosen)
            if not threads.any():
                return []
            pc += 1
        return [(pc, threads)]

    def execute(self, instruction: Instruction, pc: int, threads: Array, chosen: Array) -> Array:
        """Executes for the chosen threads; the threads that may go on."""
        machine = self.machine
        machine.active, machine.left_behind = chosen, None
        if instruction.execute is None:
            instruction.execute = executor(instruction)
        instruction.execute(machine, instruction)
        if machine.left_behind is None:
            self.steps += 1
            return threads
        left = machine.left_behind
        self.parked.append((pc, left))
        self.steps += bool((chosen & ~left).any())
        return threads & ~left

    def branch(
        self, instruction: Instruction, pc: int, threads: Array, chosen: Array
    ) -> list[Group]:
        label = instruction.operands[-1]
        assert isinstance(label, Label)
        rest = threads & ~chosen
        groups: list[Group] = [(pc + 1, rest)] if rest.any() else []
        if instruction.opcode == "bra":
            return [*groups, (label.targets[0], chosen)]
        index = self.machine.spread(self.machine.bits(instruction.operands[0], 4))
        if (index[chosen] >= len(label.targets)).any():
            raise PtxError(f"brx.idx beyond its table of {len(label.targets)} labels")
        taken = [(t, chosen & (index == i)) for i, t in enumerate(label.targets)]
        return [*groups, *((t, m) for t, m in taken if m.any())]

    # ---- Barriers of a block ----

    def arrive(self, instruction: Instruction, pc: int, chosen: Array) -> None:
        if "sync" not in instruction.modifiers or instruction.scalars:
            raise PtxError(f"this kind of barrier is not known here: {instruction.text}")
        for operand in instruction.operands:
            if not isinstance(operand, Immediate):
                raise PtxError(
                    f"a barrier with a number from a register is not known here: {instruction.text}"
                )
        self.waiting.append((pc, chosen))
        self.steps += 1

    def open_barriers(self) -> list[Group]:
        """Groups that may go on behind a barrier because all that it waits for have come."""
        machine = self.machine
        self.waiting = merged(self.waiting)
        opened: list[Group] = []
        kept: list[Group] = []
        for pc, threads in self.waiting:
            operands = self.code[pc].operands
            count = operands[1].bits if len(operands) > 1 else machine.threads  # type: ignore[union-attr]
            arrived = threads.reshape(-1, machine.threads).sum(1)
            complete = np.repeat(arrived == count, machine.threads)
            if (threads & complete).any():
                opened.append((pc + 1, threads & complete))
            if (threads & ~complete).any():
                kept.append((pc, threads & ~complete))
        self.waiting = kept
        return opened

    def deadlock(self) -> None:
        """Says who waits where: threads of one block in different barriers, or for others that are gone."""
        lines = []
        for pc, threads in merged([*self.waiting, *self.parked]):
            first = int(np.argmax(threads))
            place = describe(self.code[pc])
            lines.append(
                f"  {int(threads.sum())} threads at {place}, first {self.machine.thread_name(first)}"
            )
        raise PtxError("threads wait for others that never come:\n" + "\n".join(lines))


def describe(instruction: Instruction) -> str:
    where = f" ({instruction.source})" if instruction.source else ""
    return f"PTX line {instruction.line}: {instruction.text}{where}"
