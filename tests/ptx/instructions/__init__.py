"""What each opcode does. Importing the package registers all of them."""

from __future__ import annotations

from collections.abc import Callable

from ptx.errors import PtxError
from ptx.instructions import bits, convert, copies, floating, integer, matrix, memory, warp
from ptx.instructions.registry import Handler, find
from ptx.program import Instruction

__all__ = ["executor"]

# Imported for what they register.
_MODULES = (bits, convert, copies, floating, integer, matrix, memory, warp)


def executor(instruction: Instruction) -> Callable[..., None]:
    """The function that executes `instruction`, or an error that names what is not known about it."""
    handler: Handler | None = find(instruction)
    if handler is None:
        raise PtxError(f"the interpreter does not know the instruction {instruction.text}")
    names = {s.name for s in instruction.scalars}
    unknown = [m for m in instruction.modifiers if m not in handler.modifiers and m not in names]
    if unknown:
        raise PtxError(f"the interpreter does not know .{unknown[0]} of {instruction.text}")
    return handler.execute
