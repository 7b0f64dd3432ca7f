"""The original's scheme strings, and what its parser would make of wrong ones."""

from __future__ import annotations

import pytest

from skvq_ext.published.scheme import PublishedScheme, PublishedSchemeError

HEADLINE = "k2-v2-g128-w128-reorder-pre_rope-clip-sink5-fp8"


def test_the_headline_string_is_read_and_written() -> None:
    scheme = PublishedScheme.parse(HEADLINE)
    assert (scheme.k, scheme.v, scheme.group, scheme.window, scheme.sinks) == (
        "2",
        "2",
        128,
        128,
        5,
    )
    assert scheme.reorder and scheme.pre_rope and scheme.meta == "fp8" and scheme.clip is None
    assert not scheme.round_first
    assert str(scheme) == HEADLINE


@pytest.mark.parametrize(
    "text",
    [
        "k2-v1.5-g32-w0",
        "k4-v3-g64-w64-pre_rope-sink5",
        "k2-v2-g64-w128-reorder-pre_rope-clip0.92-sink5-fp8",
        "k3-v3-g64-w128-reorder-fp8-round_first",
    ],
)
def test_strings_come_back(text: str) -> None:
    assert str(PublishedScheme.parse(text)) == text


def test_what_is_not_named_is_off() -> None:
    scheme = PublishedScheme.parse("k2-v2-g64-w128")
    assert scheme == PublishedScheme("2", "2", 64, 128, sinks=0, meta="fp16", clip=1.0)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        # The original's README: the letters are in the wrong order, the numbers are equal.
        (
            "k2-v2-w128-g128-reorder-pre_rope-clip-sink5",
            "k2-v2-g128-w128-reorder-pre_rope-clip-sink5",
        ),
        ("k2.0-v1.5-g64-w128", "k2-v1.5-g64-w128"),
        # A tag of its results.
        (
            "k2-v2-g128-w128-rod-clip0.92-pre_rope-sink5-fp8",
            "k2-v2-g128-w128-reorder-pre_rope-clip0.92-sink5-fp8",
        ),
        ("k2-v2-g128-w128-fp8-sink5-reorder", "k2-v2-g128-w128-reorder-sink5-fp8"),
    ],
)
def test_other_spellings_of_the_same(text: str, same: str) -> None:
    assert str(PublishedScheme.parse(text)) == same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "k2-v2-w128-g64-fp8",
            r"'k2-v2-w128-g64': .* by position .* would run 'k2-v2-g128-w64'. "
            r"Write that, or 'k2-v2-g64-w128' if it is what you mean",
        ),
        ("v1.5-k2-g64-w128", r"would run 'k1.5-v2-g64-w128'"),
        ("k2-v2-g128-w128-reoder-pre_rope", "'reoder' is refused: .* without any reorder"),
        ("k2-v2-g128-w128-KIVI", "'KIVI' is refused: .* skvq_ext.baselines"),
        ("k2-v2-g128-KIVI", "'KIVI' is refused"),
        ("k2-v2-g128-rtn", "'rtn' is refused: .* without window and sinks .* skvq_ext.baselines"),
        ("k2-v2-g128-rptq", "'rptq' is refused"),
        ("k2-v2-g128-smoothquant", "'smoothquant' is refused"),
        ("k2-v2-g128-w128-h2o0.95", "'h2o0.95' is refused: heavy hitters are not kept"),
        ("k2-v2-g128-w128-random0.95", "'random0.95' is refused"),
        ("k2-v2-g128-w128-smooth", "'smooth' is refused"),
        ("k1-v2-g128-w128", "'k1': bits are one of 4, 3, 2, 1.5.* read 1 as 1.5"),
        ("k2-v16-g128-w128", "'v16': bits are one of"),
        ("k2-v2-g128", "has no w<number>, window"),
        ("k2-v2-reorder-g128-w128", "'reorder': field 3 of a scheme is g<number>, group"),
        ("k2-k2-g128-w128", "'k2': field 2 of a scheme is v<number>, bits of V"),
        ("k2-v2-g1.5-w128", "'g1.5': needs a whole number"),
        ("k2-v2-g0-w128", "g0: a group holds at least one channel"),
        ("k2-v2-g128-w128-sink", "'sink': needs a whole number"),
        ("k2-v2-g128-w128-sink5-sink4", "'sink4': sinks is given twice"),
        ("k2-v2-g128-w128-fp8-fp16", "'fp16': meta is given twice"),
        ("k2-v2-g128-w128-clip1.5", r"clip1.5: the clip ratio lies in \(0, 1\]"),
        ("k2-v2-g128-w128-clip1.2.3", "'clip1.2.3': '1.2.3' is not a number"),
        (
            "k2-v2-g128-w128-prerope",
            "unknown key 'prerope' .* silently ignore; nearest: 'pre_rope'",
        ),
        ("k2-v2-g128-w128-hadamard", "unknown key 'hadamard'"),
        ("", "field 1 of a scheme is k<number>"),
    ],
)
def test_traps_are_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(PublishedSchemeError, match=message):
        PublishedScheme.parse(text)


def test_values_are_checked_without_a_string_too() -> None:
    for wrong in ({"k": "5"}, {"meta": "fp32"}, {"window": -1}, {"clip": 0.0}):
        with pytest.raises(PublishedSchemeError):
            PublishedScheme(**wrong)
