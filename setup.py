"""Thin setuptools front: looks for CUDA, runs CMake with ninja, puts _C.so beside the Python.

Environment: SKVQ_CUDA=0|1|auto (default auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST (default: all GPUs
from sm_80 on), MAX_JOBS, CMAKE_ARGS (for configuring). A GPU is never looked for: what gets built
depends on the toolkit and on the switch only.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "skvq: this setuptools is too old to build with; pip install -U 'setuptools>=77'"
    ) from None

ROOT = Path(__file__).resolve().parent
EXTENSION = "skvq_ext._C"


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Path of nvcc: CUDA_HOME (or CUDA_PATH) alone when set, else PATH. None if there is none."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc", path=env.get("PATH"))


def decide_cuda(env: Mapping[str, str]) -> tuple[str, str]:
    """SKVQ_CUDA as CMake takes it, and the reason to print.

    Args: env, the environment. Returns: ON, OFF or AUTO (there is an nvcc, which CMake tries out
    before it relies on it). Raises SystemExit when CUDA is asked for and cannot be built.
    """
    switch = env.get("SKVQ_CUDA", "auto").strip().lower()
    if switch not in {"0", "1", "auto"}:
        raise SystemExit(f"skvq: SKVQ_CUDA={switch!r} is not understood; use 0, 1 or auto.")
    if switch == "0":
        return "OFF", "SKVQ_CUDA=0"
    nvcc = find_nvcc(env)
    if nvcc is not None:
        return "ON" if switch == "1" else "AUTO", f"nvcc at {nvcc}"
    looked = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    where = f"CUDA_HOME={looked}" if looked else "PATH (CUDA_HOME is not set)"
    if switch == "1":
        raise SystemExit(
            f"skvq: SKVQ_CUDA=1 asks for the CUDA backend, but there is no nvcc in {where}. "
            "Install the CUDA toolkit and set CUDA_HOME to it, or use SKVQ_CUDA=0 for CPU only."
        )
    return "OFF", f"no nvcc in {where}"


def run(command: list[str], log: Path | None = None) -> None:
    """Runs a command, its output into `log` where one is given. Raises SystemExit if it fails."""
    if shutil.which(command[0]) is None:
        raise SystemExit("skvq: cmake was not found. Install it: pip install cmake ninja")
    with log.open("wb") if log else nullcontext() as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT if log else None)
    if done.returncode:
        where = f"the end of {log}:\n{log.read_text()[-6000:]}" if log else "its output is above"
        raise SystemExit(f"skvq: failed: {shlex.join(command)}; {where}")


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: torch loads it, so it carries no Python tag in its name.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        cuda, reason = decide_cuda(os.environ)
        backends = "CPU" if cuda == "OFF" else "CPU + CUDA"
        print(f"skvq: building backends: {backends} ({reason})", flush=True)
        build = ROOT / "build" / "torch"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            *("-DCMAKE_BUILD_TYPE=Release", "-DSKVQ_TORCH=ON"),
            *("-DSKVQ_TESTS=OFF", "-DSKVQ_BENCH=OFF"),
            *(f"-DSKVQ_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}"),
        ]
        if cuda != "OFF":
            configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc(os.environ)}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        make = ["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])]
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        install = ["cmake", "--install", str(build), "--component", "torch"]
        run(configure)
        run([*make, "--target", "skvq_cuda_kernels"], log=ROOT / "build" / "cuda.log")
        run(make)
        run([*install, "--prefix", str(prefix)])


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python 3: _C.so knows torch's stable ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
