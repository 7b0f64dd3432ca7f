"""Copies that were issued and have not landed, and the barriers that count them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptx.errors import PtxError

if TYPE_CHECKING:
    from ptx.machine import Machine

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """One cp.async of several threads: offsets in shared and global memory, and the group of each."""

    threads: Integers
    target: Integers
    source: Integers
    source_bytes: Integers
    size: int
    group: Integers

    def part(self, chosen: NDArray[np.bool_]) -> Copies:
        arrays = (self.threads, self.target, self.source, self.source_bytes)
        return Copies(*(a[chosen] for a in arrays), self.size, self.group[chosen])

    def land(self, machine: Machine) -> None:
        memory = machine.launch.memory.data.bytes
        for i in range(self.size):
            read = i < self.source_bytes
            machine.shared.bytes[self.target + i] = np.where(
                read, memory[np.where(read, self.source + i, 0)], 0
            )


@dataclass(frozen=True)
class BulkCopy:
    target: int
    source: int
    size: int


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    arrivals: int
    missing: int
    expected_bytes: int = 0
    phase: int = 0
    under_way: list[BulkCopy] = field(default_factory=list)

    def arrive(self) -> None:
        if self.missing == 0:
            raise PtxError(f"more than {self.arrivals} arrivals in one phase of an mbarrier")
        self.missing -= 1
        self.advance()

    def deliver(self, machine: Machine) -> None:
        """Somebody waits for this phase: all its copies land."""
        memory = machine.launch.memory.data.bytes
        for copy in self.under_way:
            machine.shared.bytes[copy.target : copy.target + copy.size] = memory[
                copy.source : copy.source + copy.size
            ]
            self.expected_bytes -= copy.size
        self.under_way.clear()
        self.advance()

    def advance(self) -> None:
        if self.missing == 0 and self.expected_bytes == 0:
            self.missing = self.arrivals
            self.phase += 1


@dataclass
class Transfers:
    """What the threads of a machine have under way."""

    committed: Integers
    pending: list[Copies] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)

    def land(self, machine: Machine, due: Integers) -> None:
        """Copies of groups up to `due`, a number a thread, land."""
        kept = []
        for copies in self.pending:
            ready = copies.group <= due[copies.threads]
            if ready.any():
                copies.part(ready).land(machine)
            if not ready.all():
                kept.append(copies.part(~ready))
        self.pending = kept

    def check_finished(self, machine: Machine) -> None:
        """A thread may not return while its copies are under way: nobody can know when they land."""
        for copies in self.pending:
            name = machine.thread_name(int(copies.threads[0]))
            raise PtxError(f"a thread returned before it waited for its copies: {name}")
        if any(barrier.under_way for barrier in self.barriers.values()):
            raise PtxError("a block returned before anybody waited for a bulk copy")
