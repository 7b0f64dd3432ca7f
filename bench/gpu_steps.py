"""Running one command of a check of a GPU: its time limit, its output, what it found."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

Status = Literal["ok", "failed", "skipped"]
Figures = dict[str, Any]
TAIL = 4000  # characters of output that the report keeps of a step that did not go well


@dataclass(frozen=True)
class Step:
    """One command.

    limit: seconds. needs: files that an earlier step makes. tool: a program that must be found, and where besides PATH.
    results: a JSON file that the command writes. read: figures and reason from exit status and output; a reason
    that starts with "skipped: " means that nothing was checked.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[Path, ...] = ()
    tool: str = ""
    results: Path | None = None
    read: Callable[[int, str], tuple[Figures, str]] | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What became of a step, as it stands in the report."""

    stage: str
    step: str
    status: Status
    reason: str
    seconds: float
    limit_s: float
    command: list[str]
    figures: Figures = field(default_factory=dict)
    output_tail: str = ""

    def as_json(self) -> dict[str, Any]:
        """The members in the order of the report."""
        return asdict(self)


def find_tool(name: str, env: Mapping[str, str]) -> str | None:
    """A program in PATH, beside this Python, or in the CUDA toolkit."""
    home = env.get("CUDA_HOME", "/usr/local/cuda")
    places = [
        env.get("PATH", ""),
        str(Path(sys.executable).parent),
        f"{home}/bin",
        f"{home}/compute-sanitizer",
    ]
    return shutil.which(name, path=os.pathsep.join(places))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def call(
    command: Sequence[str], limit: float, log: Path, cwd: Path, env: Mapping[str, str]
) -> tuple[int | None, str, float]:
    """Runs a command; its output goes behind what the log holds already.

    Returns: exit status, or None where it ran out of time; output; seconds.
    """
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        begin = out.tell()
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            stop(process)
        seconds = time.monotonic() - started
    with log.open("rb") as written:
        written.seek(begin)
        return status, written.read().decode(errors="replace"), seconds


def read_results(step: Step, earlier: float) -> Figures:
    """What the command wrote to its file during this run, as far as it came."""
    if step.results is None or not step.results.exists() or step.results.stat().st_mtime < earlier:
        return {}
    try:
        figures: Figures = json.loads(step.results.read_text())
    except ValueError as error:
        return {"unreadable": f"{step.results.name}: {error}"}
    return figures


def run_step(step: Step, remaining: float, log: Path, cwd: Path, env: Mapping[str, str]) -> Result:
    """Runs a step, or says why not. Never raises for what the command does.

    remaining: seconds that are left of the whole run.
    """
    limit = min(step.limit, remaining)
    result = Result(step.stage, step.name, "skipped", "", 0.0, round(limit, 1), list(step.command))
    missing = [path.name for path in step.needs if not path.exists()]
    if missing:
        result.reason = f"needs {', '.join(missing)}, which the stage build makes"
        return result
    if remaining < min(5.0, step.limit):
        result.reason = "no time left"
        return result
    program = find_tool(step.tool or step.command[0], env)
    if program is None:
        result.reason = f"{step.tool or step.command[0]} is not installed"
        return result
    command = (program, *step.command[1:])
    earlier = time.time() - 1
    try:
        status, output, result.seconds = call(command, limit, log, cwd, {**env, **step.env})
    except OSError as error:
        result.status, result.reason = "failed", f"{program} cannot be started: {error}"
        return result
    result.seconds = round(result.seconds, 2)
    result.figures = read_results(step, earlier)
    reason = ""
    if step.read is not None:
        figures, reason = step.read(status if status is not None else -1, output)
        result.figures |= figures
    if status is None:
        result.status, result.reason = "failed", f"stopped after {limit:.0f} s"
    elif reason.startswith("skipped: "):
        result.status, result.reason = "skipped", reason.removeprefix("skipped: ")
    elif status != 0 or reason:
        result.status, result.reason = "failed", reason or f"exit status {status}"
    else:
        result.status = "ok"
    if result.status != "ok":
        result.output_tail = output[-TAIL:]
    return result


# ---- what commands say ----


def read_sanitizer(status: int, output: str) -> tuple[Figures, str]:
    """The count in the last lines of compute-sanitizer."""
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", output)
    refused = re.search(r"Device not supported[^\n]*|Failed to initialize[^\n]*", output)
    if refused:
        return {}, f"skipped: compute-sanitizer: {refused[0].strip()}"
    if found is None:
        return {}, f"compute-sanitizer gave no summary (exit status {status})"
    errors = int(found[1])
    first = re.search(r"^=+ (?!COMPUTE-SANITIZER|ERROR|RACECHECK)(\S[^\n]*)", output, re.M)
    reason = f"{errors} errors, first: {first[1] if first else 'see the log'}" if errors else ""
    return {"errors": errors}, reason


def junit_reader(path: Path) -> Callable[[int, str], tuple[Figures, str]]:
    """Counts of a pytest run from its JUnit file."""

    def read(status: int, output: str) -> tuple[Figures, str]:
        if "No module named pytest" in output:
            return {}, "skipped: pytest is not installed"
        if status == 5:
            return {}, "skipped: no test has such a name"
        if not path.exists():
            return {}, f"pytest wrote no {path.name} (exit status {status})"
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        bad = [
            f"{c.get('classname')}::{c.get('name')}"
            for c in cases
            if c.find("failure") is not None or c.find("error") is not None
        ]
        skips = [s for c in cases if (s := c.find("skipped")) is not None]
        passed = len(cases) - len(bad) - len(skips)
        figures: Figures = {"passed": passed, "failed": len(bad), "skipped": len(skips)}
        if bad:
            return figures | {"failures": bad[:30]}, f"{len(bad)} failed, first: {bad[0]}"
        if passed == 0:
            why = skips[0].get("message", "") if skips else "no test ran"
            return figures, f"skipped: all {len(skips)} tests were skipped: {why}"
        return figures, ""

    return read


def read_findings(status: int, output: str) -> tuple[Figures, str]:
    """The lines of unit_checks and device_check that begin with FAILED."""
    failed = re.findall(r"^FAILED (.*)$", output, re.M)
    if failed:
        return {}, f"{len(failed)} failed, first: {' '.join(failed[0].split())[:160]}"
    return {}, "" if status == 0 else last_line(status, output)


def last_line(status: int, output: str) -> str:
    """Exit status and the last line, which is where programs say what went wrong."""
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1].strip()[:200]}" if lines else f"exit status {status}"
