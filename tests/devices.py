"""Whose kernels a test runs: the CPU's, a GPU's, or the CUDA kernels in the emulator.

With SKVQ_LIBRARY=.../_C_simt.so (tests/test_simt_ops.py) the operators run the CUDA kernels thread by
thread on the CPU's tensors, so the device "cpu" then has the dtypes and formats of CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from skvq_ext import RecordFormat, build_info, ops
from skvq_ext.format import default_arrangement

CUDA = build_info()["cuda"]
EMULATED = CUDA is not None and CUDA["archs"] == "emulated"
NAMES = ["cpu"] if EMULATED else ["cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """A torch device and what its kernels can do."""

    name: str

    @property
    def tensor_cores(self) -> bool:
        """Attention takes float16 or bfloat16 and the formats that were built."""
        return self.name == "cuda" or EMULATED

    @property
    def checks_contents(self) -> bool:
        """Bad page ids, lengths and ratios are errors; on a GPU nobody looks at them."""
        return self.name == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The most precise one that attention takes."""
        return torch.float16 if self.tensor_cores else torch.float32

    def arrange(self, fmt: RecordFormat) -> RecordFormat:
        """A format in this device's arrangement, unless a test asked for another one."""
        plain = fmt.arrangement == default_arrangement("cpu")
        return replace(fmt, arrangement=default_arrangement(self.name)) if plain else fmt

    def needs_decode(self, fmt: RecordFormat, dtype: torch.dtype) -> None:
        """Skips the test where attention over this format was not built for this device."""
        try:
            ops.check_decode_format(fmt.args, fmt.head_dim, dtype, self.name)
        except ValueError as error:
            pytest.skip(_why(str(error)))


def _why(error: str) -> str:
    """The kind of error alone, so that pytest counts its skips together."""
    kinds = {
        "no CUDA decode kernel was built for": "no CUDA decode kernel was built for this format",
        "the CUDA decode kernel takes float16 or bfloat16": "attention on CUDA takes no float32",
        "the CUDA kernels keep pages in": "attention on CUDA reads one arrangement only",
    }
    return next((kind for text, kind in kinds.items() if text in error), error)


CPU = Device("cpu")


def get_device(name: str) -> Device:
    """The device, or a skip that says what is missing."""
    if name == "cuda":
        if CUDA is None:
            pytest.skip("no CUDA kernels in this build")
        if not torch.cuda.is_available():
            pytest.skip("no GPU that PyTorch can use")
    return Device(name)
