"""Options of a baseline, read from words such as "k2-v2-g32-w128-sink5"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from skvq_ext.baselines.coding import BaselineError

WIDTHS = ("8", "4", "3", "2", "1.5")
_FIRST = ("k", "v", "g")  # keys in front of all others when options are written
_Chosen = TypeVar("_Chosen", bound="Options")


def words(*choices: str) -> Any:
    """A field that is named by its value; the first is the default."""
    return field(default=choices[0], metadata={"words": choices})


def widths(*choices: str, default: str = "2") -> Any:
    """A field that holds a number format."""
    return field(default=default, metadata={"widths": choices or WIDTHS})


@dataclass(frozen=True)
class Options:
    """What all baselines are told; fields carry the names of the keys.

    k, v: number formats, v = k where it is left out. w: newest tokens that stay exact; sink: first
    ones that do.
    """

    k: str = widths()
    v: str = widths(default="")
    w: int = 128
    sink: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "v", self.v or self.k)

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """Name and format of both tensors."""
        return ("k", self.k), ("v", self.v)

    def __str__(self) -> str:
        keys = sorted(fields(self), key=lambda f: f.name not in _FIRST)
        return "-".join(_written(f, getattr(self, f.name)) for f in keys)


def parse(text: str, kind: type[_Chosen]) -> _Chosen:
    """Reads options in any order, separated by '-', ',' or blanks; case does not matter.

    Raises: BaselineError on an unknown or repeated key or a bad value.
    """
    known = {f.name: f for f in fields(kind)}
    named = {word: f for f in known.values() for word in f.metadata.get("words", ())}
    values: dict[str, Any] = {}
    for token in re.split(r"[-,\s]+", text.strip().lower()):
        if not token:
            continue
        if token in named:
            name, value = named[token].name, token
        else:
            name, value = _read(token, known)
        if name in values:
            raise BaselineError(f"{token!r}: {name!r} is given twice; keep one.")
        values[name] = value
    return kind(**values)


def _read(token: str, known: dict[str, Field[Any]]) -> tuple[str, Any]:
    match = re.fullmatch(r"([a-z]+)(.*)", token)
    if match is None or match[1] not in known or "words" in known[match[1]].metadata:
        raise BaselineError(f"unknown key {token!r}; known: {', '.join(_keys(known.values()))}.")
    name, value = match[1], match[2]
    choices = known[name].metadata.get("widths")
    if choices:
        if value not in choices:
            raise BaselineError(f"{token!r}: {name} is one of {', '.join(choices)}.")
        return name, value
    if isinstance(known[name].default, int):
        if not value.isdecimal():
            raise BaselineError(f"{token!r}: needs a whole number right behind the key.")
        return name, int(value)
    try:
        return name, float(value)
    except ValueError:
        raise BaselineError(f"{token!r}: needs a number right behind the key.") from None


def _keys(known: Iterable[Field[Any]]) -> list[str]:
    return ["|".join(f.metadata["words"]) if "words" in f.metadata else f.name for f in known]


def _written(key: Field[Any], value: Any) -> str:
    if "words" in key.metadata:
        return str(value)
    return f"{key.name}{value:g}" if isinstance(value, float) else f"{key.name}{value}"


def average(k: float, v: float) -> float:
    """Bits per value over both tensors, which hold equally many."""
    return (k + v) / 2
