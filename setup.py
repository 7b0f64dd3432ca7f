"""Thin setuptools front: decides about CUDA, runs CMake with ninja, puts _C.so beside the Python.

Environment: SKVQ_CUDA=0|1|auto (default auto), CUDA_HOME, MAX_JOBS, CMAKE_ARGS (for configuring).
A GPU is never looked for: what gets built depends on the toolkit and on the switch only.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
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


def decide_cuda(env: Mapping[str, str], has_kernels: bool) -> tuple[bool, str]:
    """Whether to build the CUDA backend, and the reason to print.

    Args: env, the environment; has_kernels, whether this source tree contains CUDA kernels.
    Returns: (build CUDA, reason). Raises SystemExit when CUDA is asked for and cannot be built.
    """
    switch = env.get("SKVQ_CUDA", "auto").strip().lower()
    if switch not in {"0", "1", "auto"}:
        raise SystemExit(f"skvq: SKVQ_CUDA={switch!r} is not understood; use 0, 1 or auto.")
    if switch == "0":
        return False, "SKVQ_CUDA=0"
    nvcc = find_nvcc(env)
    looked = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    where = f"CUDA_HOME={looked}" if looked else "PATH (CUDA_HOME is not set)"
    if nvcc is None:
        if switch == "1":
            raise SystemExit(
                f"skvq: SKVQ_CUDA=1 asks for the CUDA backend, but there is no nvcc in {where}. "
                "Install the CUDA toolkit and set CUDA_HOME to it, or use SKVQ_CUDA=0 for CPU only."
            )
        return False, f"no nvcc in {where}"
    if not has_kernels:
        if switch == "1":
            raise SystemExit(
                f"skvq: SKVQ_CUDA=1 asks for the CUDA backend and nvcc is there ({nvcc}), but this "
                "version of skvq_ext has no CUDA kernels yet. Use SKVQ_CUDA=0 or auto for CPU only."
            )
        return False, f"nvcc is there ({nvcc}), but this version has no CUDA kernels yet"
    return True, f"nvcc at {nvcc}"


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: torch loads it, so it carries no Python tag in its name.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        cuda, reason = decide_cuda(os.environ, any((ROOT / "csrc" / "cuda").glob("**/*.cu")))
        backends = "CPU + CUDA" if cuda else "CPU"
        print(f"skvq: building backends: {backends} ({reason})", flush=True)
        build = ROOT / "build" / "torch"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            *("-DCMAKE_BUILD_TYPE=Release", "-DSKVQ_TORCH=ON"),
            *("-DSKVQ_TESTS=OFF", "-DSKVQ_BENCH=OFF"),
            f"-DSKVQ_CUDA={'ON' if cuda else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if cuda:
            configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc(os.environ)}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        install = ["cmake", "--install", str(build), "--component", "torch"]
        for command in (
            configure,
            ["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])],
            [*install, "--prefix", str(prefix)],
        ):
            if shutil.which(command[0]) is None:
                raise SystemExit("skvq: cmake was not found. Install it: pip install cmake ninja")
            if subprocess.run(command).returncode:
                raise SystemExit(f"skvq: failed (its output is above): {shlex.join(command)}")


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python 3: _C.so knows torch's stable ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
