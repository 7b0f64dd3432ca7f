"""Scheme strings: bits, group, window, sinks, metadata and transform of a packed cache."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from skvq_ext.format import RecordFormat

TRANSFORMS = ("centre", "balance", "hadamard")
GROUPS = (32, 64, 128, 0)
METAS = ("fp8", "fp16")

_WIDTH = r"(?:8|4|3|2|1\.5fast|1\.5)"
_FORMAT = rf"{_WIDTH}(?::\d+/\d+\+{_WIDTH})?"
_FORMAT_HELP = "8, 4, 3, 2, 1.5, 1.5fast, or two bands such as 3:1/2+2"

MIXED = "mix"  # the format of K and V where the plan says which head has which

_NOT_PER_HEAD = "it reorders channels across KV heads, which no per-head kernel can read"
_BASELINE = "it is a baseline of the original's tables, not a format of this cache"
_FILTER = "only sinks and the window stay in full precision here (use sink<N> and w<N>)"
REFUSED = {
    "reorder": f"{_NOT_PER_HEAD}; two bands (k3:1/2+2) sort channels within a head",
    "rod": f"{_NOT_PER_HEAD}; two bands (k3:1/2+2) sort channels within a head",
    "smooth": "'balance' is the scaling that is calibrated here, for both K and V",
    "smoothquant": _BASELINE,
    "pre_rope": "keys are cached after RoPE, so that decoding need not rotate the history",
    "kivi": _BASELINE,
    "rtn": f"{_BASELINE}; 'identity-w0-sink0' is plain rounding to nearest",
    "rptq": _BASELINE,
    "h2o": _FILTER,
    "random": _FILTER,
}
_SPELLINGS = {
    "center": "centre",
    "group": "g",
    "kivi_mode": "kivi",
    "prerope": "pre_rope",
    "sinks": "sink",
    "window": "w",
}
_VALUE_KEYS = ("k", "v", "bits", "g", "w", "sink", "fp", "clip", "rollback")
_KNOWN = (
    "k",
    "v",
    "bits",
    "g",
    "w",
    "sink",
    *METAS,
    *TRANSFORMS,
    "clip",
    "identity",
    "rollback",
    "ghead",
)


class SchemeError(ValueError):
    """A scheme that cannot be read, or whose parts do not fit together."""


@dataclass(frozen=True)
class Scheme:
    """How one cache stores its tokens; `parse` reads the string form, `str` writes it.

    k, v: tensor formats, MIXED where bits is given. group: channels sharing a scale and zero, 0 = the whole head.
    window, sinks: newest and oldest tokens kept in full precision. meta: type of scale and zero.
    rollback: newest tokens that can be taken back exactly. transform: subset of TRANSFORMS, None =
    what the plan holds (without a plan: hadamard). clip: shrink of a group's range about its
    midpoint, None = calibrated per group (without a plan: a fixed ratio), 1 = none.
    bits: average stored bits per value, scales and zeros included, that a plan may spend; it then
    chooses the formats of every head.
    """

    k: str = "2"
    v: str = "1.5"
    group: int = 128
    window: int = 128
    sinks: int = 5
    meta: str = "fp8"
    rollback: int = 64
    transform: frozenset[str] | None = None
    clip: float | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 < self.bits <= 9:
            raise SchemeError(f"bits{self.bits:g}: the budget must lie in 1 .. 9 bits per value.")
        for name in ("k", "v"):
            if (getattr(self, name) == MIXED) != (self.bits is not None):
                raise SchemeError(
                    f"{name}{getattr(self, name)}: formats and a budget of bits exclude each other; "
                    f"{MIXED!r} stands for what a plan chooses within 'bits<N>'."
                )
            if self.bits is None and not re.fullmatch(_FORMAT, getattr(self, name)):
                raise SchemeError(
                    f"{name}{getattr(self, name)}: not a tensor format. Known: {_FORMAT_HELP}."
                )
        if self.group not in GROUPS:
            raise SchemeError(f"g{self.group}: the group must be 32, 64, 128 or 'ghead'.")
        if self.meta not in METAS:
            raise SchemeError(f"{self.meta!r}: scale and zero are stored as fp8 or fp16.")
        for name in ("window", "sinks", "rollback"):
            if getattr(self, name) < 0:
                raise SchemeError(f"{name} must be 0 or more tokens, got {getattr(self, name)}.")
        if self.transform is not None and not self.transform <= set(TRANSFORMS):
            unknown = sorted(self.transform - set(TRANSFORMS))
            raise SchemeError(f"unknown transform {unknown}; known: {list(TRANSFORMS)}.")
        if self.clip is not None and not 0.01 <= self.clip <= 1:
            raise SchemeError(f"clip{self.clip:g}: the clip ratio must lie in 0.01 .. 1.")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Reads a scheme such as 'k2-v1.5-g128-w128-sink5-fp8' or 'K2V1.5 g128 w128'.

        Keys may stand in any order, separated by '-', ',' or blanks; case does not matter.
        Raises: SchemeError on an unknown, refused or repeated key or a bad value.
        """
        read = _Read()
        for token in re.split(r"[-,\s]+", text.strip().lower()):
            if token:
                _read_token(token, read)
        if not read.values and not read.transform:
            raise SchemeError("the scheme is empty; an example: 'k2-v1.5-g128-w128-sink5-fp8'.")
        return cls(**read.arguments())  # type: ignore[arg-type]

    def __str__(self) -> str:
        group = "ghead" if self.group == 0 else f"g{self.group}"
        formats = [f"k{self.k}", f"v{self.v}"] if self.bits is None else [f"bits{self.bits!r}"]
        parts = [*formats, group, f"w{self.window}", f"sink{self.sinks}"]
        parts.append(self.meta)
        if self.rollback != Scheme.rollback:
            parts.append(f"rollback{self.rollback}")
        if self.transform is not None:
            parts += [name for name in TRANSFORMS if name in self.transform] or ["identity"]
        if self.clip is None:
            parts += [] if self.transform is None else ["clip"]
        elif self.clip != 1.0 or self.transform is None:
            parts.append(f"clip{self.clip!r}")
        return "-".join(parts)

    def record_format(self, head_dim: int, device: torch.device | str = "cpu") -> RecordFormat:
        """The record of one KV head and 64 tokens, arranged for a device; the C++ definition checks
        that it exists. Raises: SchemeError where every head has a format of its own."""
        from skvq_ext.format import RecordFormat, default_arrangement

        if self.bits is not None:
            raise SchemeError(
                f"{self}: a budget of bits says nothing about formats until a plan has spent it; "
                "make one with 'skvq calibrate' and pass it, or name formats, as in 'k2-v1.5'."
            )

        arrangement = default_arrangement(device)
        return RecordFormat(self.k, self.v, self.group, self.meta, head_dim, arrangement)

    def differences(self, other: Scheme) -> list[str]:
        """What makes a plan of `other` useless for this scheme, one line per field.

        Window, sinks and rollback may differ: they do not touch what a plan holds. A transform or
        clip of None takes what the plan has.
        """
        names = ["k", "v", "bits", "group", "meta"]
        names += [name for name in ("transform", "clip") if getattr(self, name) is not None]
        return [
            f"{name}: {_plain(mine)} here, {_plain(theirs)} in the plan"
            for name in names
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


def _plain(value: object) -> str:
    return "-".join(sorted(value)) or "identity" if isinstance(value, frozenset) else repr(value)


@dataclass
class _Read:
    """What the tokens of a scheme string said so far."""

    values: dict[str, object] = field(default_factory=dict)
    transform: list[str] = field(default_factory=list)

    def put(self, name: str, value: object, token: str) -> None:
        if name in self.values:
            raise SchemeError(f"{token!r}: {name} is given twice; keep one.")
        self.values[name] = value

    def arguments(self) -> dict[str, object]:
        arguments = dict(self.values)
        clipped = arguments.pop("clip", False)  # False: no such key; None: 'clip' without a number
        if arguments.get("bits") is not None:
            if {"k", "v"} & set(arguments):
                raise SchemeError("'bits' lets a plan choose the formats; drop it, or k and v.")
            arguments["k"] = arguments["v"] = MIXED
        if "identity" in self.transform and len(self.transform) > 1:
            raise SchemeError("'identity' means no transform; drop it or the other transforms.")
        if self.transform:
            arguments["transform"] = frozenset(self.transform) - {"identity"}
            arguments["clip"] = 1.0 if clipped is False else clipped
        elif clipped is not False:
            arguments["clip"] = clipped
        return arguments


_FIELD = {"g": "group", "w": "window", "sink": "sinks", "rollback": "rollback"}


def _read_token(token: str, read: _Read) -> None:
    together = re.fullmatch(rf"k({_FORMAT})v({_FORMAT})", token)
    if together:
        read.put("k", together[1], token)
        read.put("v", together[2], token)
        return
    match = re.fullmatch(r"([a-z_]+)(.*)", token)
    key, value = (match[1], match[2]) if match else (token, "")
    key = _SPELLINGS.get(key, key)
    if key == "h" or key in REFUSED:
        name = "h2o" if key == "h" else key
        raise SchemeError(
            f"{token!r} is a key of the original SKVQ, refused here: {REFUSED[name]}."
        )
    if not value and key in (*TRANSFORMS, "identity"):
        if key in read.transform:
            raise SchemeError(f"{token!r} is given twice; keep one.")
        read.transform.append(key)
    elif key == "ghead" and not value:
        read.put("group", 0, token)
    elif key in ("k", "v"):
        read.put(key, _format(token, key, value), token)
    elif key == "fp" and f"fp{value}" in METAS:
        read.put("meta", f"fp{value}", token)
    elif key == "bits":
        read.put("bits", _number(token, value, "bits2.25"), token)
    elif key == "clip":
        read.put("clip", _number(token, value, "clip0.92") if value else None, token)
    elif key in _FIELD:
        read.put(_FIELD[key], _whole(token, value), token)
    else:
        raise SchemeError(_unknown(token, key))


def _format(token: str, key: str, value: str) -> str:
    if not re.fullmatch(_FORMAT, value):
        raise SchemeError(
            f"{token!r}: {value!r} is not a tensor format for {key}. Known: {_FORMAT_HELP}."
        )
    return value


def _whole(token: str, value: str) -> int:
    if not value.isdecimal():
        raise SchemeError(f"{token!r}: needs a whole number right behind the key, as in 'w128'.")
    return int(value)


def _number(token: str, value: str, example: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SchemeError(f"{token!r}: {value!r} is not a number, as in {example!r}.") from None


def _unknown(token: str, key: str) -> str:
    nearest = get_close_matches(token, _KNOWN, 1, 0.0) if key in _VALUE_KEYS else None
    nearest = nearest or get_close_matches(key, (*_KNOWN, *REFUSED, *_SPELLINGS), 1, 0.0)
    guess = _SPELLINGS.get(nearest[0], nearest[0])
    hint = f"nearest: {guess!r}"
    if guess in REFUSED:
        hint += f", which is refused: {REFUSED[guess]}"
    return f"unknown key {token!r} in the scheme; {hint}. Known keys: {', '.join(_KNOWN)}."
