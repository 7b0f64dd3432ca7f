"""A result as tables on the terminal. Every table says how each method stores what it stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from skvq_ext import report
from skvq_ext.evaluate.result import (
    GenerationResult,
    LayersResult,
    LossResult,
    MemoryResult,
    MethodEntry,
    MethodGeneration,
    MethodLayers,
    NeedlesResult,
    Result,
)

_COMMON = ("method", "bits", "stored", "exact")
_WORST = 3  # heads that are named


def show(result: Result) -> None:
    """Prints what was measured: the methods first, then a table per measurement."""
    setting = result.setting
    texts = ", ".join(f"{text.name} ({text.tokens} tokens)" for text in setting.texts)
    fitted = f"; fitted on {setting.calibration.name}" if setting.calibration else ""
    report.table(
        f"{setting.model} in {setting.dtype} on {setting.device}, seed {setting.seed}; {texts}"
        f"{fitted}. 'bits' are those of a value of K and V behind the window, metadata included; "
        "'exact' are the tokens kept in full precision.",
        ("method", "bits", "stored", "protocol"),
        [(m.name, f"{m.bits:.4g}", m.kind, m.protocol) for m in result.methods],
    )
    shown: tuple[tuple[str, Any, Callable[[Any], list[tuple[str, ...]]]], ...] = (
        ("Perplexity", result.ppl, loss_rows),
        ("Needles", result.needles, needle_rows),
        ("Long generation", result.generation, generation_rows),
        ("Layers", result.layers, layer_rows),
        ("Memory", result.memory, memory_rows),
    )
    for name, found, rows in shown:
        if found is not None:
            head, *body = rows(found)
            pairs = zip(result.methods, body, strict=True)
            report.table(
                f"{name}. {found.protocol}",
                (*_COMMON, *head),
                [(*_common(entry), *row) for entry, row in pairs],
            )


def _common(entry: MethodEntry) -> tuple[str, ...]:
    return entry.name, f"{entry.bits:.4g}", entry.kind, exact_tokens(entry.protocol)


def exact_tokens(protocol: str) -> str:
    """The part of a method's protocol that names its window and sinks, else the whole."""
    parts = [part.strip() for part in protocol.split(";")]
    return next((part for part in parts if "window" in part), protocol)


def loss_rows(found: LossResult) -> list[tuple[str, ...]]:
    """Column names, then a row per method."""
    names = [text.text for text in found.methods[0].texts]
    several = ("all above",) if len(names) > 1 else ()
    rows: list[tuple[str, ...]] = [
        ("perplexity", "nats", *several, *(f"{name} above" for name in names))
    ]
    for m in found.methods:
        total = (_with_error(m.above, m.above_stderr),) if several else ()
        texts = (_with_error(text.above, text.above_stderr) for text in m.texts)
        rows.append((f"{m.perplexity:.3f}", f"{m.nll:.4f}", *total, *texts))
    return rows


def needle_rows(found: NeedlesResult) -> list[tuple[str, ...]]:
    """Column names, then a row per method: digits that came back right."""
    asked = [sum(row) for row in found.digits]
    head = (
        f"of {found.total}",
        *(f"{n}: of {d}" for n, d in zip(found.lengths, asked, strict=True)),
    )
    rows = [(str(m.total), *(str(sum(row)) for row in m.digits)) for m in found.methods]
    return [head, *rows]


def generation_rows(found: GenerationResult) -> list[tuple[str, ...]]:
    """Column names, then a row per method."""
    head = (
        *("KL", "by quarter", "drift", "top-1 agreement"),
        *("diverges after", "repeated 4-grams", "distinct-2", "longest loop"),
    )
    return [head, *(_generation_row(m) for m in found.methods)]


def _generation_row(m: MethodGeneration) -> tuple[str, ...]:
    said, count = [run.repetition for run in m.runs], len(m.runs)
    return (
        _with_error(m.kl, m.kl_stderr),
        " ".join(f"{kl:.4f}" for kl in m.kl_quarters),
        "-" if m.drift is None else f"{m.drift:.2f}",
        f"{m.agreement:.1%}",
        ", ".join("never" if r.divergence is None else str(r.divergence) for r in m.runs),
        f"{sum(s.repeated_4grams for s in said) / count:.1%}",
        f"{sum(s.distinct_2 for s in said) / count:.3f}",
        str(max(s.longest_loop for s in said)),
    )


def layer_rows(found: LayersResult) -> list[tuple[str, ...]]:
    """Column names, then a row per method: means over layers and heads, and the worst of them."""
    head = ("logit error", "output error", "cosine", "worst heads")
    return [head, *(_layer_row(m) for m in found.methods)]


def _layer_row(m: MethodLayers) -> tuple[str, ...]:
    worst = (
        f"layer {layer} head {head} {m.output[layer][head]:.2g}" for layer, head in m.worst(_WORST)
    )
    return (
        "-" if m.logits is None else f"{_mean(m.logits):.4f}",
        f"{_mean(m.output):.2%}",
        f"{_mean(m.cosine):.5f}",
        ", ".join(worst),
    )


def memory_rows(found: MemoryResult) -> list[tuple[str, ...]]:
    """Column names, then a row per method."""
    head = ("counted", "per token", *(report.human_tokens(n) for n in found.contexts))
    rows = [
        (
            "allocated" if m.allocated else "stated",
            report.human_bytes(m.per_token),
            *(report.human_bytes(total) for total in m.total),
        )
        for m in found.methods
    ]
    return [head, *rows]


def _with_error(value: float, error: float) -> str:
    return f"{value:+.4f} ± {error:.4f}"


def _mean(grid: Sequence[Sequence[float]]) -> float:
    values = [value for row in grid for value in row]
    return sum(values) / len(values)
