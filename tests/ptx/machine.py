"""The threads of a chunk of blocks: registers, operands, and the memory they see.

A register is an array with an element a thread and is never changed in place: writing replaces it. All threads of the
chunk step together; `active` says which of them the current instruction is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptx.errors import PtxError
from ptx.memory import (
    GARBAGE,
    GLOBAL_WINDOW,
    LOCAL_WINDOW,
    ORIGIN,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_SIZE,
    Bytes,
    DeviceMemory,
)
from ptx.numbers import SCALARS, UNSIGNED, Array, Scalar, pack, unpack
from ptx.program import (
    Address,
    Immediate,
    Kernel,
    Name,
    Negated,
    Operand,
    Register,
    Variable,
    Vector,
)
from ptx.transfers import Transfers

WARP = 32
ADDRESS = SCALARS["u64"]
Dim = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what is the same for all its blocks."""

    kernel: Kernel
    memory: DeviceMemory
    symbols: dict[str, int]  # addresses of global and constant variables
    grid: Dim
    block: Dim
    dynamic_shared: int
    parameters: bytes

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))


def lay_out(variables: list[Variable], start: int) -> tuple[dict[str, int], int]:
    """Places of variables one after the other, those without a size last; and the end."""
    places, at = {}, start
    for variable in sorted(variables, key=lambda v: v.size == 0):
        at = -(-at // variable.align) * variable.align
        places[variable.name] = at
        at += variable.size
    return places, at


class Machine:
    def __init__(self, launch: Launch, blocks: NDArray[np.int64]) -> None:
        self.launch, self.blocks = launch, blocks
        self.threads = launch.threads
        self.n = n = len(blocks) * self.threads
        self.block_of = np.repeat(np.arange(len(blocks)), self.threads)
        self.everyone = np.ones(n, np.bool_)
        self.active = self.everyone
        self.left_behind: Array | None = None  # threads that must execute the instruction again
        self.registers: list[Array | None] = [None] * len(launch.kernel.registers)
        self.transfers = Transfers(np.zeros(n, np.int64))
        self._lay_out_memory()
        self._number_threads()

    def _lay_out_memory(self) -> None:
        kernel = self.launch.kernel
        self.symbols = dict(self.launch.symbols)
        shared, end = lay_out(kernel.shared, ORIGIN)
        local, local_end = lay_out(kernel.local, ORIGIN)
        parameters, parameters_end = lay_out(kernel.parameters, 0)
        self.symbols |= shared | local | parameters
        self.shared_size = end - ORIGIN + self.launch.dynamic_shared
        self.shared_stride = -(-self.shared_size // 16) * 16
        self.shared = Bytes(len(self.blocks) * self.shared_stride, GARBAGE)
        self.local_size = local_end - ORIGIN
        self.local_stride = -(-self.local_size // 16) * 16
        self.local = Bytes(self.n * self.local_stride, GARBAGE)
        if parameters_end != len(self.launch.parameters):
            raise PtxError(
                f"{kernel.name} takes {parameters_end} bytes of parameters, got {len(self.launch.parameters)}"
            )
        self.parameters = Bytes(parameters_end)
        self.parameters.bytes[:parameters_end] = np.frombuffer(self.launch.parameters, np.uint8)

    def _number_threads(self) -> None:
        grid, block = self.launch.grid, self.launch.block
        thread = np.tile(np.arange(self.threads), len(self.blocks))
        place = np.repeat(self.blocks, self.threads)
        x, xy = block[0], block[0] * block[1]
        self.lane = thread % WARP
        self.warp_in_block = thread // WARP
        self.special: dict[str, Array] = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % block[1],
            "%tid.z": thread // xy,
            "%ctaid.x": place % grid[0],
            "%ctaid.y": place // grid[0] % grid[1],
            "%ctaid.z": place // (grid[0] * grid[1]),
            "%laneid": self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_eq": 1 << self.lane,
            "WARP_SZ": np.full(1, WARP),
            "%dynamic_smem_size": np.full(1, self.launch.dynamic_shared),
        }
        for axis, name in enumerate("xyz"):
            self.special[f"%ntid.{name}"] = np.full(1, block[axis])
            self.special[f"%nctaid.{name}"] = np.full(1, grid[axis])

    # ---- Registers and operands ----

    def spread(self, value: Array) -> Array:
        """An element for every thread, where there may be one for all."""
        return value if value.shape == (self.n,) else np.broadcast_to(value, self.n)

    def predicate(self, operand: Operand) -> Array:
        """A predicate a thread; a constant 0 or 1 serves as one too."""
        if isinstance(operand, Negated):
            return ~self.predicate(operand.register)
        if isinstance(operand, Immediate):
            return np.full(self.n, operand.bits != 0)
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is not a predicate")
        return self._stored(operand)

    def _stored(self, register: Register) -> Array:
        value = self.registers[register.slot]
        if value is None:
            # Nothing was written yet: a pattern that is no sensible number.
            scalar = self.launch.kernel.registers[register.slot]
            if scalar.kind == "p":
                value = np.zeros(self.n, np.bool_)
            else:
                value = np.full(
                    self.n, 0xA5A5_A5A5_A5A5_A5A5 & (1 << 8 * scalar.size) - 1, scalar.storage
                )
            self.registers[register.slot] = value
        return value

    def bits(self, operand: Operand, size: int) -> Array:
        """`size` bytes of an operand, one element a thread or one for all."""
        storage = UNSIGNED[size]
        if isinstance(operand, Register):
            value = self._stored(operand)
            return value if value.dtype == storage else value.astype(storage)
        if isinstance(operand, Immediate):
            bits = operand.bits
            if operand.float_size == 8 and size == 4:
                bits = int(np.uint64(bits).view(np.float64).astype(np.float32).view(np.uint32))
            return np.full(1, bits & (1 << 8 * size) - 1, storage)
        if isinstance(operand, Name):
            if operand.name in self.special:
                return self.special[operand.name].astype(storage)
            if operand.name in self.symbols:
                return np.full(1, self.symbols[operand.name] & (1 << 8 * size) - 1, storage)
            raise PtxError(f"no such register or variable here: {operand.name}")
        raise PtxError(f"an operand that is not a value: {operand}")

    def read(self, operand: Operand, scalar: Scalar) -> Array:
        """An operand as numbers of a type."""
        return unpack(self.bits(operand, scalar.size), scalar)

    def write(self, operand: Operand, value: Array, scalar: Scalar) -> None:
        """Numbers into a register, where the instruction is for the thread."""
        self.write_bits(operand, pack(value, scalar))

    def write_bits(self, operand: Operand, value: Array) -> None:
        if operand is None:
            return
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write to {operand}")
        wanted = self.launch.kernel.registers[operand.slot]
        storage = np.dtype(np.bool_) if wanted.kind == "p" else wanted.storage
        if value.dtype != storage:
            if np.dtype(np.bool_) in (storage, value.dtype):
                raise PtxError(
                    f"{operand.name} is a .{wanted.name} register, the result is {value.dtype}"
                )
            value = value.astype(storage)
        if self.active is self.everyone:
            self.registers[operand.slot] = self.spread(value)
        else:
            self.registers[operand.slot] = np.where(self.active, value, self._stored(operand))

    def items(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vector) else (operand,)

    # ---- Memory ----

    def address(self, operand: Operand) -> NDArray[np.int64]:
        """Where an address operand points, in the space of the instruction."""
        if not isinstance(operand, Address):
            raise PtxError(f"an address is missing: {operand}")
        size = 8
        if isinstance(operand.base, Register):
            size = self.launch.kernel.registers[operand.base.slot].size
        address = self.bits(operand.base, size).astype(np.int64) + operand.offset
        return self.spread(address)

    def locate(
        self,
        space: str,
        address: NDArray[np.int64],
        size: int,
        write: bool,
        who: Array | None = None,
    ) -> list[tuple[Bytes, NDArray[np.int64], Array]]:
        """Backing bytes, offsets and the threads they are for; several where a generic address has several spaces."""
        who = self.active if who is None else who
        if space == "generic":
            return self._locate_generic(address, size, write, who)
        if space in ("global", "const"):
            index = address - GLOBAL_WINDOW
            wrong = self.launch.memory.outside(index, size, write)
            backing = self.launch.memory.data
        elif space == "shared":
            index = address - ORIGIN
            wrong = (index < 0) | (index + size > self.shared_size)
            index = index + self.block_of * self.shared_stride
            backing = self.shared
        elif space == "local":
            index = address - ORIGIN
            wrong = (index < 0) | (index + size > self.local_size)
            index = index + np.arange(self.n) * self.local_stride
            backing = self.local
        elif space == "param":
            index, backing = address, self.parameters
            wrong = (index < 0) | (index + size > backing.size) | write
        else:
            raise PtxError(f"there is no .{space} space here")
        self.check(who & wrong, f"{size} bytes of {space} memory at", address, "are out of bounds")
        self.check(
            who & (address % size != 0),
            f"{size} bytes of {space} memory at",
            address,
            "are not aligned",
        )
        return [(backing, index, who)]

    def _locate_generic(
        self, address: NDArray[np.int64], size: int, write: bool, who: Array
    ) -> list[tuple[Bytes, NDArray[np.int64], Array]]:
        found, rest = [], who
        windows = (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW), ("param", PARAM_WINDOW))
        for space, window in windows:
            here = rest & (address >= window) & (address < window + WINDOW_SIZE)
            if here.any():
                found += self.locate(space, address - window, size, write, here)
                rest = rest & ~here
        if rest.any() or not found:
            found += self.locate("global", address, size, write, rest)
        return found

    def load(self, space: str, address: NDArray[np.int64], size: int, count: int) -> list[Array]:
        """`count` elements of `size` bytes a thread; zeros where the thread does not take part."""
        results = [np.zeros(self.n, UNSIGNED[size]) for _ in range(count)]
        for backing, index, who in self.locate(space, address, size * count, write=False):
            safe = np.where(who, index, 0)
            for i in range(count):
                results[i] = np.where(who, backing.gather(safe + i * size, size), results[i])
        return results

    def store(self, space: str, address: NDArray[np.int64], values: list[Array]) -> None:
        size = values[0].dtype.itemsize
        for backing, index, who in self.locate(space, address, size * len(values), write=True):
            for i, value in enumerate(values):
                backing.scatter(index[who] + i * size, self.spread(value)[who], size)

    # ---- Threads ----

    def converge(self, members: Array) -> None:
        """Leaves behind the threads whose partners, by a mask of lanes a thread, have not come to this instruction."""
        here = self.active.reshape(-1, WARP)
        wanted = self.spread(members).astype(np.uint32).reshape(-1, WARP)
        present = (
            (here.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        )
        own = wanted >> np.arange(WARP, dtype=np.uint32) & 1 != 0
        self.check((here & ~own).ravel(), "lane", self.lane, "is not in its own mask of members")
        complete = (wanted & ~present[:, None] == 0) & here
        if not (complete == here).all():
            self.left_behind = (here & ~complete).ravel()
            self.active = complete.ravel()

    def check(self, wrong: Array, what: str, number: Array, problem: str) -> None:
        """Raises PtxError for the first thread for which `wrong` is true."""
        if wrong.any():
            i = int(np.argmax(wrong))
            value = int(self.spread(number)[i])
            shown = hex(value) if abs(value) > WARP else str(value)
            raise PtxError(f"{what} {shown} {problem}: {self.thread_name(i)}")

    def thread_name(self, i: int) -> str:
        at = [int(self.spread(self.special[f"%ctaid.{axis}"])[i]) for axis in "xyz"]
        return f"thread {i % self.threads} of block ({at[0]}, {at[1]}, {at[2]})"
