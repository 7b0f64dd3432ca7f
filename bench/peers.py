"""Decode attention over packed keys and values beside full precision by others, on one GPU.

    python bench/peers.py --json peers.json
    python bench/peers.py --quick

Every backend gets the same shapes, buffers that rotate so that nothing is found in the L2, CUDA graphs and events.
Figures are the fastest pass; GB/s count the bytes that the format makes necessary, and their percentage is of a copy
measured in the same run. What cannot run, or does not fit into memory, says why.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_backends import Backend, FullPrecision, Problem, backends
from rich import box
from rich.console import Console
from rich.table import Table
from torch_timing import copy_bandwidth, time_calls

RESERVE = 2 << 30  # bytes left free for workspaces and graphs
MOST_COPIES = 256
QUICK = {"batch": "1,16", "context": "4096,32768", "heads": "32/8", "dtype": "bf16"}
FULL = {
    "batch": "1,4,16",
    "context": "4096,32768,131072",
    "heads": "32/8,32/32",
    "dtype": "bf16,fp16",
}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def problems(axes: dict[str, str]) -> list[Problem]:
    """Every combination of the axes, those that say most first: grouped heads, long contexts of few sequences."""
    heads = [pair.split("/") for pair in axes["heads"].split(",")]
    return [
        Problem(batch, context, int(q_heads), int(kv_heads), dtype)
        for dtype in axes["dtype"].split(",")
        for q_heads, kv_heads in heads
        for batch in map(int, axes["batch"].split(","))
        for context in map(int, axes["context"].split(","))
    ]


def copies_for(backend: Backend, p: Problem, working_set: int, free: int) -> int:
    """Copies of the buffers that hold a working set together. Raises: MemoryError where not even one fits."""
    held = backend.bytes_held(p)
    usable = max(0, free - RESERVE)
    if held > usable:
        raise MemoryError(f"one copy needs {held / 1e9:.1f} GB and {usable / 1e9:.1f} GB are free")
    wanted = -(-working_set // backend.bytes_moved(p))
    return max(1, min(wanted, usable // held, MOST_COPIES))


def measure(
    backend: Backend, p: Problem, working_set: int, copy: float, reps: int
) -> dict[str, Any]:
    """One row of the results; a backend that cannot run becomes a row that says why."""
    row: dict[str, Any] = {"name": f"{backend.name} {p.name}", "backend": backend.name, **asdict(p)}
    try:
        moved = backend.bytes_moved(p)
        copies = copies_for(backend, p, working_set, torch.cuda.mem_get_info()[0])
        calls = backend.build(p, copies, "cuda")
        out = calls[0]()
        if not bool(torch.isfinite(out).all()):
            raise ArithmeticError("the output is not finite")
        times = time_calls(calls, reps)
    except Exception as error:
        row["skipped"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        rate = moved / times.us * 1e6
        row |= {"copies": copies, "bytes": moved, **asdict(times)}
        row |= {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy}
    calls = []
    gc.collect()
    torch.cuda.empty_cache()
    return row


def compare(p: Problem, rows: list[dict[str, Any]]) -> None:
    """Adds what each row gains over the best one in full precision, beside what its bytes promise."""
    full = {f.name for f in backends(p) if isinstance(f, FullPrecision)}
    others = [r for r in rows if r["backend"] in full and "us" in r]
    if not others:
        return
    best = min(others, key=lambda r: float(r["us"]))
    for row in rows:
        if "us" in row:
            row["best_other"] = best["backend"]
            row["speedup"] = best["us"] / row["us"]
            row["bytes_ratio"] = best["bytes"] / row["bytes"]


def show(p: Problem, rows: list[dict[str, Any]]) -> None:
    """The rows of one problem as a table."""
    table = Table(title=p.name, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(
        ("backend", "us", "median", "eager", "GB/s", "% of copy", "times best", "bytes say")
    ):
        table.add_column(column, justify="right" if index else "left")
    for r in rows:
        if "skipped" in r:
            table.add_row(r["backend"], f"[dim]{r['skipped'][:70]}[/dim]")
            continue
        gain = (f"{r[k]:.2f}" if k in r else "" for k in ("speedup", "bytes_ratio"))
        numbers = (
            f"{r[k]:.1f}" for k in ("us", "median_us", "eager_us", "gb_per_s", "percent_of_copy")
        )
        table.add_row(r["backend"], *numbers, *gain)
    console.print(table)


def versions() -> dict[str, str]:
    """Of everything that may be compared."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("skvq_ext", "flashinfer-python", "flash-attn", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, one type.")] = False,
    batch: Annotated[str, typer.Option(help="Sequences, such as 1,4,16.")] = "",
    context: Annotated[str, typer.Option(help="Tokens, such as 4096,32768.")] = "",
    heads: Annotated[str, typer.Option(help="Query heads/KV heads, such as 32/8.")] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or both.")] = "",
    reps: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 20,
    budget: Annotated[float, typer.Option(help="Seconds after which no problem is begun.")] = 600,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also as JSON.")] = None,
) -> None:
    """Measures every backend on every shape."""
    began = time.monotonic()
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}"
        print(
            f"peers: {build} finds no CUDA device, and this compares kernels on one: run it on a machine with a GPU "
            "and a CUDA build of torch.",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    given = {"batch": batch, "context": context, "heads": heads, "dtype": dtype}
    axes = (QUICK if quick else FULL) | {k: v for k, v in given.items() if v}
    properties = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth(reps)
    working_set = max(2 * properties.L2_cache_size, 200_000_000)
    report: dict[str, Any] = {
        "command": sys.argv,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "copy_gb_per_s": copy / 1e9,
        "versions": versions(),
        "results": [],
    }
    console.print(f"{properties.name}: copy {copy / 1e9:.0f} GB/s; {report['versions']}")
    for p in problems(axes):
        if time.monotonic() - began > budget:
            report["results"].append(
                {"name": p.name, "skipped": f"the budget of {budget:.0f} s is used up"}
            )
            continue
        rows = [measure(b, p, working_set, copy, reps) for b in backends(p)]
        compare(p, rows)
        show(p, rows)
        report["results"] += rows
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
