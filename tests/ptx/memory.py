"""Memory of the device: buffers between gaps that nobody may touch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ptx.errors import PtxError
from ptx.numbers import UNSIGNED, Array

# The generic address space: a window for each space. Addresses of shared and local memory inside their own space are
# offsets from ORIGIN, so that a generic address that is taken for one of them, or the other way round, is noticed.
GLOBAL_WINDOW = 0x7000_0000_0000
SHARED_WINDOW = 0x0100_0000_0000
LOCAL_WINDOW = 0x0200_0000_0000
PARAM_WINDOW = 0x0300_0000_0000
WINDOW_SIZE = 0x0080_0000_0000
ORIGIN = 1024
GARBAGE = 0xFF


class Bytes:
    """Bytes with views of every element size."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self.size = size
        self.bytes = np.full((size + 15) // 16 * 16 + 16, fill, np.uint8)
        self.views = {n: self.bytes.view(t) for n, t in UNSIGNED.items()}

    def gather(self, index: NDArray[np.int64], size: int) -> Array:
        """Elements of `size` bytes at byte offsets that are multiples of it."""
        return self.views[size][index >> size.bit_length() - 1]

    def scatter(self, index: NDArray[np.int64], values: Array, size: int) -> None:
        self.views[size][index >> size.bit_length() - 1] = values


class DeviceMemory:
    """Global memory. Buffers lie at least `GAP` bytes apart, and every byte outside a buffer is out of bounds."""

    GAP = 256
    ALIGN = 256  # as cudaMalloc gives

    def __init__(self, size: int = 1 << 22) -> None:
        self.data = Bytes(size)
        self.readable = np.zeros(size, np.bool_)
        self.writable = np.zeros(size, np.bool_)
        self.top = self.GAP

    def _grow(self, size: int) -> None:
        if size <= self.data.size:
            return
        bigger = DeviceMemory(max(size, 2 * self.data.size))
        bigger.data.bytes[: self.data.size] = self.data.bytes[: self.data.size]
        bigger.readable[: self.data.size] = self.readable
        bigger.writable[: self.data.size] = self.writable
        self.data, self.readable, self.writable = bigger.data, bigger.readable, bigger.writable

    def reserve(self, size: int, *, writable: bool = True) -> int:
        """Address of `size` new bytes of garbage."""
        at = self.top
        self.top = -(-(at + size + self.GAP) // self.ALIGN) * self.ALIGN
        self._grow(self.top)
        self.data.bytes[at : at + size] = GARBAGE
        self.readable[at : at + size] = True
        self.writable[at : at + size] = writable
        return GLOBAL_WINDOW + at

    def put(self, array: Array | bytes, *, writable: bool = True) -> int:
        """Address of a copy of `array`."""
        raw = (
            np.frombuffer(array, np.uint8)
            if isinstance(array, bytes)
            else np.ascontiguousarray(array)
        )
        raw = raw.reshape(-1).view(np.uint8)
        address = self.reserve(raw.size, writable=writable)
        start = address - GLOBAL_WINDOW
        self.data.bytes[start : start + raw.size] = raw
        return address

    def get(self, address: int, dtype: DTypeLike, shape: tuple[int, ...]) -> Array:
        """A copy of what lies at `address`."""
        kind: np.dtype[Any] = np.dtype(dtype)
        start, size = address - GLOBAL_WINDOW, int(np.prod(shape)) * kind.itemsize
        if start < 0 or not self.readable[start : start + size].all():
            raise PtxError(f"{size} bytes at {address:#x} are not all inside a buffer")
        return self.data.bytes[start : start + size].copy().view(kind).reshape(shape)

    def fill(self, address: int, value: int, size: int) -> None:
        """cudaMemset."""
        start = address - GLOBAL_WINDOW
        if start < 0 or not self.writable[start : start + size].all():
            raise PtxError(f"{size} bytes at {address:#x} are not all inside a buffer")
        self.data.bytes[start : start + size] = value

    def outside(
        self, index: NDArray[np.int64], size: int | NDArray[np.int64], write: bool
    ) -> Array:
        """Which accesses of at most GAP bytes touch a byte they may not."""
        allowed = self.writable if write else self.readable
        last = index + size - 1
        inside = (index >= 0) & (last < allowed.size)
        return ~inside | ~allowed[np.where(inside, index, 0)] | ~allowed[np.where(inside, last, 0)]

    def check_range(self, start: int, size: int, write: bool) -> bool:
        allowed = self.writable if write else self.readable
        return (
            start >= 0
            and start + size <= allowed.size
            and bool(allowed[start : start + size].all())
        )
