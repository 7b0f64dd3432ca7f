"""Sides that are ready to be timed: caches filled with the same tokens, copied, and what is read from them checked.

A reference in float32 reads the tokens while the caches take them, so that every side's output is known to be
attention over them. Sides that need another instruction set live in a process of their own, a `Worker`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from cpu_peer_backends import Cache, Kind, packed_kind
from cpu_problem import CpuProblem, Data, Reference
from cpu_timing import Side, rotate

from skvq_ext import ops
from skvq_ext.scheme import Scheme

MOST_COPIES = 256


@dataclass
class Built:
    """Sides that are ready, and why kinds or sides are not there."""

    sides: list[Side] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class Unavailable(RuntimeError):
    """Why somebody does not take part, in words that need no more."""


def reason(error: Exception) -> str:
    """Why somebody does not take part, in one line."""
    text = (str(error).splitlines() or [""])[0]
    plain = isinstance(error, ImportError | Unavailable)
    return text if plain else f"{type(error).__name__}: {text}"


def plan_copies(
    kinds: Sequence[Kind], working_set: int, free: int
) -> tuple[dict[str, int], dict[str, str], int]:
    """Copies of each kind that hold a working set together, first come first served.

    Returns: copies by name, why others have none, and bytes that are left.
    """
    copies, skipped = {}, {}
    for kind in kinds:
        if kind.held > free:
            skipped[kind.name] = _too_large(kind.held, free)
            continue
        wanted = min(-(-working_set // kind.moved), MOST_COPIES)
        copies[kind.name] = max(1, min(wanted, free // kind.held))
        free -= copies[kind.name] * kind.held
    return copies, skipped, free


def _too_large(needed: int, free: int) -> str:
    return f"needs {needed / 1e9:.1f} GB of memory and {max(free, 0) / 1e9:.1f} GB are free"


def build(kinds: Sequence[Kind], data: Data, working_set: int, free: int) -> Built:
    """Fills a cache of every kind, copies it and checks what is read from it.

    working_set: bytes that the copies of a kind hold at least together. free: bytes that all may take.
    """
    copies, skipped, left = plan_copies(kinds, working_set, free)
    built, caches = Built(skipped=skipped), dict[str, Cache]()
    present = [kind for kind in kinds if kind.name in copies]

    def attempt(kind: Kind, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            built.skipped[kind.name] = reason(error)
            caches.pop(kind.name, None)

    def make(kind: Kind) -> None:
        caches[kind.name] = kind.make(data)

    def add_sides(kind: Kind) -> None:
        first = caches[kind.name]
        copied = [first, *(first.copy() for _ in range(copies[kind.name] - 1))]
        built.sides += _sides(kind, copied, reference, left, built.skipped)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for kind in present:
        attempt(kind, partial(make, kind))
    reference = Reference(data)
    for start, k, v in data.chunks():
        reference.add(k, v)
        for kind in [kind for kind in present if kind.name in caches]:
            attempt(kind, partial(caches[kind.name].fill, start, k, v))
    torch.set_num_threads(data.p.threads)
    for kind in [kind for kind in present if kind.name in caches]:
        attempt(kind, partial(add_sides, kind))
    return built


def _sides(
    kind: Kind, caches: list[Any], reference: Reference, left: int, skipped: dict[str, str]
) -> list[Side]:
    sides = []
    for name, way in kind.ways.items():
        if way.scratch > left:
            skipped[name] = _too_large(way.scratch, left)
            continue
        start = time.perf_counter()
        out = way.call(caches[0])
        sizes = kind.moved, len(caches), time.perf_counter() - start
        error = reference.error(out)
        if not error <= kind.most_error:
            skipped[name] = (
                f"its output is off by {error:.2g} and is no attention over these tokens"
            )
            continue
        run = rotate([partial(way.call, cache) for cache in caches])
        sides.append(Side(name, run, *sizes, error, kind.scheme, kind.rivals))
    return sides


class Worker:
    """A process whose kernels are those of one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        before = os.environ.get("SKVQ_CPU_ISA")
        os.environ["SKVQ_CPU_ISA"] = isa
        try:
            self._process.start()
        finally:
            if before is None:
                del os.environ["SKVQ_CPU_ISA"]
            else:
                os.environ["SKVQ_CPU_ISA"] = before
        theirs.close()

    def build(self, p: CpuProblem, schemes: Sequence[Scheme], working_set: int, free: int) -> Built:
        """Sides of these schemes, whose turns the process takes; what was built before goes."""
        suffix = f"_{self.isa}"
        try:
            sides, skipped = self._ask(p, tuple(schemes), suffix, working_set, free)
        except Exception as error:
            return Built(skipped={self.isa: reason(error)})
        made = [Side(side[0], partial(self._turn, side[0]), *side[1:]) for side in sides]
        return Built(made, skipped)

    def _turn(self, name: str, untimed: int, timed: int) -> list[float]:
        seconds: list[float] = self._ask(name, untimed, timed, torch.get_num_threads())
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            raise Unavailable(f"the process for {self.isa} ended, exit status {code}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection) -> None:
    """Answers a `Worker` until it closes the pipe."""
    built = Built()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(request[0], str):
                name, untimed, timed, threads = request
                torch.set_num_threads(threads)
                side = next(side for side in built.sides if side.name == name)
                pipe.send(side.run(untimed, timed))
            else:
                built = Built()  # frees the caches of the last problem first
                built = _build_ours(*request)
                sides = [
                    (s.name, s.bytes_moved, s.copies, s.estimate, s.error, s.scheme)
                    for s in built.sides
                ]
                pipe.send((sides, built.skipped))
        except Exception as error:
            pipe.send(Unavailable(reason(error)))


def _build_ours(
    p: CpuProblem, schemes: Sequence[Scheme], suffix: str, working_set: int, free: int
) -> Built:
    used = ops.build_info()["cpu_isa"]
    if suffix != f"_{used}":
        raise Unavailable(f"the kernels in use are those of {used}")
    kinds = [packed_kind(p, scheme, suffix) for scheme in schemes]
    return build(kinds, Data(p), working_set, free)
