"""The tests of operators and caches once more, over the CUDA kernels as the emulator executes them.

`_C_simt.so` holds the same operators as `_C.so`, but the CPU's tensors go to the kernels of csrc/cuda,
thread by thread (tests/simt). Test files run in processes of their own that load it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "simt_torch"
# Test files, and how many tests of each must pass: a selection that ran nothing would show nothing.
FILES = {
    "test_append.py": 50,
    "test_cache.py": 25,
    "test_cache_changes.py": 15,
    "test_cuda.py": 130,
    "test_decode.py": 140,
    "test_decode_refuses.py": 60,
    "test_ops.py": 50,
    "test_quantize.py": 170,
    "test_repack.py": 10,
}
# The only reasons for which a test may be skipped there.
REASONS = (
    r"about csrc/cpu, whose place the emulator takes",
    r"no CUDA decode kernel was built for this format",
    r"attention on CUDA takes no float32",
    r"no GPU that PyTorch can use",
    r"fewer than two GPUs",
)


def tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    assert found, f"the emulated operators are built with {name}: pip install {name}"
    return found


@pytest.fixture(scope="session")
def library() -> Iterator[Path]:
    """Builds build/simt_torch/_C_simt.so; quick when up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "SKVQ_CUDA": "OFF",
        "SKVQ_SIMT_TORCH": "ON",
        "SKVQ_TORCH": "OFF",
    }
    words = [f"-D{name}={value}" for name, value in options.items()]
    with (BUILD / "pytest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist take turns
        for command in (
            [tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", *words],
            [tool("cmake"), "--build", BUILD, "--target", "_C_simt"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            output = done.stdout + done.stderr
            if "there is no emulator for this processor and compiler" in output:
                pytest.skip("there is no emulator for this processor and compiler")
            assert done.returncode == 0, output[-6000:]
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
