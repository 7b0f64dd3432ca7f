"""Times on a CPU that others use too: sides take turns, each on copies of its cache that no cache level can hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], Tensor]
Run = Callable[[int, int], list[float]]

TURN_SECONDS = 0.02  # that a side calls for before the next one's turn
MOST_CALLS = 20  # in a turn
FEWEST_ROUNDS = 3
# A formulation this many times slower than its best rival is not called again: at once, and after FEWEST_ROUNDS.
HOPELESS, SLOWER = 3.0, 2.0
SHORT = 0.1  # seconds of a call, below which the first is not the measure of the next
PAUSE = 0.01  # seconds in which threads of an OpenMP pool that wait for more work fall asleep


def last_level_cache_bytes() -> int:
    """32 MiB where the system does not say; as in bench/memory.h."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        largest = max(largest, int(text.rstrip("KM") or 0) * unit)
    return largest or 32 << 20


def available_bytes() -> int:
    """Memory that can be allocated without swapping, or 4 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return next(found, 4 << 30)


def rotate(calls: Sequence[Call]) -> Run:
    """Turns that go on with the next of `calls`, which do the same on different buffers.

    Returns: a function of numbers of calls without and with the clock, which gives the seconds of the latter.
    """
    position = 0

    def run(untimed: int, timed: int) -> list[float]:
        nonlocal position
        seconds = []
        for index in range(untimed + timed):
            call = calls[position % len(calls)]
            position += 1
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if index >= untimed:
                seconds.append(elapsed)
        return seconds

    return run


def reader() -> tuple[Run, int]:
    """Three ways of torch to reduce a buffer of eight times the last-level cache, the fastest of which says how fast
    memory can be read, and the bytes that each reads."""
    floats = torch.ones(2 * last_level_cache_bytes())
    rows, words = floats.view(-1, 4096), floats.view(torch.int64)
    calls: list[Call] = [lambda: torch.mv(rows, rows[0]), lambda: rows.sum(1), words.amax]
    return rotate(calls), floats.nbytes


@dataclass
class Side:
    """One way to compute a problem.

    estimate: seconds of a call, 0 where there was none. error: of its output, relative. scheme: of ours. rivals: name
    of the sides of which only the fastest counts, "" for a side that always does.
    """

    name: str
    run: Run
    bytes_moved: int
    copies: int = 1
    estimate: float = 0.0
    error: float = 0.0
    scheme: str = ""
    rivals: str = ""
    seconds: list[float] = field(default_factory=list)

    def again(self) -> None:
        """A better estimate of what was quick or never called: a first call also makes what later ones find."""
        if not self.estimate:
            self.estimate = self.run(0, 1)[0]
        if self.estimate < SHORT:
            self.estimate = min(self.run(1, 1 if self.estimate > TURN_SECONDS else 5))

    def turn(self) -> None:
        """A few calls; the first of several is not timed, because it finds the caches filled by others."""
        timed = min(MOST_CALLS, int(TURN_SECONDS / self.fastest))
        self.seconds += self.run(int(timed > 1), max(1, timed))

    @property
    def mode(self) -> str:
        """What of the name of ours is not its scheme: "", "_exact", "_avx2"."""
        return self.name.removeprefix(self.scheme)

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds) if self.seconds else self.estimate

    @property
    def fastest(self) -> float:
        """Seconds."""
        return min(self.seconds, default=self.estimate)


def still_in(sides: Sequence[Side], limit: float) -> list[Side]:
    """Without those that are more than `limit` times slower than their fastest rival."""
    best: dict[str, float] = {}
    for side in sides:
        best[side.rivals] = min(best.get(side.rivals, side.median), side.median)
    return [s for s in sides if not s.rivals or s.median <= limit * best[s.rivals]]


def take_turns(sides: Sequence[Side], rounds: int, seconds: float, threads: int) -> None:
    """Fills the samples of all sides: every round each has its turn, and every round another one begins.

    seconds: after which no round begins, FEWEST_ROUNDS excepted. threads: of every call.
    """
    for side in sides:
        side.again()
    active = still_in(sides, HOPELESS)
    began = time.monotonic()
    for index in range(rounds):
        if index == FEWEST_ROUNDS:
            active = still_in(active, SLOWER)
        if index >= FEWEST_ROUNDS and time.monotonic() - began > seconds:
            break
        start = index % max(1, len(active))
        for side in active[start:] + active[:start]:
            if threads > 1:
                time.sleep(PAUSE)
            side.turn()
