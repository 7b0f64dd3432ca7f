"""A result as one page to look at, which loads nothing, and as plots to put elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from skvq_ext.evaluate import charts, plots
from skvq_ext.evaluate.charts import NARROW, WIDE, pareto
from skvq_ext.evaluate.result import LossResult, Result
from skvq_ext.report import human_bytes, human_tokens

REPORT = "report.html"
# Shares of the heat colour from which white (light page) or black (dark page) reads better on it.
LIGHT_INK, DARK_INK = 0.73, 0.545
_SECTIONS = (
    ("ppl", "accuracy", "Accuracy against bits"),
    ("generation", "generation", "Long generation"),
    ("needles", "needles", "Needles"),
    ("layers", "layers", "Layers and heads"),
    ("memory", "memory", "Memory against context"),
)


def write(result: Result, directory: Path) -> Path:
    """Writes report.html and the plots of what was measured.

    Args: directory, made if it is not there. Returns: the path of the report.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plots.write(result, directory)
    path = directory / REPORT
    path.write_text(render(result), encoding="utf-8")
    return path


def render(result: Result) -> str:
    """The report as HTML text; measurements that were not made have no section."""
    r, both = result, (WIDE, NARROW)
    measured = [(key, id_, title) for key, id_, title in _SECTIONS if getattr(r, key) is not None]
    scatters = [charts.scatter(r, r.ppl, width) for width in both] if r.ppl else []
    front = pareto(r, r.ppl) if r.ppl else []
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            r=r,
            sections=[*((id_, title) for _, id_, title in measured), ("protocol", "Protocol")],
            measured=[(title, getattr(r, key)) for key, _, title in measured],
            kinds={entry.kind for entry in r.methods},
            quantized={entry.kind for entry in r.methods[1:]},
            headline=headline(r),
            tiles=tiles(r),
            front=front,
            front_says=_front_says(r.ppl, front) if r.ppl else "",
            scatters=scatters if None not in scatters else [],
            drifts=charts.drifts(r, r.generation) if r.generation else None,
            maps=charts.head_maps(r, r.layers) if r.layers else None,
            memories=[charts.memory_lines(r, r.memory, w) for w in both] if r.memory else [],
            seconds={entry.name: _seconds(r, entry.name) for entry in r.methods},
        )
    )


def _environment() -> Environment:
    # Everything is escaped: names come from command lines and files, excerpts from models.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "bits": lambda value: f"{value:.4g}",
        "bytes": human_bytes,
        "cells": chain.from_iterable,
        "heat_ink": heat_ink,
        "mean": _mean,
        "percent": percent,
        "signed": signed,
        "tokens": human_tokens,
    }
    return environment


def signed(value: float) -> str:
    """Four decimals with a sign that is as wide as a plus."""
    return f"{value:+.4f}".replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{value:.{digits}%}"


def heat_ink(share: float) -> str:
    """Classes of a heat map's cell, by the ink that can be read on it."""
    names = (("on-light", LIGHT_INK), ("on-dark", DARK_INK))
    return " ".join(name for name, limit in names if share >= limit)


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held)


def _seconds(result: Result, method: str) -> float:
    """Of all measurements of a method; times are named "measurement: method"."""
    return sum(s for name, s in result.times.items() if name.partition(": ")[2] == method)


def _front_says(loss: LossResult, front: list[int]) -> str:
    exact = f"Full precision has a perplexity of {loss.methods[0].perplexity:.2f}."
    if not front:
        return exact
    return (
        f"{exact} On the Pareto front: {len(front)} of {len(loss.methods) - 1} methods, which none "
        "beats in both bits and loss."
    )


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    name: str
    value: str
    unit: str
    under: str


def headline(result: Result) -> int:
    """The method the headline is about: the first packed one, else the first, else none (0)."""
    packed = [i for i, entry in enumerate(result.methods) if entry.kind == "packed"]
    return packed[0] if packed else min(1, len(result.methods) - 1)


def tiles(result: Result) -> list[Tile]:
    """The headline, a tile per measurement; none where only full precision was measured."""
    i = headline(result)
    if not i:
        return []
    bits = result.methods[i].bits
    found = [Tile("Stored per value", f"{bits:.3g}", "bits", f"{16 / bits:.1f}× fewer than 16")]
    makers: tuple[tuple[Any, Any], ...] = (
        (result.ppl, _loss_tile),
        (result.needles, _needle_tile),
        (result.generation, _generation_tile),
        (result.layers, _layer_tile),
        (result.memory, _memory_tile),
    )
    return found + [make(part, i) for part, make in makers if part is not None]


def _loss_tile(loss: LossResult, i: int) -> Tile:
    full, m = loss.methods[0], loss.methods[i]
    return Tile(
        "Loss above full precision",
        f"{signed(m.above)}",
        "nats",
        f"± {m.above_stderr:.4f} per token; perplexity {full.perplexity:.2f}\u00a0→\u00a0{m.perplexity:.2f}",
    )


def _needle_tile(needles: Any, i: int) -> Tile:
    full, m = needles.methods[0], needles.methods[i]
    under = f"{m.total} of {needles.total} digits; full precision {full.total}"
    return Tile("Needles found", percent(m.total / needles.total), "", under)


def _generation_tile(generation: Any, i: int) -> Tile:
    m = generation.methods[i]
    ratio = "" if m.drift is None else f"; last quarter {m.drift:.2f}× the first"
    under = f"KL per token over {generation.tokens} tokens{ratio}"
    return Tile("Drift in long generation", f"{m.kl:.4f}", "nats", under)


def _layer_tile(layers: Any, i: int) -> Tile:
    m = layers.methods[i]
    layer, head = m.worst(1)[0]
    worst = f"worst: layer {layer} head {head}, {percent(m.output[layer][head])}"
    mean = _mean(chain.from_iterable(m.output))
    return Tile("Error of attention outputs", percent(mean), "", worst)


def _memory_tile(memory: Any, i: int) -> Tile:
    full, total = memory.methods[0].total[-1], memory.methods[i].total[-1]
    name = f"Memory at {human_tokens(memory.contexts[-1])} tokens"
    value, unit = human_bytes(total).split(" ")
    return Tile(name, value, unit, f"full precision {human_bytes(full)}, {full / total:.1f}× more")
