"""Scheme strings: order never matters, str round-trips, bad input is refused with the reason."""

import random
import re
from itertools import product

import pytest

from skvq_ext.scheme import MIXED, REFUSED, TRANSFORMS, Scheme, SchemeError


def schemes() -> list[Scheme]:
    transforms = [None, frozenset(), frozenset({"hadamard"}), frozenset(TRANSFORMS)]
    formats = [("2", "1.5"), ("3:1/2+2", "1.5fast"), ("4:1/4+2", "3:1/2+1.5"), ("8", "4")]
    made = []
    for (k, v), transform, clip in product(formats, transforms, (None, 1.0, 0.92, 0.03125)):
        made.append(Scheme(k=k, v=v, transform=transform, clip=clip))
        made.append(
            Scheme(k, v, 0, window=0, sinks=0, meta="fp16", rollback=7, transform=transform)
        )
    for bits, transform in product((2.25, 2.0, 8.0, 2.1234567891), transforms):
        made.append(Scheme(MIXED, MIXED, bits=bits, transform=transform))
        made.append(Scheme(MIXED, MIXED, 0, bits=bits, transform=transform, clip=0.92))
    return made


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_text_round_trips_in_any_order(scheme: Scheme) -> None:
    text = str(scheme)
    assert Scheme.parse(text) == scheme
    assert str(Scheme.parse(text)) == text
    keys = text.split("-")
    shuffle = random.Random(text)
    for separator in ("-", " ", ", ", "\t"):
        shuffle.shuffle(keys)
        assert Scheme.parse(separator.join(keys)) == scheme
        assert Scheme.parse(separator.join(keys).upper()) == scheme


def test_headline_scheme() -> None:
    scheme = Scheme.parse("K2V1.5 g128 w128 sink5 fp8")
    assert scheme == Scheme()
    assert str(scheme) == "k2-v1.5-g128-w128-sink5-fp8"


def test_fields_of_a_full_scheme() -> None:
    scheme = Scheme.parse("k3:1/2+2-v1.5-g64-w32-sink4-fp16-centre-balance-hadamard-clip0.9")
    assert (scheme.k, scheme.v, scheme.group, scheme.window) == ("3:1/2+2", "1.5", 64, 32)
    assert (scheme.sinks, scheme.meta, scheme.clip) == (4, "fp16", 0.9)
    assert scheme.transform == frozenset(TRANSFORMS)


@pytest.mark.parametrize(
    ("text", "transform", "clip"),
    [
        ("k2", None, None),
        ("k2-clip", None, None),
        ("k2-clip0.5", None, 0.5),
        ("k2-identity", frozenset(), 1.0),
        ("k2-identity-clip", frozenset(), None),
        ("k2-hadamard", frozenset({"hadamard"}), 1.0),
        ("k2-center-hadamard-clip", frozenset({"centre", "hadamard"}), None),
    ],
)
def test_transform_and_clip(
    text: str, transform: frozenset[str] | None, clip: float | None
) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.transform, scheme.clip) == (transform, clip)


def test_swapped_window_and_group_are_read_by_key() -> None:
    """The original reads the third field as the group and the fourth as the window, always."""
    assert Scheme.parse("k2-v2-w64-g128") == Scheme.parse("k2-v2-g128-w64")


@pytest.mark.parametrize("key", [*REFUSED, "KIVI", "h2o0.95", "random0.95", "smooth0.5"])
def test_keys_of_the_original_are_refused_with_the_reason(key: str) -> None:
    with pytest.raises(SchemeError, match="key of the original SKVQ, refused here: ") as caught:
        Scheme.parse(f"k2-v2-g128-w128-{key}")
    name = re.sub(r"[\d.]+$", "", key.lower()).removesuffix("2o") if key[0] != "h" else "h2o"
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k2-reoder", "nearest: 'reorder', which is refused"),
        ("k2-hadamar", "unknown key 'hadamar' in the scheme; nearest: 'hadamard'"),
        ("k2-sinkk5", "nearest: 'sink'"),
        ("k2-fp32", "nearest: 'fp"),
        ("k2-fp8-fp16", "meta is given twice"),
        ("k2-v2-k3", "'k3': k is given twice"),
        ("k2v2-k3", "k is given twice"),
        ("g64-ghead", "group is given twice"),
        ("clip-clip0.9", "clip is given twice"),
        ("centre-center", "'center' is given twice"),
        ("identity-centre", "'identity' means no transform"),
        ("k5", "'5' is not a tensor format for k"),
        ("k1", "1.5fast"),
        ("v3:1/2", "'3:1/2' is not a tensor format for v"),
        ("g100", "the group must be 32, 64, 128 or 'ghead'"),
        ("w", "needs a whole number right behind the key"),
        ("w-128", "needs a whole number right behind the key"),
        ("sink2.5", "needs a whole number"),
        ("clip2", "must lie in 0.01 .. 1"),
        ("clip0", "must lie in 0.01 .. 1"),
        ("clipnan", "unknown key 'clipnan'"),
        ("clip0.9x", "is not a number"),
        ("bits", "'' is not a number, as in 'bits2.25'"),
        ("bits2.2.5", "'2.2.5' is not a number, as in 'bits2.25'"),
        ("bits1", "bits1: the budget must lie in 1 .. 9 bits per value"),
        ("bits9.01", "bits9.01: the budget must lie in 1 .. 9"),
        ("bits2-bits3", "bits is given twice"),
        ("bits2-k2", "'bits' lets a plan choose the formats; drop it, or k and v"),
        ("v1.5-bits2", "'bits' lets a plan choose the formats"),
        ("kmix-vmix", "unknown key 'kmix'"),
        ("bit2.25", "nearest: 'bits'"),
        ("", "the scheme is empty"),
        (" - ", "the scheme is empty"),
        ("128", "unknown key '128'"),
    ],
)
def test_bad_schemes_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(message)):
        Scheme.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"k": "5"},
        {"group": 48},
        {"meta": "fp32"},
        {"window": -1},
        {"sinks": -1},
        {"rollback": -1},
        {"transform": frozenset({"rotate"})},
        {"clip": 0.0},
        {"bits": 2.25},
        {"k": MIXED, "v": MIXED},
        {"k": MIXED, "v": "2", "bits": 2.25},
        {"k": MIXED, "v": MIXED, "bits": float("nan")},
        {"k": MIXED, "v": MIXED, "bits": 0.5},
    ],
)
def test_a_scheme_built_by_hand_is_checked_too(fields: dict[str, object]) -> None:
    with pytest.raises(SchemeError):
        Scheme(**fields)  # type: ignore[arg-type]


def test_a_budget_of_bits_leaves_the_formats_open() -> None:
    scheme = Scheme.parse("BITS2.25 g64 w32 sink4 fp16 hadamard clip")
    assert (scheme.bits, scheme.k, scheme.v, scheme.group) == (2.25, MIXED, MIXED, 64)
    assert str(scheme) == "bits2.25-g64-w32-sink4-fp16-hadamard-clip"
    with pytest.raises(SchemeError, match="says nothing about formats until a plan has spent it"):
        scheme.record_format(128)
    (line,) = Scheme.parse("bits2.5-g64-fp16").differences(scheme)
    assert line == "bits: 2.5 here, 2.25 in the plan"


def test_differences_ignore_what_a_plan_does_not_hold() -> None:
    plan = Scheme.parse("k2-v1.5-g128-fp8-centre-hadamard-clip")
    assert Scheme.parse("k2-v1.5-g128-w0-sink64-fp8").differences(plan) == []
    lines = Scheme.parse("k3-v1.5-g64-fp16-hadamard-clip0.9").differences(plan)
    assert [line.split(":")[0] for line in lines] == ["k", "group", "meta", "transform", "clip"]
    assert lines[0] == "k: '3' here, '2' in the plan"
    assert lines[3] == "transform: hadamard here, centre-hadamard in the plan"


def test_record_format_is_made_and_checked_by_the_format_definition() -> None:
    record = Scheme.parse("k3:1/2+2-v1.5-g128").record_format(128)
    assert record.k_bands == ((0, 64), (64, 128))
    with pytest.raises(ValueError):
        Scheme.parse("k3:1/8+2").record_format(64)  # a band of 8 channels
