"""What the `skvq` command and the demo show: tables, progress bars, sizes for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

CONTEXTS = (4096, 32_768, 131_072, 1_000_000)

# Called with (what is being done, units done, units in all).
Step = Callable[[str, int, int], None]

console = Console(highlight=False)


def no_steps(name: str, done: int, total: int) -> None:
    """The step callback of those who do not want to know."""


def say(text: str) -> None:
    """Prints one line."""
    console.print(text)


@contextmanager
def steps() -> Iterator[Step]:
    """Progress bars on stderr, one per name that the yielded callback is called with."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield step


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit and three digits: 63.1 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_tokens(count: int) -> str:
    """Tokens as people say them: 4k, 128k, 1M."""
    if count % 1_000_000 == 0:
        return f"{count // 1_000_000}M"
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        grid.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console.print(grid)


def show_info(built: Mapping[str, Any], formats: Mapping[str, Any]) -> None:
    """The result of `skvq info`."""
    cuda = built["cuda"] or "not in this build"
    table(
        f"skvq_ext {built['version']}",
        ("built", ""),
        (
            ("CPU instruction sets", built["cpu_isas"]),
            ("in use here", built["cpu_isa"]),
            ("CUDA", cuda),
            ("torch headers", built["torch_headers"]),
            ("compiler", built["compiler"]),
        ),
    )
    rows = []
    for code in formats["codes"]:
        planes = " + ".join(str(bits) for bits in code["planes"] if bits)
        storage = f"bit planes {planes}" if planes else "base 3, five to a byte"
        tile = round(code["bits"] * formats["tile_tokens"] * 128 / 8)
        rows.append((code["name"], code["levels"], f"{code['bits']:g}", storage, f"{tile} B"))
    columns = ("format", "levels", "bits per value", "storage", "64 tokens x 128 channels")
    table("Formats of K and of V", columns, rows)
    for key in ("head_dims", "groups", "metas", "arrangements"):
        say(f"{key}: {', '.join(str(value) for value in formats[key])}")
    say("Groups may also span the whole head (ghead). Two bands: 3:1/2+2 is half the channels at 3")
    say("bits and the rest at 2.")


def show_continuation(name: str, done: Any) -> None:
    """What `skvq generate` wrote, and how fast."""
    console.rule(f"{name}: {len(done.ids)} tokens, {done.tokens_per_second:.1f} per second")
    console.print(done.text, markup=False)


def show_perplexity(result: Mapping[str, Any]) -> None:
    """The result of `skvq ppl`."""
    change = 100 * (result["ppl_packed"] / result["ppl_full"] - 1)
    table(
        f"{result['model']}, {result['scored']} tokens scored after {result['skip']} of context",
        ("cache", "nats per token", "perplexity"),
        (
            ("full precision", f"{result['nll_full']:.4f}", f"{result['ppl_full']:.3f}"),
            (result["scheme"], f"{result['nll_packed']:.4f}", f"{result['ppl_packed']:.3f}"),
            ("difference", f"{result['nll_packed'] - result['nll_full']:+.4f}", f"{change:+.1f} %"),
        ),
    )
