"""The report and the plots of a result: complete, self-contained, escaped, readable."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from evaluate_cases import CONTEXTS, DEPTHS, HARM, METHODS, sample_result

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install 'skvq_ext[eval]'")
pytest.importorskip(
    "matplotlib", reason="matplotlib is not installed: pip install 'skvq_ext[eval]'"
)

from matplotlib import image

from skvq_ext.evaluate import charts, plots
from skvq_ext.evaluate.axes import Axis, beside, log_axis, overlap, short, spread
from skvq_ext.evaluate.html import headline, heat_ink, render, write
from skvq_ext.evaluate.result import MEASURES, MethodEntry, Result

VOID = {"meta", "br", "link", "img", "hr"}
STYLE = Path(charts.__file__).with_name("report.css").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps elements, texts and table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def only(*measures: str) -> Result:
    return replace(sample_result(), **{m: None for m in MEASURES if m not in measures})


def renamed(result: Result, names: Iterable[str]) -> Result:
    """The same numbers under other names."""
    names = tuple(names)
    changes: dict[str, Any] = {
        "methods": tuple(replace(m, name=n) for m, n in zip(result.methods, names, strict=True))
    }
    for measure in MEASURES:
        found = getattr(result, measure)
        methods = tuple(replace(m, method=n) for m, n in zip(found.methods, names, strict=True))
        changes[measure] = replace(found, methods=methods)
    return replace(result, **changes)


def with_losses(*costs: tuple[float, float]) -> Result:
    """Full precision, and a method for each (bits, nats above)."""
    result = only("ppl")
    assert result.ppl is not None
    entries, losses = [result.methods[0]], [result.ppl.methods[0]]
    for i, (bits, above) in enumerate(costs):
        entries.append(MethodEntry(f"method {i}", "", bits, "packed", "window 128", 64))
        losses.append(replace(losses[0], method=f"method {i}", above=above, above_stderr=0.01))
    ppl = replace(result.ppl, methods=tuple(losses))
    return replace(result, methods=tuple(entries), ppl=ppl)


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    html = render(sample_result())
    page = Page(html)
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<object|<embed|<link", html)
    for _, attrs in page.elements:
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    policies = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_links_lead_to_sections() -> None:
    page = Page(render(sample_result()))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    links = [a["href"] for a in page.all("a") if a["href"] != "#protocol"] + ["#protocol"]
    assert len(ids) == len(set(ids))
    assert links == [f"#{id_}" for id_ in ids]
    assert len(links) == len(MEASURES) + 1


@pytest.mark.parametrize("measure", MEASURES)
def test_what_was_not_measured_has_no_section(measure: str, tmp_path: Path) -> None:
    result = only(measure)
    page = Page(render(result))
    assert len(page.all("section")) == 2  # this one and the protocol
    write(result, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_every_number_of_the_tables_is_there() -> None:
    result = sample_result()
    rows = Page(render(result)).rows
    assert result.ppl and result.generation and result.memory and result.needles
    loss, generation = result.ppl.methods[1], result.generation.methods[1]
    ours = [" ".join(" ".join(row).split()) for row in rows if row[0].endswith("1 k2-v1.5")]
    assert len(ours) == 5
    assert f" 2.05 {math.exp(loss.nll):.3f} " in ours[0]
    assert f"+{HARM[1] * 1.05:.4f} ± {HARM[1] / 14:.4f}" in ours[0]
    assert f"{generation.kl:.4f} ± {generation.kl_stderr:.4f}" in ours[1]
    cells = [cell for row in rows for cell in row if re.fullmatch(r"\d+/10", cell)]
    expected = [
        f"{m.digits[length][depth]}/10"
        for m in result.needles.methods
        for depth in range(len(DEPTHS))
        for length in range(len(result.needles.lengths))
    ]
    assert cells == expected


def test_the_protocol_says_everything() -> None:
    result = sample_result()
    text = Page(render(result)).text
    setting = result.setting
    said = [setting.model, setting.dtype, setting.device, "Seed", *setting.versions.values()]
    said += [part for t in setting.texts for part in (t.name, t.sha256, f"{t.tokens:,}")]
    said += [part for m in result.methods for part in (m.name, m.spec, m.protocol)]
    said += [getattr(result, measure).protocol for measure in MEASURES]
    for part in said:
        assert " ".join(part.split()) in text


def test_names_are_escaped_everywhere() -> None:
    evil = ['"><script>alert(1)</script>', "a & b's <b>", "{{ 7 * 7 }}", "$x_1$ costs 5$"]
    page = Page(render(renamed(sample_result(), evil)))
    assert not page.all("script") and not page.all("b")
    for name in evil:
        assert name in page.text
    labels = [attrs.get("aria-label") or "" for attrs in page.all("svg")]
    assert any("a & b's <b>" in label for label in labels)


def test_drawings_have_words() -> None:
    page = Page(render(sample_result()))
    assert page.all("svg")
    for attrs in page.all("svg"):
        assert attrs.get("aria-hidden") == "true" or attrs["aria-label"]
    titles = re.findall(r"<title>(.*?)</title>", render(sample_result()))
    assert len([t for t in titles if "bits, +0.05" in t]) == 2  # in the wide and the narrow drawing


def test_full_precision_alone(tmp_path: Path) -> None:
    result = sample_result()
    changes: dict[str, Any] = {"methods": result.methods[:1]}
    for measure in MEASURES:
        found = getattr(result, measure)
        changes[measure] = replace(found, methods=found.methods[:1])
    page = Page(write(replace(result, **changes), tmp_path).read_text(encoding="utf-8"))
    assert "In brief" not in page.text
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["memory.png", "needles.png"]


def test_the_headline_is_the_first_packed_method() -> None:
    result = sample_result()
    assert headline(result) == 1
    simulated = tuple(replace(m, kind="simulated") for m in METHODS[1:3])
    assert headline(replace(result, methods=(METHODS[0], METHODS[3], *METHODS[1:3]))) == 2
    assert headline(replace(result, methods=(METHODS[0], *simulated, METHODS[3]))) == 1


@pytest.mark.parametrize(
    ("costs", "front"),
    [
        (((2, 0.3), (3, 0.1), (4, 0.2)), [1, 2]),
        (((3, 0.1), (2, 0.1), (2, 0.2)), [2]),
        (((2, 0.1), (2, 0.1)), [1, 2]),
        (((4, -0.01), (2, 0.5), (3, 0.5)), [2, 1]),
    ],
)
def test_the_front_holds_what_none_beats(
    costs: tuple[tuple[float, float], ...], front: list[int]
) -> None:
    result = with_losses(*costs)
    assert result.ppl is not None
    assert charts.pareto(result, result.ppl) == front
    unbeaten = [
        i + 1
        for i, (bits, above) in enumerate(costs)
        if not any(b <= bits and a <= above and (b, a) != (bits, above) for b, a in costs)
    ]
    assert sorted(front) == unbeaten


def test_marks_lie_where_their_numbers_say() -> None:
    result = with_losses((2, 0.001), (4, 0.01), (8, 0.1), (16, -0.2))
    assert result.ppl is not None
    chart = charts.scatter(result, result.ppl, charts.WIDE)
    assert chart is not None
    x, y = [p.x for p in chart.points], [p.y for p in chart.points]
    # Equal ratios are equal distances on both axes; larger losses lie higher on the page.
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2) and y[0] > y[1]
    assert [p.off for p in chart.points] == [False, False, False, True]
    assert chart.points[3].y == chart.y.start
    for point in chart.points[:3]:  # whiskers end inside
        assert point.top > chart.y.stop


def test_labels_keep_apart_and_inside() -> None:
    frame = (0.0, 0.0, 400.0, 300.0)
    marks = [(60.0 + 30 * i, 150.0) for i in range(4)] + [(395.0, 20.0), (5.0, 290.0)]
    labels = beside(marks, [f"method {i}" for i in range(6)], frame)
    boxes = [label.box for label in labels]
    for i, box in enumerate(boxes):
        assert all(overlap(box, other) == 0 for other in boxes[:i])
        assert overlap(box, frame) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))


def test_places_are_spread_in_order() -> None:
    assert spread([5.0, 1.0, 5.5, 30.0], 2.0, 0.0, 40.0) == [5.0, 1.0, 7.0, 30.0]
    assert spread([9.0, 9.5, 9.8], 2.0, 0.0, 10.0) == [6.0, 8.0, 10.0]
    assert spread([1.0, 1.0, 1.0], 5.0, 0.0, 4.0) == [0.0, 2.0, 4.0]


def test_names_are_cut_where_they_say_least() -> None:
    names = ["k2-v1.5-g128-w128-sink5-fp8, calibrated", "k2-v1.5-g128-w128-sink5-fp8"]
    assert short(names, 30) == ["k2-v1.5-g128, calibrated", "k2-v1.5-g128"]
    windows = ["k2-v2-w64", "k2-v2-w128"]
    assert short(windows, 30) == windows
    assert short(["a" * 20 + "b" * 20], 12) == ["aaaaaaa…bbbb"]


def test_axes_have_round_ticks_and_hold_what_they_can() -> None:
    axis = log_axis([0.02, 0.5, 0.0, -1.0], 100.0, 0.0)
    assert [tick.label for tick in axis.ticks] == ["0.02", "0.05", "0.1", "0.2", "0.5"]
    assert axis.at(-1.0) == axis.at(0.0) == 100.0
    assert log_axis([1.0, 1e-9], 0.0, 1.0).low > 0.1
    for value in (0.0359, 0.1, 0.3, 0.7):  # a single amount has ticks to be read by, too
        assert len(log_axis([value], 0.0, 1.0).ticks) >= 2
    assert Axis(1.0, 100.0, 0.0, 50.0).at(10.0) == 25.0


def test_heat_maps_shade_every_cell_once() -> None:
    result = sample_result()
    assert result.layers is not None
    maps = charts.head_maps(result, result.layers)
    assert maps is not None
    errors = result.layers.methods[3].output
    shades = maps.maps[2].shades
    corners = [c for shade in shades for c in re.findall(r"M([\d.]+) ([\d.]+)", shade.path)]
    assert len(corners) == len(set(corners)) == sum(map(len, errors))
    layer, head = result.layers.methods[3].worst(1)[0]
    corner = f"M{round(layer * maps.cell[0], 2)} {round(head * maps.cell[1], 2)}h"
    assert corner in shades[-1].path
    assert maps.maps[2].worst[0] == (layer * maps.cell[0], head * maps.cell[1])


def test_memory_lines_end_at_their_bytes() -> None:
    result = sample_result()
    assert result.memory is not None
    chart = charts.memory_lines(result, result.memory, charts.WIDE)
    assert [tick.label for tick in chart.x.ticks] == ["4k", "32k", "128k", "1M"]
    for line, m in zip(chart.lines, result.memory.methods, strict=True):
        assert line.end == (chart.x.at(CONTEXTS[-1]), chart.y.at(m.total[-1]))
    heights = sorted(line.label.y for line in chart.lines)
    assert all(b - a >= 14.9 for a, b in pairwise(heights))


def colours(block: str) -> dict[str, tuple[float, ...]]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)
    return {n: tuple(int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)) for n, h in found}


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_everything_can_be_read(theme: str) -> None:
    blocks = STYLE.split(":root")[1:4]
    colour = colours(blocks[("light", "dark", "print").index(theme)])
    for ground in ("page", "card", "tint"):
        for ink in ("ink", "muted", "packed"):
            assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
    for mark in ("packed", "simulated", "full"):
        assert contrast(colour[mark], colour["card"]) >= 3
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for share in (i / 100 for i in range(101)):
        pairs = zip(colour["heat-low"], colour["heat"], strict=True)
        ground = tuple(a + (b - a) * share for a, b in pairs)
        if theme == "dark":
            ink = black if "on-dark" in heat_ink(share) else white
        else:
            ink = white if "on-light" in heat_ink(share) else black
        assert contrast(ink, ground) >= 4.45, share


def test_plots_are_pictures_and_repeatable(tmp_path: Path) -> None:
    result = renamed(sample_result(), ["full precision", "a $ b", "$c$", "d_{1}"])
    written = plots.write(result, tmp_path)
    names = ["accuracy.png", "generation.png", "needles.png", "layers.png", "memory.png"]
    assert [path.name for path in written] == names
    for path in written:
        pixels = image.imread(path)
        assert pixels.shape[1] >= 600 and pixels.std() > 0.05  # not an empty sheet
    before = written[0].read_bytes()
    plots.write(replace(result, generation=None, needles=None, layers=None), tmp_path)
    assert written[0].read_bytes() == before


def test_equal_results_give_equal_reports() -> None:
    assert render(sample_result()) == render(sample_result())
