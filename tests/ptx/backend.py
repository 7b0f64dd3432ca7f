"""The CUDA backend on the interpreter: its host code runs natively, its launches are interpreted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

from ptx.compiler import ROOT, Compiled, Source, compile_all, link
from ptx.errors import PtxError
from ptx.launch import Program
from ptx.machine import lay_out
from ptx.memory import DeviceMemory
from ptx.structs import AppendArgs, DecodeArgs

Launcher = CFUNCTYPE(c_int, c_char_p, POINTER(c_uint), POINTER(c_uint), c_size_t, POINTER(c_void_p))
Filler = CFUNCTYPE(c_int, c_void_p, c_int, c_size_t)


@dataclass(frozen=True)
class Device:
    """What the host code is told about the GPU."""

    arch: int
    multiprocessors: int = 2
    shared_bytes: int = 100 * 1024


@dataclass
class Launched:
    """A launch that was interpreted."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    steps: int


@dataclass
class Backend:
    """One library on one device. Kernels come from `modules`, which may differ from what the library was built with."""

    library: Path
    modules: Sequence[str]  # PTX texts
    device: Device
    memory: DeviceMemory = field(default_factory=DeviceMemory)
    seed: int | None = None  # of the order of warps, see schedule.py
    launches: list[Launched] = field(default_factory=list)

    @staticmethod
    def build(sources: Sequence[Source], device: Device) -> Backend:
        compiled: list[Compiled] = compile_all(sources)
        library = link([c.object for c in compiled])
        return Backend(library, [c.text(device.arch) for c in compiled if c.ptx], device)

    def __post_init__(self) -> None:
        programs = [Program(text, self.memory) for text in self.modules]
        self.programs = {name: p for p in programs for name in p.module.entries}
        self.calls = ctypes.CDLL(str(self.library))
        self.error: Exception | None = None
        # ctypes does not keep callbacks alive.
        self.callbacks = (Launcher(self._launch), Filler(self._fill))
        for name in ("ptx_append", "ptx_decode_attention", "ptx_decode_workspace_bytes"):
            getattr(self.calls, name).restype = c_char_p

    def _launch(
        self, name: bytes, grid: object, block: object, shared: int, arguments: object
    ) -> int:
        try:
            kernel = name.decode()
            if kernel not in self.programs:
                raise PtxError(f"no module has the kernel {kernel}")
            program = self.programs[kernel]
            parameters = program.module.kernel(kernel).parameters
            places, end = lay_out(parameters, 0)
            raw = bytearray(end)
            for parameter, pointer in zip(parameters, arguments[: len(parameters)], strict=True):  # type: ignore[index]
                at = places[parameter.name]
                raw[at : at + parameter.size] = ctypes.string_at(pointer, parameter.size)
            sizes = tuple(grid[:3]), tuple(block[:3])  # type: ignore[index]
            steps = program.launch(
                kernel, *sizes, bytes(raw), dynamic_shared=shared, seed=self.seed
            )
            self.launches.append(Launched(kernel, *sizes, shared, steps))
        except Exception as error:  # an exception cannot cross the C++ that called
            self.error = error
            return 1
        return 0

    def _fill(self, address: int, value: int, size: int) -> int:
        try:
            self.memory.fill(address, value, size)
        except PtxError as error:
            self.error = error
            return 1
        return 0

    def _call(self, name: str, *arguments: object) -> None:
        # The library is shared by all backends that were built from the same files: it serves who called last.
        device = self.device
        self.calls.ptx_device(*self.callbacks, device.multiprocessors, device.shared_bytes)
        message = getattr(self.calls, name)(*arguments)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if message is not None:
            raise RuntimeError(message.decode())

    def append(self, args: AppendArgs) -> None:
        self._call("ptx_append", byref(args))

    def decode_attention(self, args: DecodeArgs) -> None:
        size = c_size_t()
        self._call("ptx_decode_workspace_bytes", byref(args), byref(size))
        workspace = self.memory.reserve(size.value)
        self._call("ptx_decode_attention", byref(args), c_void_p(workspace))


HOST = ROOT / "tests" / "ptx" / "host"
KERNELS = ROOT / "tests" / "ptx" / "kernels"
SMALL_INSTANCE = KERNELS / "small_instance.cu"


def backend_sources() -> list[Source]:
    """append, decode with the instances of tests/ptx/kernels, and what they need."""
    cuda = ROOT / "csrc" / "cuda"
    return [
        Source(HOST / "runtime.cpp"),
        Source(HOST / "interface.cpp"),
        Source(ROOT / "csrc" / "core" / "format_text.cpp"),
        Source(cuda / "device.cu"),
        Source(cuda / "append.cu"),
        Source(cuda / "combine.cu"),
        Source(cuda / "decode.cu", (HOST / "list",)),
        Source(KERNELS / "instances.cu"),
        Source(SMALL_INSTANCE),
    ]
