"""Launching a kernel over a grid."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from ptx.errors import PtxError
from ptx.machine import WARP, Dim, Launch, Machine, lay_out
from ptx.memory import DeviceMemory
from ptx.parse import Module
from ptx.program import Kernel
from ptx.schedule import Schedule, describe

Argument = int | float | bytes | np.generic | ctypes.Structure
CHUNK = 8192  # threads that step together: an instruction costs about the same for one and for thousands


class Program:
    """A module loaded into a device's memory."""

    def __init__(self, text: str, memory: DeviceMemory) -> None:
        self.module = Module.parse(text)
        self.memory = memory
        self.symbols: dict[str, int] = {}
        for variable in self.module.variables:
            data = variable.data.ljust(variable.size, b"\0")
            writable = variable.name not in self.module.constants
            self.symbols[variable.name] = memory.put(data, writable=writable)

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument] | bytes,
        *,
        dynamic_shared: int = 0,
        seed: int | None = None,
    ) -> int:
        """Runs a grid to its end.

        Args:
            name: of the kernel, mangled.
            grid, block: up to three sizes.
            arguments: integers, floats, structs; or the parameter bytes as a whole.
            dynamic_shared: bytes behind the shared variables of the kernel.
            seed: runs the warps of a block one after the other, see `Schedule`. None: all together.

        Returns:
            Number of instructions that were stepped through.
        """
        kernel = self.module.kernel(name)
        parameters = arguments if isinstance(arguments, bytes) else marshal(kernel, arguments)
        launch = Launch(
            kernel, self.memory, self.symbols, three(grid), three(block), dynamic_shared, parameters
        )
        if launch.threads % WARP:
            raise PtxError(f"{launch.threads} threads a block are no whole warps")
        count, steps = int(np.prod(launch.grid)), 0
        at_once = max(1, CHUNK // launch.threads)
        for first in range(0, count, at_once):
            blocks = np.arange(first, min(first + at_once, count))
            steps += run(Machine(launch, blocks), seed)
        return steps


def run(machine: Machine, seed: int | None) -> int:
    schedule = Schedule(machine, seed)
    try:
        schedule.run()
        machine.transfers.check_finished(machine)
    except PtxError as error:
        kernel = machine.launch.kernel
        place = describe(kernel.code[min(schedule.at, len(kernel.code) - 1)])
        raise PtxError(f"{error}\n  in {kernel.name}, {place}") from error
    return schedule.steps


def three(sizes: Sequence[int]) -> Dim:
    x, y, z = (*sizes, 1, 1)[:3]
    return (x, y, z)


def marshal(kernel: Kernel, arguments: Sequence[Argument]) -> bytes:
    """Arguments as the bytes of the kernel's parameters."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(
            f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}"
        )
    places, end = lay_out(kernel.parameters, 0)
    out = bytearray(end)
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        if isinstance(argument, float):
            raw = np.dtype(f"f{parameter.size}").type(argument).tobytes()
        elif isinstance(argument, int):
            raw = argument.to_bytes(parameter.size, "little", signed=argument < 0)
        else:
            raw = argument.tobytes() if isinstance(argument, np.generic) else bytes(argument)
        if len(raw) != parameter.size:
            raise PtxError(f"{parameter.name} has {parameter.size} bytes, the argument {len(raw)}")
        out[places[parameter.name] : places[parameter.name] + len(raw)] = raw
    return bytes(out)
