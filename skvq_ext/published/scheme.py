"""The scheme strings of the original SKVQ, with the traps of its parser refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

BITS = ("4", "3", "2", "1.5")
EXAMPLE = "k2-v2-g128-w128-reorder-pre_rope-clip-sink5-fp8"

_FIRST = ("k", "v", "g", "w")
_WHAT = {"k": "bits of K", "v": "bits of V", "g": "group", "w": "window"}
_SWITCHES = {
    "reorder": "reorder",
    "rod": "reorder",
    "pre_rope": "pre_rope",
    "fp8": "fp8",
    "fp16": "fp16",
    "round_first": "round_first",
}
_ELSEWHERE = "it is another method of the original's tables; see skvq_ext.baselines"
_OTHER_PROTOCOL = (
    "the original runs it without window and sinks and lets the prompt read quantized keys, unlike "
    "SKVQ; as a method under the same protocol see skvq_ext.baselines"
)
_REFUSED = {
    "reoder": "so the original's examples spell it, and its parser then runs without any reorder "
    "and says nothing. Write 'reorder'",
    "smooth": "the original leaves out the step that makes its smoothing files. Drop it",
    "kivi": _ELSEWHERE,
    "rtn": _OTHER_PROTOCOL,
    "rptq": _OTHER_PROTOCOL,
    "smoothquant": _OTHER_PROTOCOL,
    "h2o": "heavy hitters are not kept here; sinks and the window are the full-precision tokens",
    "random": "random tokens are not kept here; sinks and the window are the full-precision tokens",
}


class PublishedSchemeError(ValueError):
    """A scheme string that cannot be read, or that the original would read as something else."""


@dataclass(frozen=True)
class PublishedScheme:
    """How the published method stores a cache; `parse` reads the original's string, `str` writes it.

    k, v: bits, one of BITS. group: channels of a group on average with reorder, exactly without.
    window, sinks: newest and oldest tokens in full precision. meta: type of scale and zero, fp8
    (E4M3) or fp16. reorder: K-Means groups across the heads of a layer; False: neighbours form
    groups. pre_rope: keys are quantized before RoPE. clip: None = one ratio per group, calibrated
    (the paper); 1 = none; else one ratio for all (the released code: 0.92). round_first: codes are
    computed against the rounded scale and zero; the released code rounds FP8 afterwards.
    """

    k: str = "2"
    v: str = "2"
    group: int = 128
    window: int = 128
    sinks: int = 0
    meta: str = "fp16"
    reorder: bool = False
    pre_rope: bool = False
    clip: float | None = 1.0
    round_first: bool = False

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            _check_bits(f"{name}{getattr(self, name)}", getattr(self, name))
        if self.group < 1:
            raise PublishedSchemeError(f"g{self.group}: a group holds at least one channel.")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise PublishedSchemeError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.meta not in ("fp8", "fp16"):
            raise PublishedSchemeError(f"{self.meta!r}: scale and zero are stored as fp8 or fp16.")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise PublishedSchemeError(f"clip{self.clip:g}: the clip ratio lies in (0, 1].")

    @classmethod
    def parse(cls, text: str) -> PublishedScheme:
        """Reads a string such as 'k2-v2-g128-w128-reorder-pre_rope-clip-sink5-fp8'.

        The first four fields are bits of K, bits of V, group and window; the rest may come in any
        order. 'clip' calibrates a ratio per group, as the paper does; 'clip0.92', the form of the
        original's result tags, gives one to all. 'round_first' is not a word of the original.
        Raises: PublishedSchemeError, also where the original would silently read something else.
        """
        fields = text.strip().split("-")
        for field in fields:
            _refuse(field)
        arguments = _positional(fields)
        given: set[str] = set()
        for token in fields[len(_FIRST) :]:
            name, value = _option(token)
            if name in given:
                raise PublishedSchemeError(f"{token!r}: {name} is given twice; keep one.")
            given.add(name)
            arguments[name] = value
        return cls(**arguments)  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = [f"k{self.k}", f"v{self.v}", f"g{self.group}", f"w{self.window}"]
        parts += [name for name in ("reorder", "pre_rope") if getattr(self, name)]
        if self.clip is None:
            parts.append("clip")
        elif self.clip != 1:
            parts.append(f"clip{self.clip!r}")
        parts += [f"sink{self.sinks}"] if self.sinks else []
        parts += ["fp8"] if self.meta == "fp8" else []
        return "-".join(parts + (["round_first"] if self.round_first else []))


def _refuse(token: str) -> None:
    match = re.fullmatch(r"([a-z_0-9]*[a-z])([\d.]*)", token.lower())
    if match and match[1] in _REFUSED:
        raise PublishedSchemeError(f"{token!r} is refused: {_REFUSED[match[1]]}.")


def _positional(fields: list[str]) -> dict[str, object]:
    """Bits, group and window. The original takes them by position and ignores their letters."""
    named: dict[str, str] = {}
    for position, token in enumerate(fields[: len(_FIRST)]):
        match = re.fullmatch(r"([kvgw])([\d.]+)", token)
        if match is None or match[1] in named:
            raise PublishedSchemeError(
                f"{token!r}: field {position + 1} of a scheme is {_FIRST[position]}<number>, "
                f"{_WHAT[_FIRST[position]]}; the original takes the first four by position. "
                f"An example: {EXAMPLE!r}."
            )
        named[match[1]] = match[2]
    if len(named) < len(_FIRST):
        missing = _FIRST[len(named)]
        raise PublishedSchemeError(
            f"{'-'.join(fields)!r} has no {missing}<number>, {_WHAT[missing]}. "
            f"An example: {EXAMPLE!r}."
        )
    for letter, read in zip(_FIRST, named.values(), strict=True):
        if named[letter] != read:
            swapped = "-".join(f"{name}{value}" for name, value in named.items())
            sorted_ = "-".join(f"{name}{named[name]}" for name in _FIRST)
            as_read = "-".join(f"{n}{v}" for n, v in zip(_FIRST, named.values(), strict=True))
            raise PublishedSchemeError(
                f"{swapped!r}: the original takes these fields by position whatever their letters "
                f"say, and would run {as_read!r}. Write that, or {sorted_!r} if it is what you mean."
            )
    _check_bits(f"k{named['k']}", named["k"])
    _check_bits(f"v{named['v']}", named["v"])
    whole = {
        name: _whole(f"{letter}{named[letter]}", named[letter])
        for letter, name in (("g", "group"), ("w", "window"))
    }
    return {"k": _plain(named["k"]), "v": _plain(named["v"]), **whole}


def _option(token: str) -> tuple[str, object]:
    """Field of `PublishedScheme` that a token sets, and its value."""
    match = re.fullmatch(r"(sink|clip)([\d.]*)", token)
    if match and match[1] == "sink":
        return "sinks", _whole(token, match[2])
    if match:
        return "clip", _ratio(token, match[2]) if match[2] else None
    name = _SWITCHES.get(token)
    if name in ("fp8", "fp16"):
        return "meta", name
    if name is not None:
        return name, True
    known = [*_SWITCHES, "clip", "sink5"]
    nearest = get_close_matches(token.lower(), known, 1, 0.0)[0]
    raise PublishedSchemeError(
        f"unknown key {token!r} in the scheme, which the original would silently ignore; nearest: "
        f"{nearest!r}. Known keys after k, v, g and w: {', '.join(known)}."
    )


def _check_bits(token: str, value: str) -> None:
    if _plain(value) in BITS:
        return
    hint = " The original's kernels read 1 as 1.5 (three levels)." if _plain(value) == "1" else ""
    raise PublishedSchemeError(f"{token!r}: bits are one of {', '.join(BITS)}.{hint}")


def _plain(bits: str) -> str:
    """'2.0' as '2'."""
    return bits.removesuffix(".0")


def _whole(token: str, value: str) -> int:
    if not value.isdecimal():
        raise PublishedSchemeError(f"{token!r}: needs a whole number, as in 'sink5' or 'w128'.")
    return int(value)


def _ratio(token: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise PublishedSchemeError(f"{token!r}: {value!r} is not a number.") from None
