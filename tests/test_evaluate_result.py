"""The result schema: JSON there and back, and what is no result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from evaluate_cases import sample_result

from skvq_ext.evaluate.result import MEASURES, Result, ResultError


def test_json_there_and_back() -> None:
    result = sample_result()
    assert Result.from_json(result.to_json()) == result
    assert Result.from_json(result.to_json()).to_json() == result.to_json()
    assert set(MEASURES) < set(json.loads(result.to_json()))


def test_measurements_may_be_missing() -> None:
    result = replace(sample_result(), ppl=None, layers=None)
    assert Result.from_json(result.to_json()) == result


def test_every_measurement_has_every_method() -> None:
    result = sample_result()
    names = [entry.name for entry in result.methods]
    for measure in MEASURES:
        assert [m.method for m in getattr(result, measure).methods] == names


def test_worst_heads_come_first() -> None:
    layers = sample_result().layers
    assert layers is not None
    errors = layers.methods[1].output
    found = layers.methods[1].worst(3)
    every = sorted((e for row in errors for e in row), reverse=True)
    assert [errors[layer][head] for layer, head in found] == every[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=0), "version 0; this skvq_ext reads 1"),
        (lambda v: v.pop("setting"), "damaged at setting"),
        (lambda v: v.update(surprise=1), "damaged at surprise"),
        (lambda v: v["methods"][0].update(kind="magic"), "damaged at methods.0.kind"),
        (lambda v: v["times"].update(a=float("nan")), "damaged at times.a"),
    ],
)
def test_damaged_results(change: Callable[[dict[str, Any]], object], message: str) -> None:
    values = json.loads(sample_result().to_json())
    change(values)
    with pytest.raises(ResultError, match=message):
        Result.from_json(json.dumps(values))


def test_no_result_at_all() -> None:
    for text in ("", "[1]", "{}"):
        with pytest.raises(ResultError, match=r"no result|version None"):
            Result.from_json(text)


def test_nan_is_not_written() -> None:
    with pytest.raises(ResultError, match="NaN or infinity"):
        replace(sample_result(), times={"x": float("nan")}).to_json()
