"""nvcc: kernels to PTX, and the host code of the backend to a library. Results are kept in build/ by content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "ptx"
ARCHS = (80, 90)
INCLUDES = ("include", "csrc")
HEADERS = ("include/**/*.h", "csrc/core/*.h", "csrc/cuda/**/*.h", "csrc/cuda/**/*.cuh")


def find_nvcc() -> str | None:
    """nvcc where the build looks for it: CUDA_HOME if that is set, else PATH and the usual place."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@lru_cache(maxsize=1)
def headers_hash() -> str:
    """Changes with nvcc and with every header that kernels may include."""
    nvcc = find_nvcc()
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version)
    for path in sorted(p for pattern in HEADERS for p in ROOT.glob(pattern) if p.is_file()):
        digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def build_flags() -> dict[str, list[str]]:
    """Flags that CMakeLists.txt gives single files of csrc/cuda, by name."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(
        r"set_source_files_properties\(([^)]*?)\s+PROPERTIES\s+COMPILE_OPTIONS\s+([^)]*)\)", text
    )
    return {Path(f).name: flags.split() for files, flags in found for f in files.split()}


def run_nvcc(arguments: Sequence[str], folder: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None, "callers skip without nvcc"
    done = subprocess.run([nvcc, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr)[:4000]
        raise RuntimeError(f"nvcc {' '.join(arguments)}\n{output}")


@dataclass(frozen=True)
class Source:
    """A file to compile and the folders that its includes look into first."""

    path: Path
    before: tuple[Path, ...] = ()

    @property
    def key(self) -> str:
        digest = hashlib.sha256(headers_hash().encode() + self.path.read_bytes())
        digest.update(" ".join(build_flags().get(self.path.name, [])).encode())
        for folder in self.before:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def arguments(self) -> list[str]:
        folders = [*self.before, *(ROOT / folder for folder in INCLUDES)]
        includes = [f"-I{folder}" for folder in folders]
        flags = build_flags().get(self.path.name, [])
        return ["-std=c++20", "-lineinfo", "-Xcompiler=-fPIC", *includes, *flags, str(self.path)]


@dataclass(frozen=True)
class Compiled:
    """The host object of a file and its PTX for each architecture (none for plain C++)."""

    object: Path
    ptx: dict[int, Path]

    def text(self, arch: int) -> str:
        return self.ptx[arch].read_text()


def compile_source(source: Source) -> Compiled:
    """One run of nvcc gives the host object and, on the way, the PTX of all architectures."""
    folder = CACHE / f"{source.path.stem}-{source.key}"
    stem, device = source.path.stem, source.path.suffix == ".cu"
    ptx = {arch: folder / f"{stem}.compute_{arch}.ptx" for arch in ARCHS} if device else {}
    result = Compiled(folder / f"{stem}.o", ptx)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            codes = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ARCHS] if device else []
            keep = ["--keep", f"--keep-dir={folder}"] if device else []
            run_nvcc(["-c", *codes, *keep, *source.arguments, "-o", str(result.object)], folder)
            for path in folder.iterdir():
                if path not in {result.object, *ptx.values(), folder / "lock"}:
                    path.unlink()
            (folder / "done").touch()
    return result


def compile_all(sources: Iterable[Source]) -> list[Compiled]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_source, sources))


def link(objects: Sequence[Path]) -> Path:
    """A shared library without the CUDA runtime: host/runtime.cpp takes its place."""
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    library = CACHE / f"backend-{key}.so"
    with (CACHE / f"backend-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            options = ["-shared", "-cudart=none", "-Xlinker=-z,defs,-Bsymbolic"]
            run_nvcc([*options, *map(str, objects), "-o", str(library)], CACHE)
    return library
