"""What a PTX text becomes: modules, kernels, instructions and their operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ptx.numbers import Scalar


@dataclass(frozen=True)
class Register:
    slot: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float of `float_size` bytes."""

    bits: int
    float_size: int = 0


@dataclass(frozen=True)
class Name:
    """A special register (%tid.x), or a variable whose address is meant."""

    name: str


@dataclass(frozen=True)
class Negated:
    """A predicate with an exclamation mark."""

    register: Register


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Name
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two destinations, p|q; a sink _ is None."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Vector:
    items: tuple[Register | Immediate | Name | None, ...]


@dataclass(frozen=True)
class Label:
    """Where a branch goes: a place in the code, or a table of them for brx.idx."""

    targets: tuple[int, ...]


Operand = Register | Immediate | Name | Negated | Address | Pair | Vector | Label | None


@dataclass
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    scalars: tuple[Scalar, ...]  # the types among the modifiers, in order
    operands: tuple[Operand, ...]
    predicate: Register | Negated | None
    text: str
    line: int  # of the PTX
    source: str = ""  # file:line of the CUDA source, where nvcc left it
    execute: Callable[..., None] | None = None  # found when it first runs

    @property
    def scalar(self) -> Scalar:
        return self.scalars[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass(frozen=True)
class Variable:
    """Memory with a name. size 0: dynamic shared memory."""

    name: str
    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    parameters: list[Variable]
    registers: list[Scalar] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
