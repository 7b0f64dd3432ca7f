"""Tokens per second of a model through the packed cache, transformers' own cache and its quantized ones.

    OMP_WAIT_POLICY=passive python bench/end_to_end.py --json FILE

The context is prefilled once, in full precision, and every cache is filled with the same keys and values. Then all
sides decode the same further tokens of the text, one side after the other at each token, so that what else the machine
does hits all of them. A token is one forward of the model with its likeliest next token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hf_caches import PEERS, PLAIN, Peer, Side, cache_bytes, make_sides, prefill
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from skvq_ext import report
from skvq_ext.models import DEMO_MODEL, load_model

TEXT = Path(__file__).resolve().parent.parent / "demo" / "texts" / "persuasion.txt"
SCHEMES = ("k2-v1.5-g128-w128-sink5-fp8", "k2-v2-g64-w128-sink5-fp8")
UNTIMED = 2  # tokens of every side before the clock runs
PROFILED = 4  # tokens of every side under the profiler, after it
OURS = "skvq::"
# What stands out in a profile: our operators, attention and growing of a plain cache, the weights.
NAMED = ("aten::scaled_dot_product_attention", "aten::cat", "aten::linear")


@dataclass(frozen=True)
class Workload:
    """context: tokens that are cached when the last one is decoded; steps: timed tokens."""

    context: int
    steps: int

    @property
    def prompt(self) -> int:
        """Tokens that are prefilled."""
        return self.context - self.steps - UNTIMED - PROFILED


def decode(model: Any, side: Side, token: Tensor) -> float:
    """Seconds of one token int64 [1, 1] through a side's cache."""
    model.set_attn_implementation(side.attention)
    started = time.perf_counter()
    model(input_ids=token, past_key_values=side.cache, use_cache=True).logits[0, -1].argmax().item()
    return time.perf_counter() - started


def profile_of(step: Callable[[], float]) -> dict[str, float]:
    """Share of the time of a step that goes into each of our operators and the named ones of PyTorch."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds = step()
    events = found.key_averages()
    return {
        event.key: event.cpu_time_total / 1e6 / seconds
        for event in events
        if event.key.startswith(OURS) or event.key in NAMED
    }


def average(profiles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of shares by name, the largest first."""
    names = {name for one in profiles for name in one}
    means = {name: sum(one.get(name, 0.0) for one in profiles) / len(profiles) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


@torch.inference_mode()
def take_turns(model: Any, sides: list[Side], tokens: Tensor, steps: int) -> None:
    """Decodes tokens int64 [1, n] with every side, another one first at each token; fills times and shares."""
    profiles: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for index, token in enumerate(tokens.split(1, dim=1)):
        first = index % len(sides)
        for side in sides[first:] + sides[:first]:
            if index >= UNTIMED + steps:
                step = lambda side=side, token=token: decode(model, side, token)  # noqa: E731
                profiles[side.name].append(profile_of(step))
                continue
            seconds = decode(model, side, token)
            if index >= UNTIMED:
                side.seconds.append(seconds)
    for side in sides:
        side.shares = average(profiles[side.name])


def measure(
    model: Any,
    ids: Tensor,
    workloads: Sequence[Workload],
    schemes: Sequence[str] = SCHEMES,
    exact: bool = False,
    peers: Sequence[Peer] = PEERS,
    step: report.Step = report.no_steps,
) -> list[dict[str, Any]]:
    """A row of every side and workload.

    Args: model, a transformers causal language model; ids int64 [1, n], n at least the longest context.
    """
    longest = max(work.prompt for work in workloads)
    done = 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        step("prefill", done, longest)

    rows = prefill(model, ids[:, :longest], 1024, progress)
    found = []
    for work in workloads:
        cut = [(k[:, :, : work.prompt], v[:, :, : work.prompt]) for k, v in rows]
        sides, skipped = make_sides(model, cut, schemes, exact, peers)
        take_turns(model, sides, ids[:, work.prompt : work.context], work.steps)
        plain = next(side for side in sides if side.name == PLAIN)
        found += [row_of(side, plain, work) for side in sides]
        found += [
            {"context": work.context, "side": name, "skipped": why} for name, why in skipped.items()
        ]
        step("contexts", workloads.index(work) + 1, len(workloads))
    return found


def row_of(side: Side, plain: Side, work: Workload) -> dict[str, Any]:
    """What there is to say about a side, times of DynamicCache over its own included."""
    return {
        "context": work.context,
        "side": side.name,
        "median_ms": 1e3 * side.median,
        "min_ms": 1e3 * min(side.seconds),
        "tokens": len(side.seconds),
        "tokens_per_second": 1 / side.median,
        "times_as_fast_as_dynamic_cache": plain.median / side.median,
        "cache_bytes": cache_bytes(side.cache),
        "share_of_our_operators": sum(
            x for name, x in side.shares.items() if name.startswith(OURS)
        ),
        "profile": side.shares,
    }


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Times as fast as each other side, of every packed one: ours_context_vs_other."""
    timed = [row for row in rows if "median_ms" in row]
    return {
        f"{ours['side'].removeprefix('skvq ')}_{ours['context']}_vs_{other['side']}".replace(
            " ", "_"
        ): other["median_ms"] / ours["median_ms"]
        for ours in timed
        for other in timed
        if ours["side"].startswith("skvq")
        and not other["side"].startswith("skvq")
        and ours["context"] == other["context"]
    }


def show(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The tables."""
    columns = ("cache", "tokens", "median ms", "tokens/s", "times DynamicCache", "bytes", "our ops")
    shown = []
    for row in rows:
        if "skipped" in row:
            shown.append((row["side"], row["context"], row["skipped"], "", "", "", ""))
            continue
        speed, ratio = row["tokens_per_second"], row["times_as_fast_as_dynamic_cache"]
        numbers = (f"{row['median_ms']:.1f}", f"{speed:.2f}", f"{ratio:.2f}")
        share = f"{100 * row['share_of_our_operators']:.0f} %"
        size = report.human_bytes(row["cache_bytes"])
        shown.append((row["side"], row["context"], *numbers, size, share))
    report.table(name, columns, shown)
    kept = [row for row in rows if "profile" in row]
    names = sorted({key for row in kept for key in row["profile"]}, reverse=True)
    report.table(
        "Share of a token's time, in percent, under the profiler",
        ("cache", "tokens", *(key.removeprefix("aten::") for key in names)),
        [
            (row["side"], row["context"], *(f"{100 * row['profile'].get(k, 0):.1f}" for k in names))
            for row in kept
        ],
    )


def main(
    context: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed tokens of every side.")] = 32,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as PyTorch takes.")] = 0,
    exact: Annotated[bool, typer.Option(help="Read packed pages in float32.")] = False,
    peers: Annotated[bool, typer.Option(help="QuantizedCache too.")] = True,
    model: Annotated[str, typer.Option(help="As of the skvq command.")] = DEMO_MODEL,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write JSON here.")] = None,
) -> None:
    """Prints milliseconds per token of every cache and context."""
    from cpu_machine import describe

    if threads:
        torch.set_num_threads(threads)
    workloads = [Workload(n, steps) for n in context or (2048, 8192)]
    result: dict[str, Any] = {"machine": describe(), "threads": torch.get_num_threads()}
    for kind in dtype or ("float32",):
        loaded = load_model(model, kind)
        ids = loaded.encode(TEXT.read_text(encoding="utf-8"))
        with report.steps() as step:
            rows = measure(
                *(loaded.model, ids, workloads, scheme or SCHEMES, exact),
                peers=PEERS if peers else (),
                step=step,
            )
        show(f"{loaded.name}, {kind}, {result['threads']} threads", rows)
        result[kind] = {"model": loaded.name, "rows": rows, "ratios": ratios(rows)}
    if json_to is not None:
        json_to.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
