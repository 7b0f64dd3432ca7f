"""Decode attention over packed keys and values beside torch's and llama.cpp's, on the CPU, in one run.

    python bench/cpu_peers.py --quick --json cpu_peers.json
    python bench/cpu_peers.py --context 4096,32768 --heads 32/8 --threads 1,all
    python bench/cpu_peers.py --quick --isa avx2

Every side gets the same tokens, and copies of its cache that together hold twice the last-level cache. Sides take
turns, so that whatever else the machine does meets all alike; times are medians and minima. GB/s are of the fastest
call, and so is the bandwidth of reading that they are compared with, which takes its turns too. llama.cpp takes part
where it is installed:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cpu_machine import describe
from cpu_peer_backends import packed_kind, packed_of, peers
from cpu_peer_build import Worker, build
from cpu_problem import CpuProblem, Data
from cpu_report import Measured
from cpu_timing import Side, available_bytes, last_level_cache_bytes, reader, take_turns
from rich.console import Console

from skvq_ext import ops
from skvq_ext.scheme import Scheme

RESERVE = 4 << 30  # bytes left free for others
SCHEMES = ("k2-v2", "k2-v1.5")
FULL = {
    **{"context": "512,4096,32768,131072", "heads": "32/8,32/32", "head_dim": "128,64,256"},
    "batch": "1,8",
}
QUICK = {"context": "32768", "heads": "32/8", "head_dim": "128", "batch": "1"}
QUICK_TOO = ({"context": "512"}, {"head_dim": "64"}, {"head_dim": "256"})  # what else is quick
QUICK_BUDGET = 70.0
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Wrong(ValueError):
    """An option that makes no sense; the text says why."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    problems: list[CpuProblem]  # without threads
    threads: list[int]
    schemes: list[Scheme]
    isas: list[str]
    rounds: int
    seconds: float
    budget: float | None
    working_set: int


def numbers(option: str, text: str, every: int = 0) -> list[int]:
    """The numbers of an axis, each once; every: what "all" means. Raises: Wrong."""
    found = []
    for word in text.split(","):
        if every and word.strip() == "all":
            found.append(every)
        elif word.strip().isdecimal() and int(word) > 0:
            found.append(int(word))
        else:
            more = ", or all" if every else ""
            raise Wrong(f"{option} {text}: {word!r} is no whole number from 1 on{more}")
    return list(dict.fromkeys(found))


def head_pairs(text: str) -> list[tuple[int, int]]:
    """Query heads and KV heads. Raises: Wrong."""
    pairs = []
    for word in text.split(","):
        pair = [int(part) if part.strip().isdecimal() else 0 for part in word.split("/")]
        if len(pair) != 2 or min(pair) < 1 or pair[0] % pair[1]:
            raise Wrong(
                f"--heads {text}: {word!r} is not query heads/KV heads, the first a multiple of the second, such as "
                "32/8"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def combinations(axes: dict[str, str]) -> list[CpuProblem]:
    """Every combination of the axes but threads, long contexts last. Raises: Wrong."""
    batches, dims = numbers("--batch", axes["batch"]), numbers("--head-dim", axes["head_dim"])
    contexts, pairs = numbers("--context", axes["context"]), head_pairs(axes["heads"])
    return [
        CpuProblem(batch, context, *pair, "bf16", head_dim)
        for batch in batches
        for context in contexts
        for pair in pairs
        for head_dim in dims
    ]


def plan_problems(quick: bool, given: dict[str, str]) -> list[CpuProblem]:
    """What the options ask for; a quick run adds shapes along those axes that are not given. Raises: Wrong."""
    axes = (QUICK if quick else FULL) | given
    found = combinations(axes)
    for more in QUICK_TOO if quick else ():
        if not more.keys() & given.keys():
            found += combinations(axes | more)
    return found


def check(settings: Settings, json_file: Path | None) -> None:
    """Raises: Wrong or ValueError for what would fail later, or for nothing to measure."""
    known = ops.build_info()["cpu_isas"].split(", ")
    for isa in settings.isas:
        if isa not in known:
            raise Wrong(f"--isa {isa}: this build has {', '.join(known)}")
        tried = subprocess.run(
            [sys.executable, "-c", "import skvq_ext"],
            env={**os.environ, "SKVQ_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode:
            raise Wrong(f"--isa {isa}: {(tried.stderr.splitlines() or ['no reason given'])[-1]}")
    for scheme in settings.schemes:
        packed = packed_of(scheme)
        for p in settings.problems:
            scheme.record_format(p.head_dim)
            if packed.tiles(p) < 1:
                raise Wrong(
                    f"--context {p.context}: nothing of so few tokens is packed; 256 or more"
                )
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise Wrong(f"--json {json_file}: there is no such folder")


def measure(
    p: CpuProblem, settings: Settings, workers: Sequence[Worker], read: Side
) -> Iterator[Measured]:
    """One problem with each number of threads."""
    p = replace(p, threads=settings.threads[0])
    sides, skipped = [read], dict[str, str]()
    for worker in workers:
        free = available_bytes() - RESERVE
        other = worker.build(p, settings.schemes, settings.working_set, free)
        sides, skipped = sides + other.sides, skipped | other.skipped
    kinds = [*(packed_kind(p, scheme) for scheme in settings.schemes), *peers(p)]
    free = available_bytes() - RESERVE
    here = build(kinds, Data(p), settings.working_set, free)
    sides, skipped = here.sides + sides, here.skipped | skipped
    for threads in settings.threads:
        torch.set_num_threads(threads)
        if threads != p.threads:
            sides = [replace(side, estimate=0.0) for side in sides]
        sides = [replace(side, seconds=[]) for side in sides]
        take_turns(sides, settings.rounds, settings.seconds, threads)
        yield Measured(replace(p, threads=threads), sides, skipped)


def start_report(settings: Settings) -> dict[str, Any]:
    """All but the results."""
    machine = describe()
    console.print(
        f"{machine['cpu']}, {machine['cores_usable']} cores; kernels for {machine['isa']}, torch {machine['torch']}, "
        f"llama-cpp-python {machine['llama_cpp_python']}"
    )
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": {
            **{"schemes": [str(scheme) for scheme in settings.schemes], "rounds": settings.rounds},
            **{"seconds": settings.seconds, "budget": settings.budget},
            **{"working_set_bytes": settings.working_set, "our_rows_and_queries": "bf16"},
        },
        **{"rows": [], "ratios": {}, "ratios_of_minima": {}},
    }


def run(settings: Settings, json_file: Path | None) -> None:
    """Measures all problems and writes what there is after each."""
    began = time.monotonic()
    report, read = start_report(settings), Side("read", *reader())
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(isa))) for isa in settings.isas]
        for p in settings.problems:
            over = settings.budget is not None and time.monotonic() - began > settings.budget
            if over:
                text = f"the budget of {settings.budget:.0f} s is used up"
                report["rows"].append({"problem": p.key, "skipped": text})
                console.print(f"{p.key}: {text}")
            for measured in () if over else measure(p, settings, workers, read):
                console.print(measured.table())
                for name, why in measured.skipped.items():
                    console.print(f"[dim]{name}: {why}[/dim]")
                report["rows"] += measured.rows()
                report["ratios"] |= measured.ratios()
                report["ratios_of_minima"] |= measured.ratios("fastest")
            if json_file is not None:
                json_file.write_text(json.dumps(report, indent=1) + "\n")


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="One thread, 32k tokens; minutes.")
    ] = False,
    scheme: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    context: Annotated[str, typer.Option(help="Tokens, such as 4096,32768.")] = "",
    heads: Annotated[str, typer.Option(help="Query heads/KV heads, such as 32/8,32/32.")] = "",
    head_dim: Annotated[str, typer.Option(help="Channels of a head, such as 64,128.")] = "",
    batch: Annotated[str, typer.Option(help="Sequences, such as 1,8.")] = "",
    threads: Annotated[str, typer.Option(help="Such as 1,2,all.")] = "",
    isa: Annotated[str, typer.Option(help="Our kernels for others too, such as avx2.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 15,
    seconds: Annotated[float, typer.Option(help="After which a shape begins no round.")] = 10,
    budget: Annotated[float | None, typer.Option(help="Seconds for all shapes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also as JSON.")] = None,
) -> None:
    """Measures every side on every shape."""
    axes = {"context": context, "heads": heads, "head_dim": head_dim, "batch": batch}
    given = {name: text for name, text in axes.items() if text}
    cores = len(os.sched_getaffinity(0))
    if budget is None and quick:
        budget = QUICK_BUDGET
    try:
        settings = Settings(
            problems=plan_problems(quick, given),
            threads=numbers("--threads", threads or ("1" if quick else "1,all"), cores),
            schemes=[Scheme.parse(text) for text in scheme or SCHEMES],
            isas=[word.strip() for word in isa.split(",") if word.strip()],
            rounds=rounds,
            seconds=seconds,
            budget=budget,
            working_set=2 * last_level_cache_bytes(),
        )
        check(settings, json_file)
    except ValueError as error:
        print(f"cpu_peers: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    run(settings, json_file)


if __name__ == "__main__":
    typer.run(main)
