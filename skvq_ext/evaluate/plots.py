"""A result as PNG plots, for readers of papers and issues; the report draws its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from skvq_ext.evaluate.axes import short, spread
from skvq_ext.evaluate.charts import BITS, WIDE, pareto, scatter
from skvq_ext.evaluate.result import MethodEntry, Result
from skvq_ext.report import human_tokens

_COLOURS = {"full": "#4a4f57", "packed": "#1457b8", "simulated": "#a8480a"}
_MARKERS = {"full": "s", "packed": "o", "simulated": "D"}
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececee",
    "font.size": 9,
    "savefig.dpi": 160,
}
_HEAT = "Oranges"
_ACROSS = 4  # panels in a row
_POINTS = 8 * 72 / WIDE  # of the plot, per unit of the report's chart
_ALIGN = {"start": "left", "middle": "center", "end": "right"}
_NAME = 30


def write(result: Result, directory: Path) -> list[Path]:
    """Writes a PNG per measurement that was made. Returns: their paths."""
    drawings: tuple[tuple[str, Any, Callable[[Result], Figure | None]], ...] = (
        ("accuracy.png", result.ppl, accuracy),
        ("generation.png", result.generation, generation),
        ("needles.png", result.needles, needles),
        ("layers.png", result.layers, layers),
        ("memory.png", result.memory, memory),
    )
    written = []
    for name, found, draw in drawings:
        if found is None:
            continue
        with rc_context(_STYLE):
            figure = draw(result)
            if figure is not None:
                # no date and no version: equal results give equal files
                figure.savefig(directory / name, metadata={"Software": None})
                written.append(directory / name)
    return written


def _named(result: Result) -> list[tuple[int, MethodEntry, str]]:
    """All methods with their places and short names, in which a dollar is no formula."""
    names = short([entry.name.replace("$", r"\$") for entry in result.methods], _NAME)
    return [(i, *pair) for i, pair in enumerate(zip(result.methods, names, strict=True))]


def _look(entry: MethodEntry) -> dict[str, Any]:
    colour = _COLOURS[entry.kind]
    hollow = "white" if entry.kind == "simulated" else colour
    return {"color": colour, "marker": _MARKERS[entry.kind], "markerfacecolor": hollow}


def accuracy(result: Result) -> Figure | None:
    """Loss against bits, as the report draws it; None where no method loses anything."""
    assert result.ppl is not None
    chart = scatter(result, result.ppl, WIDE)
    if chart is None:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_ylim(chart.y.low, chart.y.high)
    names, losses = _named(result), result.ppl.methods
    # What is below the axis lies on its edge, and is not cut there.
    heights = [max(m.above, chart.y.low) for m in losses]
    for point in chart.points:
        i = point.number
        place, errors = (point.entry.bits, heights[i]), losses[i].above_stderr
        axes.errorbar(*place, errors, linestyle="none", clip_on=False, **_look(point.entry))
        offset = (_POINTS * (point.label.x - point.x), _POINTS * (point.y - point.label.y))
        axes.annotate(
            names[i][2], place, offset, textcoords="offset points", ha=_ALIGN[point.label.anchor]
        )
    steps = [(result.methods[i].bits, heights[i]) for i in pareto(result, result.ppl)]
    axes.step(*zip(*steps, strict=True), where="post", color="#5a606a", linestyle="--", linewidth=1)
    axes.set_xticks(BITS, [f"{bits:g}" for bits in BITS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(chart.x.low, chart.x.high)
    axes.set_xlabel("bits per value of K and V, metadata included")
    axes.set_ylabel("nats per token above full precision")
    _legend(axes, result)
    return figure


def _legend(axes: Axes, result: Result) -> None:
    seen = {entry.kind: entry for entry in result.methods[1:]}
    for kind, entry in seen.items():
        axes.plot([], [], linestyle="none", label=kind, **_look(entry))
    axes.legend(frameon=False, loc="upper right")


def generation(result: Result) -> Figure | None:
    """KL along the text, a panel per method; None where there is none above 0."""
    found = result.generation
    assert found is not None
    if not any(kl > 0 for m in found.methods for kl in m.kl_quarters):
        return None
    figure, panels = _panels(len(result.methods) - 1, 1.9, sharey=True)
    for axes, (i, entry, name) in zip(panels, _named(result)[1:], strict=True):
        for other in found.methods[1:]:
            axes.plot(range(1, 5), other.kl_quarters, color="#d5d7db", linewidth=1)
        axes.plot(range(1, 5), found.methods[i].kl_quarters, **_look(entry))
        axes.set_yscale("log", nonpositive="clip")
        axes.set_xticks(range(1, 5))
        axes.set_title(name, fontsize=8)
    figure.supylabel("KL, nats per token", fontsize=9)
    figure.supxlabel(f"quarter of {found.tokens} tokens", fontsize=9)
    return figure


def needles(result: Result) -> Figure:
    """Share of digits that came back, by depth and length, a panel per method."""
    found = result.needles
    assert found is not None
    figure, panels = _panels(len(result.methods), 2.0)
    for axes, (i, _, name) in zip(panels, _named(result), strict=True):
        m = found.methods[i]
        asked, right = list(zip(*found.digits, strict=True)), list(zip(*m.digits, strict=True))
        lost = [
            [1 - r / a for r, a in zip(*rows, strict=True)]
            for rows in zip(right, asked, strict=True)
        ]
        image = axes.imshow(lost, cmap=_HEAT, vmin=0, vmax=1, aspect="auto")
        for row, counts in enumerate(right):
            for column, count in enumerate(counts):
                ink = "white" if lost[row][column] > 0.6 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=7)
        axes.set_xticks(range(len(found.lengths)), map(human_tokens, found.lengths))
        axes.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths])
        axes.grid(False)
        axes.set_title(f"{name}: {m.total}/{found.total}", fontsize=8)
    figure.colorbar(image, ax=panels, label="digits lost, share", shrink=0.8)
    figure.supylabel("depth", fontsize=9)
    figure.supxlabel("tokens of the text", fontsize=9)
    return figure


def layers(result: Result) -> Figure | None:
    """Output error per layer and head, a panel per method; None where there is none above 0."""
    found = result.layers
    assert found is not None
    errors = [e for m in found.methods[1:] for row in m.output for e in row if e > 0]
    if not errors:
        return None
    norm = LogNorm(max(min(errors), max(errors) / 100), max(errors))
    figure, panels = _panels(len(result.methods) - 1, 1.9)
    for axes, (i, _, name) in zip(panels, _named(result)[1:], strict=True):
        grid = list(zip(*found.methods[i].output, strict=True))
        image = axes.imshow(grid, cmap=_HEAT, norm=norm, aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.set_title(name, fontsize=8)
    figure.colorbar(image, ax=panels, label="error of attention output", shrink=0.8)
    figure.supylabel("query head", fontsize=9)
    figure.supxlabel("layer", fontsize=9)
    return figure


def memory(result: Result) -> Figure:
    """Bytes of one sequence against its tokens."""
    found = result.memory
    assert found is not None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for i, entry, _ in _named(result):
        look = _look(entry) | {"linestyle": "-" if found.methods[i].allocated else "--"}
        axes.plot(found.contexts, found.methods[i].total, markersize=4, **look)
    last = [m.total[-1] for m in found.methods]
    low, high = map(log10, axes.get_ylim())
    heights = spread([log10(total) for total in last], (high - low) / 24, low, high)
    for (_, entry, name), total, height in zip(_named(result), last, heights, strict=True):
        axes.annotate(
            name,
            (found.contexts[-1], total),
            (1.03, 10**height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=_COLOURS[entry.kind],
            arrowprops={"arrowstyle": "-", "color": "#d5d7db", "relpos": (0, 0.5)},
        )
    axes.set_xticks(found.contexts, map(human_tokens, found.contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("bytes of keys and values")
    return figure


def _panels(count: int, height: float, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels, a few in a row; height of each in inches."""
    across = min(_ACROSS, count)
    down = -(-count // across)
    figure = Figure(figsize=(2.6 * across + 1, height * down + 0.6), layout="constrained")
    grid = figure.subplots(down, across, sharey=sharey, squeeze=False).flatten()
    for unused in grid[count:]:
        unused.remove()
    return figure, list(grid[:count])
