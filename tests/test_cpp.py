"""The torch-free C++ side: its build, each of its doctest cases as a test of its own, its benchmark."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from native_build import ROOT, configured_and_built, run

SOURCES = sorted((ROOT / "tests" / "cpp").glob("test_*.cpp"))
# Read from the sources, so that collecting needs no build; test_no_case_is_missed compares with the binary.
CASES = [
    (source.stem.removeprefix("test_"), name)
    for source in SOURCES
    for name in re.findall(r'^TEST_CASE\("([^"]+)"\)', source.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="session")
def build() -> Path:
    return configured_and_built()


def test_build_knows_no_torch(build: Path) -> None:
    commands = (build / "build.ninja").read_text()
    assert "skvq_tests" in commands and "bench_cpu" in commands
    assert not re.search(r"libtorch|torch/include|csrc/torch", commands)


def test_no_case_is_missed(build: Path) -> None:
    listed = run(build / "tests/cpp/skvq_tests", "--list-test-cases", "--no-intro").splitlines()
    names = [line for line in listed if line and not line.startswith(("[doctest]", "=="))]
    assert sorted(names) == sorted(name for _, name in CASES)


@pytest.mark.parametrize(("suite", "name"), CASES, ids=[f"{s}: {n}" for s, n in CASES])
def test_case(build: Path, suite: str, name: str) -> None:
    one_name = name.replace(",", "?")  # a comma would separate two filters
    binary = build / "tests/cpp/skvq_tests"
    output = run(binary, f"--test-suite={suite}", f"--test-case={one_name}", "--no-intro")
    assert re.search(r"test cases:\s+1 \|\s+1 passed", output), output


def test_benchmark_reports_what_it_moved(build: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    shape = ["--context", "512", "--heads", "1,2", "--threads", "2", "--working-set", "1"]
    run(build / "bench/bench_cpu", *shape, "--reps", "2", "--warmup", "1", "--json", report)
    results = json.loads(report.read_text())["results"]
    assert [(r["op"], r["num_kv_heads"]) for r in results] == [
        ("append", 1), ("decode", 1), ("append", 2), ("decode", 2),
    ]  # fmt: skip
    decode = results[1]
    packed, row, ratio = 5, 128 * 2, 4  # tiles of 512 tokens; bytes of a bf16 row; query heads
    full_precision = 512 - 64 * packed
    assert decode["record_bytes"] == 3968
    assert decode["bytes"] == packed * 3968 + 2 * full_precision * row + 2 * ratio * row
    assert all(r["min_s"] > 0 and r["median_s"] >= r["min_s"] for r in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "1"], "unknown option --speed"),
        (["--heads"], "--heads needs a value"),
        (["--heads", "many"], '--heads: expected a number of 0 or more, found "many"'),
        (["--heads", "0"], "must be 1 or more"),
        (["--op", "encode"], "possible are append and decode"),
        (["--scheme", "2/1.5"], "for example k2-v1.5"),
        (["--scheme", "k5-v2"], 'number format "5" is unknown'),
        (["--context", "64"], "so that something is packed"),
    ],
)
def test_benchmark_refuses(build: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [build / "bench/bench_cpu", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
