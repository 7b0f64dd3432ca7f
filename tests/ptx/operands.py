"""Operands of an instruction, and the scopes in which their names mean something."""

from __future__ import annotations

import re

from ptx.errors import PtxError
from ptx.program import Address, Immediate, Label, Name, Negated, Operand, Pair, Register, Vector

NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
COMMA = re.compile(r",(?![^{\[]*[}\]])")


class Scope:
    """Registers and labels between two braces; inner ones hide outer ones."""

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.registers: dict[str, Register] = {}
        self.labels: dict[str, Label] = {}
        self.tables: dict[str, list[str]] = {}

    def declare(self, name: str, slot: int) -> None:
        if name in self.registers:
            raise PtxError(f"register {name} is declared twice in one scope")
        self.registers[name] = Register(slot, name)

    def find(self, name: str) -> Register | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.parent
        return None

    def register(self, name: str) -> Register:
        found = self.find(name)
        if found is None:
            raise PtxError(f"register {name} is not declared")
        return found

    def label(self, name: str) -> Label:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.tables:
                return Label(tuple(self.label(n).targets[0] for n in scope.tables[name]))
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        raise PtxError(f"there is no label {name}")


def parse_single(text: str, scope: Scope) -> Register | Immediate | Name | None:
    if text == "_":
        return None
    register = scope.find(text)
    if register is not None:
        return register
    if text[:2] in ("0f", "0F") and len(text) == 10:
        return Immediate(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        return Immediate(int(text[2:], 16), 8)
    if NUMBER.fullmatch(text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[%\w$.]+", text):
        return Name(text)
    raise PtxError(f"cannot read the operand {text}")


def parse_operand(text: str, scope: Scope) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(parse_single(part.strip(), scope) for part in text[1:-1].split(",")))
    if text.startswith("["):
        match = ADDRESS.fullmatch(text)
        base = parse_single(match[1], scope) if match else None
        if match is None or base is None:
            raise PtxError(f"cannot read the address {text}")
        return Address(base, int(match[2] or "0", 0))
    if text.startswith("!"):
        return Negated(scope.register(text[1:]))
    if "|" in text:
        first, second = (part.strip() for part in text.split("|"))
        return Pair(
            None if first == "_" else scope.register(first),
            None if second == "_" else scope.register(second),
        )
    return parse_single(text, scope)


def parse_operands(text: str, scope: Scope) -> tuple[Operand, ...]:
    return tuple(parse_operand(part.strip(), scope) for part in COMMA.split(text) if part.strip())
