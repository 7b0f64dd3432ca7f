"""The tests of operators and caches once more, over the CUDA kernels as the emulator executes them.

`_C_simt.so` holds the same operators as `_C.so`, but the CPU's tensors go to the kernels of csrc/cuda,
thread by thread (tests/simt). Test files run in processes of their own that load it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from native_build import ROOT, configured_and_built, run, tool

BUILD = ROOT / "build" / "simt"
# Test files, and how many tests of each must pass: a selection that ran nothing would show nothing.
FILES = {
    "test_append.py": 50,
    "test_cache.py": 25,
    "test_cache_changes.py": 15,
    "test_cuda.py": 130,
    "test_decode.py": 90,
    "test_decode_refuses.py": 60,
    "test_ops.py": 50,
    "test_quantize.py": 170,
    "test_repack.py": 8,
}
# The only reasons for which a test may be skipped there.
REASONS = (
    r"about csrc/cpu, whose place the emulator takes",
    r"no CUDA decode kernel was built for this format",
    r"attention on CUDA takes no float32",
    r"no GPU that PyTorch can use",
    r"fewer than two GPUs",
)


@pytest.fixture(scope="session")
def library() -> Iterator[Path]:
    """Builds build/simt/_C_simt.so from the libraries of the C++ tests; quick when up to date."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("the emulator needs an x86-64 processor")
    built = configured_and_built("skvq_cuda_plain", "skvq_cpu")
    BUILD.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "SKVQ_CUDA": "OFF",
        "SKVQ_SIMT_BUILT": built,
        "SKVQ_SIMT_TORCH": "ON",
        "SKVQ_TORCH": "OFF",
    }
    words = [f"-D{name}={value}" for name, value in options.items()]
    with (BUILD / "pytest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist take turns
        run(tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", *words)
        run(tool("cmake"), "--build", BUILD, "--target", "_C_simt")
    yield BUILD / "_C_simt.so"


def test_the_library_is_chosen_by_the_environment(library: Path, tmp_path: Path) -> None:
    code = "from skvq_ext import build_info; i = build_info(); print(i['cuda']['archs'], i['arrangements'])"
    env = {**os.environ, "SKVQ_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "emulated {'cpu': 'mma', 'cuda': 'mma'}", done.stderr
    env["SKVQ_LIBRARY"] = str(tmp_path / "nothing.so")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert re.search(r"ImportError: .*SKVQ_LIBRARY=.*nothing\.so is not a file", done.stderr)


@pytest.mark.parametrize("name", FILES)
def test_over_emulated_kernels(name: str, library: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    alone = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *alone, ROOT / "tests" / name],
        env={**os.environ, "SKVQ_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    skips = Counter(s.get("message", "") for case in cases for s in case.findall("skipped"))
    print(f"{name}: {len(cases) - skips.total()} passed;", dict(skips))
    unexpected = [why for why in skips if not any(re.search(r, why) for r in REASONS)]
    assert not unexpected
    assert len(cases) - skips.total() >= FILES[name], "too little of this file ran"
