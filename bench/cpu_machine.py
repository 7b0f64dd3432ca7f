"""What a result of a CPU depends on: the machine, and the versions of everything that was compared."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import ggml
import torch
from cpu_timing import available_bytes, last_level_cache_bytes

from skvq_ext import ops

FLAGS = re.compile(r"avx|fma$|f16c|amx|asimd|sve|i8mm|bf16")


def cpu_model_and_flags() -> tuple[str, list[str]]:
    """As the system names them, those flags that kernels care about."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.splitlines()]
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = (found.get("flags") or found.get("Features") or "").split()
    return found.get("model name", platform.machine()), sorted(filter(FLAGS.match, flags))


def llama_description() -> dict[str, Any]:
    """Version of llama-cpp-python, and the instruction sets its kernels were compiled for."""
    try:
        features = ggml.load().features()
    except ImportError as error:
        return {"llama_cpp_python": ggml.installed_version(), "ggml": str(error)}
    return {"llama_cpp_python": ggml.installed_version(), "ggml_features": features}


def describe() -> dict[str, Any]:
    """All of it, as JSON can hold it."""
    model, flags = cpu_model_and_flags()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "flags": flags,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_available_bytes": available_bytes(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **llama_description(),
        "isa": ops.build_info()["cpu_isa"],
        "skvq_ext": ops.build_info(),
    }
