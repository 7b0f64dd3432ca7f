"""Baselines by name: "kivi:k2-v2-g32-w128-sink5"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from skvq_ext.baselines import (
    gear,
    int_hadamard,
    kivi,
    kvquant,
    oscar,
    rptq,
    rtn,
    saliency,
    smoothquant,
)
from skvq_ext.baselines.coding import BaselineError
from skvq_ext.baselines.method import Source
from skvq_ext.baselines.options import Options, parse
from skvq_ext.evaluate.method import Method


@dataclass(frozen=True)
class _Entry:
    options: type[Options]
    build: Callable[[Any, Source], Method]
    line: str


_METHODS = {
    "rtn": _Entry(rtn.RtnOptions, rtn.build, "round to nearest per token and group of channels"),
    "smoothquant": _Entry(
        smoothquant.SmoothOptions, smoothquant.build, "channels smoothed by calibration, then rtn"
    ),
    "rptq": _Entry(rptq.RptqOptions, rptq.build, "channels clustered by range, then rtn"),
    "kivi": _Entry(kivi.KiviOptions, kivi.build, "K per channel, V per token"),
    "kvquant": _Entry(
        kvquant.KvQuantOptions, kvquant.build, "pre-RoPE K per channel, uneven levels, outliers"
    ),
    "int-hadamard": _Entry(
        int_hadamard.HadamardOptions, int_hadamard.build, "Hadamard, symmetric (llama.cpp)"
    ),
    "oscar": _Entry(oscar.OscarOptions, oscar.build, "covariance-aware rotation and clip"),
    "gear": _Entry(gear.GearOptions, gear.build, "KIVI, low-rank correction and outliers"),
    "saliency": _Entry(
        saliency.SaliencyOptions, saliency.build, "more bits for attended tokens (ZipCache)"
    ),
}

NAMES = {name: f"{entry.line}; {name}:{entry.options()}" for name, entry in _METHODS.items()}


def build(spec: str, model: Any, token_ids: Tensor | None = None, seed: int = 0) -> Method:
    """Makes a baseline for a model.

    Args: spec, "name" or "name:key-key-..", such as "kivi:k2-v2-g32-w128-sink5", see NAMES for the
    names with all keys at their defaults; model, a transformers decoder; token_ids, int64 [n] or
    [1, n], a text to calibrate on, which some baselines need; seed of everything random.
    Raises: BaselineError, RopeError, GeometryError.
    """
    name, _, rest = spec.strip().partition(":")
    name = name.strip().lower().replace("_", "-")
    entry = _METHODS.get(name)
    if entry is None:
        near = get_close_matches(name, _METHODS, 1, 0.0)[0]
        raise BaselineError(
            f"unknown baseline {name!r} in {spec!r}; nearest: {near!r}. Known: "
            f"{', '.join(_METHODS)}."
        )
    try:
        return entry.build(parse(rest, entry.options), Source(model, token_ids, seed))
    except BaselineError as error:
        raise BaselineError(f"{spec!r}: {error}") from error
