"""The torch-free C++ side, built once for the tests that run its programs."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cpp"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    # Without a Python there is no way to find torch.
    "CMAKE_DISABLE_FIND_PACKAGE_Python": "ON",
    "SKVQ_TORCH": "OFF",
    "SKVQ_CUDA": "OFF",
    "SKVQ_TESTS": "ON",
    "SKVQ_BENCH": "ON",
}


def tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(
            f"the C++ tests are built with {name}, which is neither in PATH nor beside "
            f"{sys.executable}: pip install {name}"
        )
    return found


def run(*command: str | Path, timeout: float = 900) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{output[-6000:]}"
    return output


def configured_and_built(*targets: str) -> Path:
    """Configures build/cpp and builds all of it, or these targets; quick when up to date.

    `make ctest` builds there too.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    options = [f"-D{k}={v}" for k, v in OPTIONS.items()]
    options.append(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    with (BUILD / "pytest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist take turns
        run(tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options)
        only = ["--target", *targets] if targets else []
        run(tool("cmake"), "--build", BUILD, *only, timeout=3600)
    return BUILD
