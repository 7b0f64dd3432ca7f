"""Compiles single instances of the decode kernel and reads what the tools of the toolkit say of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTANCES = ROOT / "csrc" / "cuda" / "instances"
ADDED = re.compile(r"\badd<(Instance<[^;]*>)>\(list\)")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class ToolError(Exception):
    """A tool is missing, or says no."""


@dataclass(frozen=True)
class Instance:
    """One line of csrc/cuda/instances, such as Instance<128, 64, K2, V1_5>."""

    type: str

    @property
    def name(self) -> str:
        head_dim, group, k, v = self.type.removeprefix("Instance<").removesuffix(">").split(", ")
        return f"{k}-{v}-g{group}-d{head_dim}"


def all_instances() -> list[Instance]:
    """Every instance that csrc/cuda/instances builds."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(INSTANCES.glob("*.cu"))]
    found = [Instance(" ".join(m.split())) for text in texts for m in ADDED.findall(text)]
    if not found:
        raise ToolError(f"no add<Instance<...>>(list) in {INSTANCES}")
    return found


@cache
def find_tool(name: str) -> str:
    """nvcc from PATH or CUDA_HOME; cuobjdump and nvdisasm from there or from this Python's packages."""
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    home = os.environ.get("CUDA_HOME")
    first = [str(Path(home) / "bin")] if home else []
    folders = [*first, os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(package)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        remedy = (
            "put it on PATH or set CUDA_HOME"
            if name == "nvcc"
            else f"{sys.executable} -m pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
        raise ToolError(f"{name} was not found: {remedy}")
    return found


def run_tool(name: str, *arguments: str) -> str:
    """What a tool prints. cuobjdump calls nvdisasm, which therefore must be on PATH."""
    path = os.pathsep.join([str(Path(find_tool(name)).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [find_tool(name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        raise ToolError(
            f"{name} {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[:4000]}"
        )
    return done.stdout + done.stderr


def compiler_version() -> str:
    release = re.search(r"release [\d.]+, V([\d.]+)", run_tool("nvcc", "--version"))
    return f"nvcc {release[1]}" if release else "nvcc of unknown version"


def flags() -> list[str]:
    return ["-std=c++20", f"-I{ROOT / 'include'}", f"-I{ROOT / 'csrc'}"]


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor. Bytes of stack and spills are a thread's."""

    registers: int
    stack: int
    static_shared: int
    spill_stores: int
    spill_loads: int


def compile_instance(instance: Instance, arch: str, folder: Path) -> tuple[Path, Usage]:
    """A cubin with one decode kernel and its source lines."""
    stem = f"{instance.name}-sm_{arch}"
    source, cubin = folder / f"{stem}.cu", folder / f"{stem}.cubin"
    source.write_text(
        '#include "cuda/instance.cuh"\nnamespace skvq::cuda {\n'
        f"template __global__ void attend_kernel<{instance.type}>(const DecodeParams);\n}}\n",
        encoding="utf-8",
    )
    said = run_tool(
        "nvcc",
        "-cubin",
        "-lineinfo",
        "-Xptxas=-v",
        f"-arch=sm_{arch}",
        *flags(),
        str(source),
        "-o",
        str(cubin),
    )
    return cubin, usage_of(run_tool("cuobjdump", "-res-usage", str(cubin)), said)


def usage_of(resources: str, ptxas: str) -> Usage:
    """The one kernel of a cubin, from `cuobjdump -res-usage` and `ptxas -v`."""
    kernels, spills = USAGE.findall(resources), SPILLED.findall(ptxas)
    if len(kernels) != 1 or not spills:
        raise ToolError(f"expected the resources of one kernel, found {len(kernels)}:\n{resources}")
    _, registers, stack, shared, _ = kernels[0]
    stores, loads = (max(int(s[i]) for s in spills) for i in range(2))
    return Usage(int(registers), int(stack), int(shared), stores, loads)


def listing(cubin: Path) -> str:
    return run_tool("nvdisasm", "-gi", "-c", str(cubin))


@dataclass(frozen=True)
class Facts:
    """What the source says of an instance, with FP8 metadata."""

    head_dim: int
    record_bytes: int
    products: int  # HMMA of a tile
    threads: int
    dynamic_shared: int
    blocks: int  # resident, as __launch_bounds__ asks


FACTS = """#include <cstdio>

#include "cuda/instance.cuh"

using namespace skvq;
using namespace skvq::cuda;

template <class T>
void print(const char* type, const char* separator) {
  constexpr int record = T::kFormat.record_bytes();
  std::printf("\\"%s\\": [%d, %d, %d, %d, %d, %d]%s\\n", type, T::kHeadDim, record, 2 * T::kBlocks * Mma::kSteps,
              T::kThreads, T::kWarps * T::kStages * stage_bytes(record, T::kHeadDim), T::kBlocksPerMultiprocessor,
              separator);
}

int main() {
  std::printf("{");
"""


def read_facts(instances: list[Instance], folder: Path) -> dict[Instance, Facts]:
    """Facts of instances from the source, by a program that prints them."""
    source, program = folder / "facts.cu", folder / "facts"
    lines = [
        f'  print<{i.type}>("{i.type}", "{"," if i is not instances[-1] else ""}");\n'
        for i in instances
    ]
    source.write_text(FACTS + "".join(lines) + '  std::printf("}");\n}\n', encoding="utf-8")
    run_tool("nvcc", *flags(), str(source), "-o", str(program))
    printed = json.loads(
        subprocess.run([program], capture_output=True, check=True, text=True).stdout
    )
    return {i: Facts(*printed[i.type]) for i in instances}
