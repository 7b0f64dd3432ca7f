"""The table of opcodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptx.program import Instruction

if TYPE_CHECKING:
    from ptx.machine import Machine

Execute = Callable[["Machine", Instruction], None]
Test = Callable[[Instruction], bool]


@dataclass(frozen=True)
class Handler:
    execute: Execute
    modifiers: frozenset[str]  # those it knows, types aside
    applies: Test


_TABLE: dict[str, list[Handler]] = {}


def instruction(
    *opcodes: str, modifiers: str = "", applies: Test = lambda _: True
) -> Callable[[Execute], Execute]:
    """Registers a function for opcodes. `modifiers`: those it knows; `applies`: tells variants of an opcode apart."""

    def register(execute: Execute) -> Execute:
        handler = Handler(execute, frozenset(modifiers.split()), applies)
        for opcode in opcodes:
            _TABLE.setdefault(opcode, []).append(handler)
        return execute

    return register


def find(wanted: Instruction) -> Handler | None:
    return next((h for h in _TABLE.get(wanted.opcode, []) if h.applies(wanted)), None)


def is_float(wanted: Instruction) -> bool:
    return bool(wanted.scalars) and wanted.scalar.kind == "f"


def is_integer(wanted: Instruction) -> bool:
    return bool(wanted.scalars) and wanted.scalar.kind in "usb"
