"""Where the marks of the report's charts lie; the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from skvq_ext.evaluate.axes import Axis, Box, Label, beside, log_axis, short, spread
from skvq_ext.evaluate.result import (
    GenerationResult,
    Grid,
    LayersResult,
    LossResult,
    MemoryResult,
    MethodEntry,
    Result,
)
from skvq_ext.report import human_bytes, human_tokens

WIDE, NARROW = 920.0, 344.0  # of a page and of a telephone, where labels are numbers
BITS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # marked on the axis
_NAME = 30  # characters of a label
SHADES = 12  # of a heat map


def pareto(result: Result, loss: LossResult) -> list[int]:
    """Methods that none beats in both bits and loss, fewest bits first, as indices.

    Full precision is what losses are counted from, and takes no part.
    """
    costs = [(m.bits, found.above) for m, found in zip(result.methods, loss.methods, strict=True)]
    front: list[int] = []
    for i in sorted(range(1, len(costs)), key=lambda i: costs[i]):
        if not front or costs[i][1] < costs[front[-1]][1] or costs[i] == costs[front[-1]]:
            front.append(i)
    return front


@dataclass(frozen=True)
class Point:
    """A method in the scatter. top, bottom: ends of its error bar; off: it is below the axis."""

    number: int
    entry: MethodEntry
    x: float
    y: float
    top: float
    bottom: float
    off: bool
    label: Label
    title: str


@dataclass(frozen=True)
class Scatter:
    """Loss against bits; front, the path of the Pareto front."""

    width: float
    height: float
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    front: str


def scatter(result: Result, loss: LossResult, width: float) -> Scatter | None:
    """The scatter of all methods but full precision; None where none of them loses anything."""
    entries, found = result.methods[1:], loss.methods[1:]
    if not any(m.above > 0 for m in found):
        return None
    height = 440.0 if width == WIDE else 340.0
    frame = (60.0, 16.0, width - 14.0, height - 50.0)
    bits = [entry.bits for entry in entries]
    x = Axis(min(bits) / 1.12, max(bits) * 1.12, frame[0], frame[2])
    x = x.marked(BITS, (f"{tick:g}" for tick in BITS))
    y = log_axis(
        [v for m in found for v in (m.above, m.above + m.above_stderr)], frame[3], frame[1]
    )
    marks = [(x.at(e.bits), y.at(m.above)) for e, m in zip(entries, found, strict=True)]
    names = _names(result, width)[1:]
    front = [marks[i - 1] for i in pareto(result, loss)]
    lines = _steps([(front[0][0], frame[1]), *front, (frame[2], front[-1][1])])
    labels = beside(marks, names, frame, lines)
    points = [
        Point(
            number=i + 1,
            entry=entry,
            x=marks[i][0],
            y=marks[i][1],
            top=y.at(m.above + m.above_stderr),
            bottom=y.at(m.above - m.above_stderr),
            off=m.above < y.low,
            label=labels[i],
            title=f"{entry.name}: {entry.bits:.4g} bits, {m.above:+.4f} ± {m.above_stderr:.4f} nats "
            f"above full precision, perplexity {m.perplexity:.2f} ({entry.kind})",
        )
        for i, (entry, m) in enumerate(zip(entries, found, strict=True))
    ]
    steps = "".join(f"H{at}V{down}" for at, down in front)
    return Scatter(
        width, height, x, y, tuple(points), f"M{front[0][0]} {frame[1]}{steps}H{frame[2]}"
    )


def _steps(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """The room that stairs take: from each corner across, then to the height of the next."""
    boxes = []
    for (left, above), (right, below) in pairwise(corners):
        boxes += [(left, above - 2, right, above + 2)]
        boxes += [(right - 2, min(above, below), right + 2, max(above, below))]
    return boxes


def _names(result: Result, width: float) -> list[str]:
    """Labels of all methods: numbers, and names where there is room for them."""
    names = short([entry.name for entry in result.methods], _NAME)
    return [f"{i} {name}" if width == WIDE else str(i) for i, name in enumerate(names)]


@dataclass(frozen=True)
class Line:
    """A method's bytes by context. path: of the line; end: where it ends, and its label stands."""

    number: int
    entry: MethodEntry
    allocated: bool
    path: str
    dots: tuple[tuple[float, float, str], ...]
    end: tuple[float, float]
    label: Label


@dataclass(frozen=True)
class Lines:
    """Bytes against context, both axes logarithmic."""

    width: float
    height: float
    x: Axis
    y: Axis
    lines: tuple[Line, ...]


def memory_lines(result: Result, memory: MemoryResult, width: float) -> Lines:
    """The lines of all methods."""
    height, right = (440.0, 260.0) if width == WIDE else (340.0, 34.0)
    contexts, totals = memory.contexts, [m.total for m in memory.methods]
    x = Axis(min(contexts) / 1.05, max(contexts) * 1.05, 66.0, width - right)
    x = x.marked(contexts, map(human_tokens, contexts))
    y = log_axis((total for row in totals for total in row), height - 50.0, 16.0)
    sizes = [10.0**power for power in range(16)]
    y = y.marked(sizes, map(human_bytes, sizes))
    ends = spread([y.at(row[-1]) for row in totals], 15.0, 20.0, height - 54.0)
    lines, names = [], _names(result, width)
    for i, (entry, m) in enumerate(zip(result.methods, memory.methods, strict=True)):
        places = [(x.at(n), y.at(total)) for n, total in zip(contexts, m.total, strict=True)]
        titles = [
            f"{entry.name}: {human_bytes(total)} at {human_tokens(n)} tokens"
            for n, total in zip(contexts, m.total, strict=True)
        ]
        dots = tuple((*place, title) for place, title in zip(places, titles, strict=True))
        label = Label(x.stop + 22.0, round(ends[i] + 4.5, 1), "start", names[i])
        lines.append(Line(i, entry, m.allocated, _path(places), dots, places[-1], label))
    return Lines(width, height, x, y, tuple(lines))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in places)


@dataclass(frozen=True)
class Drift:
    """KL of one method along a text, and what the same axes hold of all others."""

    number: int
    entry: MethodEntry
    quarters: str
    stretches: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Drifts:
    """A panel per method; all share the axes. everyone: paths of all methods' quarters; any_off:
    something is below the axis."""

    width: float
    height: float
    start: float
    stop: float
    y: Axis
    panels: tuple[Drift, ...]
    everyone: str
    any_off: bool


def drifts(result: Result, generation: GenerationResult) -> Drifts | None:
    """KL by quarter of all methods but full precision; None where all of it is 0."""
    found = generation.methods[1:]
    if not any(kl > 0 for m in found for kl in m.kl_quarters):
        return None
    width, height, start, stop = 280.0, 150.0, 54.0, 274.0
    every = [kl for m in found for kl in (*m.kl_quarters, *m.kl_stretches)]
    y = log_axis(every, height - 24.0, 10.0)
    any_off = min(every) < y.low
    if len(y.ticks) > 4:  # a panel is low: decades will do, where there are two
        few = [t for t in y.ticks if t.label.strip("0.")[:1] == "1"]
        y = Axis(y.low, y.high, y.start, y.stop, tuple(few if len(few) > 1 else y.ticks[::2]))

    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        step = (stop - start) / len(values)
        return [(round(start + step * (i + 0.5), 1), y.at(v)) for i, v in enumerate(values)]

    panels = []
    for i, (entry, m) in enumerate(zip(result.methods[1:], found, strict=True)):
        dots = [
            (*place, f"{entry.name}, quarter {q + 1}: KL {kl:.4f} nats per token")
            for q, (place, kl) in enumerate(zip(places(m.kl_quarters), m.kl_quarters, strict=True))
        ]
        paths = (_path(places(m.kl_quarters)), _path(places(m.kl_stretches)))
        panels.append(Drift(i + 1, entry, *paths, tuple(dots)))
    everyone = "".join(panel.quarters for panel in panels)
    return Drifts(width, height, start, stop, y, tuple(panels), everyone, any_off)


@dataclass(frozen=True)
class Shade:
    """All cells of a heat map that have one shade: how strong, 0 .. 1, and their path."""

    strength: float
    path: str


@dataclass(frozen=True)
class HeadMap:
    """Output errors of one method: a column per layer, a row per query head.

    columns: (left edge, what a layer's column says); worst: left and top edges of marked cells.
    """

    number: int
    entry: MethodEntry
    shades: tuple[Shade, ...]
    columns: tuple[tuple[float, str], ...]
    worst: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class HeadMaps:
    """A map per method, all in the shades of one scale; cell, its width and height."""

    width: float
    height: float
    cell: tuple[float, float]
    scale: Axis
    maps: tuple[HeadMap, ...]


def head_maps(result: Result, layers: LayersResult) -> HeadMaps | None:
    """The maps of all methods but full precision; None where no error is above 0."""
    found = layers.methods[1:]
    errors = [e for m in found for row in m.output for e in row]
    if not any(e > 0 for e in errors):
        return None
    top = max(errors)
    scale = Axis(min(max(e, top / 100) for e in errors if e > 0) / 1.01, top, 0.0, 1.0)
    num_layers, heads = result.setting.num_layers, result.setting.num_q_heads
    width = 320.0
    cell = (round(width / num_layers, 2), round(min(width / num_layers, 240.0 / heads), 2))
    maps = []
    for i, (entry, m) in enumerate(zip(result.methods[1:], found, strict=True)):
        columns = [
            (round(layer * cell[0], 2), _layer_title(entry, layer, row))
            for layer, row in enumerate(m.output)
        ]
        worst = [(round(layer * cell[0], 2), round(head * cell[1], 2)) for layer, head in m.worst()]
        shades = _shades(m.output, cell, scale)
        maps.append(HeadMap(i + 1, entry, shades, tuple(columns), tuple(worst)))
    return HeadMaps(width, cell[1] * heads, cell, scale, tuple(maps))


def _layer_title(entry: MethodEntry, layer: int, errors: Sequence[float]) -> str:
    worst = max(range(len(errors)), key=lambda head: errors[head])
    mean = sum(errors) / len(errors)
    return f"{entry.name}, layer {layer}: mean {mean:.1%}, head {worst} {errors[worst]:.1%}"


def _shades(output: Grid, cell: tuple[float, float], scale: Axis) -> tuple[Shade, ...]:
    """The cells, gathered by shade: a path each is far less text than a rectangle per cell."""
    paths: dict[int, list[str]] = {}
    for layer, row in enumerate(output):
        for head, error in enumerate(row):
            shade = round(scale.share(error) * SHADES)
            left, top = round(layer * cell[0], 2), round(head * cell[1], 2)
            paths.setdefault(shade, []).append(f"M{left} {top}h{cell[0]}v{cell[1]}h-{cell[0]}z")
    return tuple(Shade(round(s / SHADES, 3), "".join(p)) for s, p in sorted(paths.items()))
