"""Everything that a GPU can tell about this project in one run; bench/gpu_check.sh starts it, docs/gpu.md explains it.

    bench/gpu_check.sh --quick
    bench/gpu_check.sh --stages unit,correct --arch 9.0 --out results

No stage depends on the success of another, only on what the stage build makes. The report is written after every step,
so that a run that is cut off leaves what it found. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_stages import ROOT, STAGES, Settings, all_steps, parse_stages
from gpu_steps import Result, Step, find_tool, run_step
from predictions import compare, read_predictions

SCHEMA = 1
BUDGET, QUICK_BUDGET = 1140.0, 350.0
PAGE = ROOT / "docs" / "gpu.md"
QUERIES = (
    *("name", "driver_version", "compute_cap", "memory.total", "power.limit", "temperature.gpu"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def say(*command: str, limit: float = 60) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    program = find_tool(command[0], os.environ)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=ROOT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_state() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without it."""
    lines = say(
        "nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"
    ).splitlines()
    if not lines:
        return {}
    return dict(zip(QUERIES, (value.strip() for value in lines[0].split(",")), strict=False))


def torch_state() -> dict[str, str]:
    """Version of torch, and the GPU as torch sees it; empty without torch."""
    text = say(
        sys.executable,
        "-c",
        "import json, torch; c = torch.cuda; on = c.is_available(); print(json.dumps({"
        "'torch': torch.__version__, 'torch_cuda': str(torch.version.cuda),"
        "'torch_gpu': c.get_device_name() if on else '',"
        "'torch_arch': '.'.join(map(str, c.get_device_capability())) if on else ''}))",
        limit=120,
    )
    state: dict[str, str] = json.loads(text.splitlines()[-1]) if text else {}
    return state


def machine() -> dict[str, Any]:
    """The machine, as far as it can be asked."""
    nvcc = re.search(r"release ([\d.]+)", say("nvcc", "--version"))
    return {
        "gpu": gpu_state(),
        "nvcc": nvcc[1] if nvcc else "",
        **torch_state(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "commit": say("git", "rev-parse", "HEAD"),
        "changed": bool(say("git", "status", "--porcelain", "--untracked-files=no")),
    }


def name_of_gpu(found: Mapping[str, Any]) -> str:
    """As nvidia-smi or torch name it; "no GPU" where neither finds one."""
    return str(found["gpu"].get("name") or found.get("torch_gpu") or "no GPU")


def file_name(gpu: str, when: datetime) -> str:
    """nvidia-h100-80gb-hbm3-20260131-120000 for a GPU and a time."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{slug}-{when:%Y%m%d-%H%M%S}"


@dataclass
class Report:
    """The JSON file and its contents."""

    path: Path
    contents: dict[str, Any]

    @classmethod
    def begin(cls, folder: Path, options: Mapping[str, Any], found: dict[str, Any]) -> Report:
        """An empty report of a run that begins now."""
        now = datetime.now(timezone.utc)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "schema": SCHEMA,
            "started": now.isoformat(timespec="seconds"),
            "finished": None,
            "seconds": 0.0,
            "options": dict(options),
            "machine": found,
            "stages": [],
            "predictions": [],
        }
        return cls(folder / f"{file_name(name_of_gpu(found), now)}.json", contents)

    def write(self) -> None:
        """Replaces the file as a whole, so that a reader never sees half of it."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.contents, indent=1) + "\n")
        part.replace(self.path)

    def add(self, result: Result) -> None:
        """Adds a step that is over and writes the file."""
        self.contents["stages"].append(result.as_json())
        self.write()


def run_steps(steps: Sequence[Step], budget: float, report: Report, env: Mapping[str, str]) -> None:
    """Runs steps one after the other until the time is used up."""
    began = time.monotonic()
    log = report.path.with_suffix(".log")
    for step in steps:
        result = run_step(step, budget - (time.monotonic() - began), log, ROOT, env)
        report.contents["seconds"] = round(time.monotonic() - began, 1)
        report.add(result)
        print(
            f"{result.status:8}{step.stage:9} {step.name:18} {result.seconds:7.1f} s  {result.reason}",
            flush=True,
        )


def headline(stage: Mapping[str, Any]) -> str:
    """The figures of a step in a few words."""
    figures = stage["figures"]
    parts = []
    for key in ("passed", "failed", "skipped", "errors"):
        if isinstance(figures.get(key), int):
            parts.append(f"{key} {figures[key]}")
    if "bandwidth" in figures:
        parts.append(f"copy {figures['bandwidth']['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    measured = [r for r in figures.get("results", []) if r.get("percent_of_copy") is not None]
    if measured:
        best = max(measured, key=lambda r: float(r["percent_of_copy"]))
        parts.append(
            f"{len(measured)} cases, best {best['percent_of_copy']:.0f} % of copy: {best['name']}"
        )
    return ", ".join(parts)


def show(contents: Mapping[str, Any]) -> None:
    """The short table at the end."""
    print(f"\n{name_of_gpu(contents['machine'])}, {contents['seconds']:.0f} s")
    for stage in contents["stages"]:
        text = stage["reason"] or headline(stage)
        print(f"{stage['status']:8}{stage['stage']:9} {stage['step']:18} {text}")
    if contents["predictions"]:
        print("\npredictions (docs/gpu.md)")
    for p in contents["predictions"]:
        outcome = "" if p["outcome"] is None else f"{p['outcome']:.4g}"
        print(f"{p['verdict']:15}{p['predicted']:>10} {outcome:>10}  {p['name']}: {p['figure']}")


def stages(text: str) -> list[str]:
    """`parse_stages` for argparse, which shows the message of this error only."""
    try:
        return parse_stages(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with 2 where it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh", description="Checks and measures this project on a GPU."
    )
    parser.add_argument(
        "--quick", action="store_true", help="at most six minutes: fewer shapes, shorter limits"
    )
    letters = ", ".join(f"{name} ({letter})" if letter else name for name, letter in STAGES.items())
    parser.add_argument(
        "--stages",
        type=stages,
        default=list(STAGES),
        help=f"of {letters}; without build nothing is built",
    )
    parser.add_argument(
        "--arch",
        default="",
        help="compute capability to build for, such as 9.0; else that of the GPU",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds in all [{BUDGET:.0f}, with --quick {QUICK_BUDGET:.0f}]",
    )
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "gpu", help="folder to build in"
    )
    default_out = os.environ.get("OUT") or str(ROOT / "bench" / "results")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default_out),
        help="folder of the report; else $OUT, else bench/results",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs the chosen stages. Returns 1 where a step failed, else 0."""
    options = parse_arguments(arguments)
    found = machine()
    arch = options.arch or found["gpu"].get("compute_cap") or found.get("torch_arch", "")
    if not arch and "build" in options.stages:
        print(
            "gpu_check: neither nvidia-smi nor torch finds a GPU to build for. Run it on a machine with one, or name "
            "an architecture (--arch 9.0) to see whether everything builds.",
            file=sys.stderr,
        )
        return 2
    budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    chosen = {"quick": options.quick, "stages": options.stages, "arch": arch, "budget_s": budget}
    report = Report.begin(options.out.resolve(), chosen, found)
    print(f"{name_of_gpu(found)}, {budget:.0f} s at most, report {report.path}", flush=True)
    work = options.build.resolve() / "results"
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(arch, options.quick, options.build.resolve(), work)
    steps = [step for step in all_steps(settings) if step.stage in options.stages]
    # Tools that came with this Python are found by the tools that call them.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    run_steps(steps, budget, report, {**os.environ, "PATH": path})
    contents = report.contents
    contents["predictions"] = compare(
        read_predictions(PAGE), contents["stages"], name_of_gpu(found)
    )
    contents["machine"]["gpu_after"] = gpu_state()
    contents["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report.write()
    show(contents)
    return 1 if any(stage["status"] == "failed" for stage in contents["stages"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
