"""Axes, ticks and labels of the report's charts, in units of their drawings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_CHARACTER, _LINE = 7.4, 15.0  # width and height of a label's letters, generously
_DECADES = 5  # an axis shows no more below its largest value

_USUAL = re.compile(r"-(?:w\d+|sink\d+|fp8|fp16)(?![^-,\s])")

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` at place `start` to `high` at place `stop`."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[Tick, ...] = ()

    def shows(self, value: float) -> bool:
        """Whether a value lies on the axis."""
        return self.low <= value <= self.high

    def share(self, value: float) -> float:
        """How far along the axis a value lies, 0 .. 1; what is off it lies on its edge."""
        inside = min(max(value, self.low), self.high)
        return math.log(inside / self.low) / math.log(self.high / self.low)

    def at(self, value: float) -> float:
        """Place of a value."""
        return round(self.start + (self.stop - self.start) * self.share(value), 1)

    def marked(self, values: Iterable[float], labels: Iterable[str]) -> Axis:
        """The same axis with ticks at those of the values that it shows."""
        pairs = zip(values, labels, strict=True)
        return replace(self, ticks=tuple(Tick(self.at(v), t) for v, t in pairs if self.shows(v)))


def log_axis(values: Iterable[float], start: float, stop: float) -> Axis:
    """An axis for amounts, at least one of them positive, with round ticks.

    What is not positive, or more than five decades below the largest, is off the axis.
    """
    shown = list(values)
    high = max(shown)
    low = min(v for v in shown if v > 0 and v >= high / 10**_DECADES)
    room = 1.5 if high / low > 3 else 2.3  # the latter holds two ticks of 1, 2, 5 at the least
    axis = Axis(low / room, high * room, start, stop)
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    steps = (1, 2, 5) if axis.high / axis.low < 200 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return axis.marked(ticks, (f"{tick:g}" for tick in ticks))


@dataclass(frozen=True)
class Label:
    """Text beside a mark. anchor: "start", "middle" or "end", as SVG aligns it."""

    x: float
    y: float
    anchor: str
    text: str

    @property
    def box(self) -> Box:
        """The room it takes."""
        width = _CHARACTER * len(self.text)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 0.8 * _LINE, left + width, self.y + 0.2 * _LINE


def short(names: Sequence[str], room: int) -> list[str]:
    """Names for labels, in at most `room` characters each.

    What schemes say of window, sinks and metadata is left out where names stay different without
    it; of what is still too long the beginning and the end are kept.
    """
    plain = [_USUAL.sub("", name) for name in names]
    kept = plain if len(set(plain)) == len(set(names)) else names
    tail = room // 3
    return [
        name if len(name) <= room else f"{name[: room - tail - 1]}…{name[-tail:]}" for name in kept
    ]


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


_PLACES = (
    *((10.0, 4.5, "start"), (-10.0, 4.5, "end"), (0.0, -11.0, "middle"), (0.0, 21.0, "middle")),
    *((8.0, -10.0, "start"), (8.0, 19.0, "start"), (-8.0, -10.0, "end"), (-8.0, 19.0, "end")),
    *((12.0, -24.0, "start"), (12.0, 33.0, "start"), (-12.0, -24.0, "end"), (-12.0, 33.0, "end")),
)
_ON_MARK, _ON_LABEL, _OUTSIDE, _LATER = 4.0, 4.0, 8.0, 6.0  # per area; of a place less preferred


def beside(
    marks: Sequence[tuple[float, float]],
    texts: Sequence[str],
    frame: Box,
    lines: Sequence[Box] = (),
) -> list[Label]:
    """A label for each mark, inside the frame, where it covers least of marks, lines and labels."""
    taken = [(_ON_MARK, (x - 8, y - 8, x + 8, y + 8)) for x, y in marks]
    taken += [(1.0, line) for line in lines]
    labels = []
    for (x, y), text in zip(marks, texts, strict=True):
        options = [Label(x + dx, y + dy, anchor, text) for dx, dy, anchor in _PLACES]
        costs = [_cost(o.box, taken, frame) + _LATER * i for i, o in enumerate(options)]
        best = options[costs.index(min(costs))]
        taken.append((_ON_LABEL, best.box))
        labels.append(best)
    return labels


def _cost(box: Box, taken: Sequence[tuple[float, Box]], frame: Box) -> float:
    outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
    return _OUTSIDE * outside + sum(weight * overlap(box, other) for weight, other in taken)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in the same order, near where they were, within low .. high.

    Where there is no room for that, they are as far apart as there is room for.
    """
    count = len(places)
    gap = min(gap, (high - low) / max(1, count - 1))
    order = sorted(range(count), key=lambda i: places[i])
    moved = [0.0] * count
    floor = low
    for rank, i in enumerate(order):
        room_above = (count - 1 - rank) * gap
        moved[i] = min(max(places[i], floor), high - room_above)
        floor = moved[i] + gap
    return moved
