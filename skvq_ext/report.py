"""What the `skvq` command and the demo show: tables, progress bars, sizes for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table

if TYPE_CHECKING:
    from skvq_ext.ledger import Ledger, LedgerRow

_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
CONTEXTS = (4096, 32_768, 131_072, 1_000_000)

# Called with (what is being done, units done, units in all).
Step = Callable[[str, int, int], None]

console = Console(highlight=False)


def no_steps(name: str, done: int, total: int) -> None:
    """The step callback of those who do not want to know."""


def say(text: str) -> None:
    """Prints one line."""
    console.print(text, soft_wrap=not console.is_terminal)


def heading(number: str, text: str) -> None:
    """Starts a section."""
    console.print(f"\n[bold cyan]{number}[/bold cyan]  [bold]{text}[/bold]")


def busy(text: str) -> Status:
    """A spinner on stderr for work of unknown length; use it in a with statement."""
    return Console(stderr=True).status(text)


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
    """Bytes with a decimal unit and three digits: 63.6 GB."""
    unit = next((u for u in ("B", "kB", "MB") if count < 999.5 * _UNITS[u]), "GB")
    value = count / _UNITS[unit]
    return f"{value:.0f} {unit}" if value >= 99.95 or unit == "B" else f"{value:.3g} {unit}"


def human_tokens(count: int) -> str:
    """Tokens as people say them: 4k, 128k, 1M."""
    if count % 1_000_000 == 0:
        return f"{count // 1_000_000}M"
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    console.print(f"\n{title}", soft_wrap=not console.is_terminal)
    grid = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        grid.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console.print(grid)


def show_info(built: Mapping[str, Any], formats: Mapping[str, Any]) -> None:
    """The result of `skvq info`."""
    cuda = built["cuda"] or {"archs": "not in this build", "instances": []}
    table(
        f"skvq_ext {built['version']}",
        ("built", ""),
        (
            ("CPU instruction sets", built["cpu_isas"]),
            ("in use here", built["cpu_isa"]),
            ("CUDA", cuda["archs"]),
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
    if cuda["instances"]:
        kernels = cuda_formats(cuda["instances"])
        table("Formats that attention reads on CUDA", ("format", "head_dim: groups"), kernels)
    for key in ("head_dims", "groups", "metas", "arrangements"):
        say(f"{key}: {', '.join(str(value) for value in formats[key])}")
    say("Groups may also span the whole head (ghead). Two bands: 3:1/2+2 is half the channels at 3")
    say("bits and the rest at 2.")


def cuda_formats(instances: Sequence[str]) -> list[tuple[str, str]]:
    """Decode kernels by format: ("k2-v1.5", "64: 32, 64; 128: 32, 64, 128").

    Args: instances as `build_info` names them, "k2-v1.5-g64 at head_dim 128", bands in channels.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for instance in instances:
        name, head_dim = instance.split(" at head_dim ")
        scheme, group = name.rsplit("-g", 1)
        scheme = re.sub(r"\d+/\d+", lambda part: str(Fraction(part[0])), scheme)
        found.setdefault(scheme, {}).setdefault(head_dim, []).append(group)
    return [
        (scheme, "; ".join(f"{dim}: {', '.join(groups)}" for dim, groups in sizes.items()))
        for scheme, sizes in found.items()
    ]


def show_ledger(name: str, ledger: Ledger, rows: Sequence[LedgerRow]) -> None:
    """Bytes of one sequence at several contexts, 16-bit cache and packed."""
    g, kind = ledger.geometry, str(ledger.dtype).removeprefix("torch.")
    say(
        f"{name}: {g.num_layers} layers, {g.num_kv_heads} KV heads of {g.head_dim} channels. "
        f"Scheme {ledger.scheme}: {ledger.bits_per_value:.3f} bits per packed value, scales and "
        f"zeros included; sinks and window in {kind}."
    )
    table(
        "Bytes of the keys and values of one sequence, weights aside",
        ("tokens", kind, "packed", "", "times smaller"),
        [
            (
                "each further",
                f"{ledger.full_bytes_per_token:,}",
                f"{ledger.bytes_per_token:,.1f}",
                human_bytes(ledger.bytes_per_token),
                _ratio(ledger.full_bytes_per_token, ledger.bytes_per_token),
            ),
            *(
                (
                    human_tokens(row.context),
                    f"{row.full_precision:,}",
                    f"{row.total:,}",
                    human_bytes(row.total),
                    _ratio(row.full_precision, row.total),
                )
                for row in rows
            ),
        ],
    )


def _ratio(full: float, packed: float) -> str:
    return f"{full / packed:.2f}" if packed else "-"


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
            (
                "difference (± standard error)",
                f"{result['nll_above']:+.4f} ± {result['nll_above_stderr']:.4f}",
                f"{change:+.1f} %",
            ),
        ),
    )
