"""The script that checks a GPU, as far as a machine without one can run it: real commands, real files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu_check  # noqa: E402
import gpu_stages  # noqa: E402
import peers  # noqa: E402
from gpu_steps import Step, junit_reader, read_findings, read_sanitizer, run_step  # noqa: E402
from peer_backends import Packed, Problem, backends  # noqa: E402
from predictions import Prediction, compare, read_predictions  # noqa: E402

ENV = dict(os.environ)


def python(code: str, **options: Any) -> Step:
    """A step that runs a line of Python."""
    return Step("unit", "a step", (sys.executable, "-c", code), options.pop("limit", 30), **options)


def run(step: Step, tmp_path: Path, remaining: float = 100.0) -> Any:
    return run_step(step, remaining, tmp_path / "log", tmp_path, ENV)


# ---- one step ----


def test_a_step_that_works_brings_its_figures(tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    code = f"open({str(results)!r}, 'w').write('{{\"results\": [1]}}'); print('hello')"
    result = run(python(code, results=results), tmp_path)
    assert (result.status, result.reason, result.output_tail) == ("ok", "", "")
    assert result.figures == {"results": [1]}
    assert 0 < result.seconds < 30
    assert "hello" in (tmp_path / "log").read_text()


def test_a_step_that_fails_keeps_the_end_of_its_output(tmp_path: Path) -> None:
    result = run(python("print('x' * 9000); raise SystemExit('bad luck')"), tmp_path)
    assert (result.status, result.reason) == ("failed", "exit status 1")
    assert result.output_tail.endswith("bad luck\n") and len(result.output_tail) == 4000


def test_time_runs_out_for_a_step_and_all_it_started(tmp_path: Path) -> None:
    alive, results = tmp_path / "alive", tmp_path / "r.json"
    child = f"import time\nwhile 1:\n open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    code = (
        f"import subprocess, sys, time; open({str(results)!r}, 'w').write('{{\"part\": 1}}');"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    started = time.monotonic()
    result = run(python(code, limit=2.0, results=results), tmp_path)
    assert (result.status, result.reason) == ("failed", "stopped after 2 s")
    assert time.monotonic() - started < 20
    assert result.figures == {"part": 1}, "what was written before is kept"
    size = alive.stat().st_size
    time.sleep(0.5)
    assert size > 0 and alive.stat().st_size == size, "the child runs on"


@pytest.mark.parametrize(
    ("step", "remaining", "reason"),
    [
        (Step("unit", "x", ("no-such-program",), 9), 99, "no-such-program is not installed"),
        (Step("unit", "x", ("sh",), 9, tool="no-such-tool"), 99, "no-such-tool is not installed"),
        (
            Step("unit", "x", ("sh",), 9, (Path("nowhere/it"),)),
            99,
            "needs it, which the stage build",
        ),
        (Step("unit", "x", ("sh", "-c", ""), 9), 1.5, "no time left"),
    ],
)
def test_a_step_that_cannot_run_says_why(
    step: Step, remaining: float, reason: str, tmp_path: Path
) -> None:
    result = run(step, tmp_path, remaining)
    assert result.status == "skipped" and reason in result.reason
    assert not (tmp_path / "log").exists()


def test_old_results_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    results.write_text('{"old": 1}')
    os.utime(results, (1, 1))
    assert run(python("pass", results=results), tmp_path).figures == {}
    results.write_text("{ half")
    assert "r.json" in run(python("pass", results=results), tmp_path).figures["unreadable"]


def test_a_step_has_no_more_time_than_the_run(tmp_path: Path) -> None:
    result = run(python("import time; time.sleep(60)", limit=50.0), tmp_path, remaining=6.0)
    assert (result.status, result.reason) == ("failed", "stopped after 6 s")


# ---- what programs say ----


@pytest.mark.parametrize(
    ("output", "figures", "reason"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", {"errors": 0}, ""),
        (
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n"
            "========= ERROR SUMMARY: 3 errors\n",
            {"errors": 3},
            "3 errors, first: Invalid __global__ read of size 4",
        ),
        (
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n",
            {"errors": 2},
            "2 errors, first: see the log",
        ),
        ("========= Error: Device not supported.\n", {}, "skipped: compute-sanitizer: Device not"),
        ("Segmentation fault\n", {}, "no summary (exit status 7)"),
    ],
)
def test_sanitizers_are_understood(output: str, figures: dict[str, int], reason: str) -> None:
    found, why = read_sanitizer(7, output)
    assert found == figures and reason in why and bool(reason) == bool(why)


def test_findings_are_understood() -> None:
    assert read_findings(0, "ok  a  12 cases\n") == ({}, "")
    assert read_findings(1, "FAILED  ex2   3 of 9\nok b\n")[1] == "1 failed, first: ex2 3 of 9"
    assert (
        read_findings(1, "device_check: no device\n")[1] == "exit status 1: device_check: no device"
    )


@pytest.mark.parametrize(
    ("words", "status", "figures", "reason"),
    [
        ("good", "ok", {"passed": 2, "failed": 0, "skipped": 0}, ""),
        ("good or lazy", "ok", {"passed": 2, "failed": 0, "skipped": 1}, ""),
        ("bad", "failed", {"passed": 0, "failed": 1, "skipped": 0}, "1 failed, first: "),
        ("lazy", "skipped", {"passed": 0, "failed": 0, "skipped": 1}, "no GPU here"),
        ("other", "skipped", {}, "no test has such a name"),
    ],
)
def test_pytest_is_understood(
    words: str, status: str, figures: dict[str, int], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_good_too(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='no GPU here')\ndef test_lazy(): pass\n"
    )
    # Its own root: -k also reads the names of folders below the root, and this one's is the test's.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    junit = tmp_path / "j.xml"
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        words,
        f"--junitxml={junit}",
        "test_it.py",
    )
    step = Step("correct", "tests", command, 60, read=junit_reader(junit))
    result = run(step, tmp_path)
    assert result.status == status and reason in result.reason
    assert {k: v for k, v in result.figures.items() if k != "failures"} == figures


# ---- a run ----


def test_the_report_is_there_after_every_step(tmp_path: Path) -> None:
    report = gpu_check.Report.begin(tmp_path, {"quick": True}, {"gpu": {"name": "NVIDIA X 80GB"}})
    peek = f"import json; print(len(json.load(open({str(report.path)!r}))['stages']), 'so far')"
    steps = [
        python("raise SystemExit(3)"),
        Step("bench", "missing", ("no-such-program",), 5),
        python(peek, read=lambda status, output: ({"seen": output.split()[0]}, "")),
    ]
    gpu_check.run_steps(steps, 100, report, ENV)
    contents = json.loads(report.path.read_text())
    assert [s["status"] for s in contents["stages"]] == ["failed", "skipped", "ok"]
    assert contents["stages"][2]["figures"] == {"seen": "2"}
    assert set(contents) == {
        *("schema", "started", "finished", "seconds", "options", "machine", "stages", "predictions")
    }
    assert set(contents["stages"][0]) == {
        *("stage", "step", "status", "reason", "seconds", "limit_s"),
        *("command", "figures", "output_tail"),
    }
    assert re.fullmatch(r"nvidia-x-80gb-\d{8}-\d{6}\.json", report.path.name)
    assert not list(tmp_path.glob("*.part"))


def test_the_budget_ends_a_run(tmp_path: Path) -> None:
    report = gpu_check.Report.begin(tmp_path, {}, {"gpu": {}})
    sleep = python("import time; time.sleep(30)", limit=30)
    gpu_check.run_steps([sleep, sleep], 5.5, report, ENV)
    first, second = report.contents["stages"]
    assert first["status"] == "failed" and first["reason"].startswith("stopped after")
    assert (second["status"], second["reason"]) == ("skipped", "no time left")


def test_stages_do_not_depend_on_each_other(tmp_path: Path) -> None:
    """Nothing is built: every stage that needs it is skipped, and the run is no failure."""
    command = [sys.executable, ROOT / "bench" / "gpu_check.py", "--stages", "a,sanitize,e"]
    out = tmp_path / "results"
    env = ENV | {"OUT": str(out)}
    done = subprocess.run(
        [*map(str, command), "--build", str(tmp_path / "build"), "--budget", "60"],
        **{"env": env, "capture_output": True, "text": True, "timeout": 120, "check": False},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    contents = json.loads(path.read_text())
    assert {s["status"] for s in contents["stages"]} == {"skipped"}
    assert all("which the stage build makes" in s["reason"] for s in contents["stages"])
    assert {s["stage"] for s in contents["stages"]} == {"unit", "sanitize", "bench"}
    assert contents["finished"] and {p["verdict"] for p in contents["predictions"]} == {
        "not measured"
    }
    assert "predictions (docs/gpu.md)" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_without_a_gpu_nothing_is_built_by_guess(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "finds a GPU to build for" in done.stderr and "--arch 9.0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_stages_have_letters_and_an_order() -> None:
    assert gpu_stages.parse_stages("f,a,build") == ["build", "unit", "peers"]
    with pytest.raises(ValueError, match=r"\['x'\] are unknown; possible are build, unit \(a\)"):
        gpu_stages.parse_stages("a,x")


@pytest.mark.parametrize("quick", [False, True])
def test_every_stage_has_steps(quick: bool, tmp_path: Path) -> None:
    steps = gpu_stages.all_steps(gpu_stages.Settings("9.0", quick, tmp_path, tmp_path))
    assert {s.stage for s in steps} == set(gpu_stages.STAGES)
    assert len({s.name for s in steps}) == len(steps), "names tell steps apart in the predictions"
    assert all(s.limit <= 420 for s in steps)
    configure = next(s for s in steps if s.name == "configure")
    assert configure.env == {"TORCH_CUDA_ARCH_LIST": "9.0"}


# ---- predictions ----


def test_predictions_are_about_what_is_measured(tmp_path: Path) -> None:
    predictions = read_predictions(ROOT / "docs" / "gpu.md")
    steps = gpu_stages.all_steps(gpu_stages.Settings("9.0", False, tmp_path, tmp_path))
    commands = {s.name: s.command for s in steps}
    sources = "".join(path.read_text() for path in (ROOT / "bench" / "gpu").glob("*.h"))
    assert len(predictions) > 5
    for p in predictions:
        p.holds(1.0)
        command = commands[p.step]
        if p.step == "unit checks":
            assert f'"{p.name}"' in sources, p.name
            continue
        case = re.fullmatch(
            r"(\w+) (k\S+)-g128 bf16 d128 (\d+)x(\d+) b(\d+) n(\d+)(?: q1)?( graph)?", p.name
        )
        assert case, p.name
        options = dict(pairwise(command))
        wanted = ("--op", "--scheme", "--heads", "--ratio", "--batch", "--context")
        for option, value in zip(wanted, case.groups(), strict=False):
            assert value in options[option].split(","), f"{p.name}: {option} {value}"
        assert bool(case[7]) == ("--graph" in command)


@pytest.mark.parametrize(
    ("predicted", "right", "wrong"),
    [("= 0", 0.0, 1e-9), (">= 85", 85.0, 84.9), ("<= 9", 8.5, 9.1), ("75 to 80", 77.0, 80.5)],
)
def test_predictions_hold_or_do_not(predicted: str, right: float, wrong: float) -> None:
    p = Prediction("anchors", "decode x", "us", "H100", predicted, "")
    stage: dict[str, Any] = {"step": "anchors", "figures": {"results": [{"name": "decode x"}]}}
    assert p.holds(right) and not p.holds(wrong)
    for value, verdict in ((right, "holds"), (wrong, "does not hold")):
        stage["figures"]["results"][0]["us"] = value
        assert compare([p], [stage], "NVIDIA H100 80GB")[0]["verdict"] == verdict
    assert compare([p], [stage], "NVIDIA H200") == []
    assert compare([p], [], "H100")[0] | {"outcome": 1} == {
        **p.__dict__,
        "outcome": 1,
        "verdict": "not measured",
    }
    with pytest.raises(ValueError, match="expected = N"):
        Prediction("", "", "", "any", "about 5", "").holds(5.0)


# ---- peers ----


def test_bytes_of_peers_are_those_of_the_format() -> None:
    p = Problem(2, 4096, 32, 8, "bf16")
    named = {b.name: b for b in backends(p)}
    question = 2 * 2 * 2 * 32 * 128
    assert named["flashinfer"].bytes_moved(p) == 2 * 2 * 2 * 4096 * 8 * 128 + question
    tiles = (4096 - 133) // 64
    tail = 4096 - 64 * tiles
    want = 2 * (tiles * 8 * 3968 + 2 * tail * 8 * 128 * 2) + question
    assert named["skvq k2-v1.5-g128"].bytes_moved(p) == want
    with pytest.raises(MemoryError, match=r"one copy needs 0\.0 GB and 0\.0 GB are free"):
        peers.copies_for(named["flashinfer"], p, 10**9, 0)
    assert peers.copies_for(named["flashinfer"], p, 10**9, 80 << 30) == 30
    assert len(backends(p)) == len(backends(Problem(1, 4096, 32, 32, "fp16"))) + 3


def test_the_packed_peer_attends_to_what_was_appended() -> None:
    p = Problem(2, 700, 8, 2, "bf16")
    calls = Packed("8", "8").build(p, 2, "cpu", "lanes")
    first, second = (call() for call in calls)
    assert first.shape == (2, 8, 128) and torch.equal(first, second), "copies hold the same"
    assert torch.isfinite(first).all() and first.abs().max() > 0


def test_gains_are_over_the_best_of_the_others() -> None:
    p = Problem(1, 4096, 32, 8, "bf16")
    rows = [
        {"backend": "flashinfer", "us": 10.0, "bytes": 700},
        {"backend": "torch flash, rows", "us": 8.0, "bytes": 700},
        {"backend": "flash_attn 2", "skipped": "not installed"},
        {"backend": "skvq k2-v2-g128", "us": 2.0, "bytes": 100},
    ]
    peers.compare(p, rows)
    assert rows[3] | {"speedup": 4.0, "bytes_ratio": 7.0} == rows[3]
    assert rows[3]["best_other"] == "torch flash, rows" and "speedup" not in rows[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_peers_refuse_without_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "bench" / "peers.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr and "Traceback" not in done.stderr
