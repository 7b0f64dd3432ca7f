"""The `skvq` command: what is built, perplexity and text through the packed cache, bytes, plans."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skvq_ext.calibrate.command import calibrate
from skvq_ext.evaluate.command import evaluate

# torch and transformers take seconds to import: only the commands that need them do.
if TYPE_CHECKING:
    from skvq_ext.models import LanguageModel
    from skvq_ext.plan import Plan
    from skvq_ext.scheme import Scheme

DEFAULT_SCHEME = "k2-v1.5-g128-w128-sink5-fp8"

app = typer.Typer(
    name="skvq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A really packed 1.5 to 8 bit KV cache for language models.",
)

ModelOption = Annotated[
    str,
    typer.Option(
        help="Directory in Hugging Face format or with one GGUF file, a .gguf file, an "
        "'owner/name' of the hub, or 'smollm2', the demo model."
    ),
]
TextOption = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, readable=True, help="UTF-8 text file.")
]
SchemeOption = Annotated[
    str | None,
    typer.Option(
        help=f"How the cache stores tokens; default: that of the plan, or {DEFAULT_SCHEME}."
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Plan of this model, from 'skvq calibrate'."),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact", help="Read packed pages in float32 on a CPU, slower, not by integer products."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="dtype the model runs in.")]
DeviceOption = Annotated[str, typer.Option(help="torch device the model runs on.")]


def main() -> None:
    """Console entry: what the user got wrong is one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError, NotImplementedError) as error:
        if os.environ.get("SKVQ_TRACEBACK"):
            raise
        typer.echo(f"skvq: {error}", err=True)
        sys.exit(2)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is built: version, backends, instruction sets, formats."""
    from skvq_ext.ops import build_info, format_table

    built, formats = build_info(), format_table()
    if as_json:
        typer.echo(json.dumps({"build": built, "formats": formats}, indent=2))
        return
    from skvq_ext import report

    report.show_info(built, formats)


@app.command()
def ppl(
    model: ModelOption,
    text: TextOption,
    scheme: SchemeOption = None,
    plan: PlanOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score.")] = 1024,
    skip: Annotated[
        int, typer.Option(min=0, help="Tokens read before them, as context that is not scored.")
    ] = 0,
    json_to: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, allow_dash=True, help="Write JSON; - is stdout."),
    ] = None,
    exact: ExactOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Loss of a model on a text, in full precision and through the packed cache.

    Teacher forced: every token attends to the window in full precision and reads every older one
    from packed bytes, exactly as if the text had been generated token by token.
    """
    from skvq_ext import report
    from skvq_ext.perplexity import score_full, score_packed

    loaded = _load(model, dtype, device)
    parsed, made = _scheme_and_plan(scheme, plan, loaded)
    ids = loaded.encode(text.read_text(encoding="utf-8"))
    if ids.shape[1] < skip + tokens:
        raise ValueError(
            f"{text} has {ids.shape[1]} tokens, fewer than --skip {skip} + --tokens {tokens}; "
            "ask for fewer or give a longer text."
        )
    ids = ids[:, : skip + tokens]
    with report.steps() as step:
        full = score_full(loaded.model, ids, skip, step)
        packed = score_packed(loaded.model, ids, parsed, made, skip, step, exact=exact)
    above, error = packed.above(full)
    result = {
        "model": loaded.name,
        "scheme": str(parsed),
        "exact": exact,
        "plan": str(plan) if plan else None,
        "text": str(text),
        "skip": skip,
        "scored": full.scored,
        "nll_full": full.nll,
        "nll_packed": packed.nll,
        "nll_above": above,
        "nll_above_stderr": error,
        "ppl_full": full.perplexity,
        "ppl_packed": packed.perplexity,
    }
    _write_json(json_to, result)
    if json_to is None or str(json_to) != "-":
        report.show_perplexity(result)


@app.command()
def generate(
    model: ModelOption = "smollm2",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text to continue, as a file.")
    ] = None,
    scheme: SchemeOption = None,
    plan: PlanOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat form.")] = False,
    full: Annotated[bool, typer.Option(help="Also generate with the usual cache.")] = False,
    exact: ExactOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Continues a prompt, greedily, from the packed cache."""
    from skvq_ext import report
    from skvq_ext.generation import continue_text, full_cache, packed_cache

    if bool(prompt) == (prompt_file is not None):
        raise ValueError("give the text to continue by --prompt or by --prompt-file, one of them.")
    words = prompt if prompt_file is None else prompt_file.read_text(encoding="utf-8")
    loaded = _load(model, dtype, device)
    parsed, made = _scheme_and_plan(scheme, plan, loaded)
    ids = loaded.encode_chat(words) if chat else loaded.encode(words)
    caches = {"packed": packed_cache(loaded.model, parsed, made, exact)}
    if full:
        caches = {"full precision": full_cache(loaded.model)} | caches
    for name, cache in caches.items():
        report.show_continuation(name, continue_text(loaded, ids, cache, tokens))


@app.command()
def ledger(
    model: Annotated[
        str, typer.Argument(help="A known geometry, a config.json, or a model directory.")
    ],
    context: Annotated[
        list[int] | None, typer.Option("--context", "-c", min=1, help="Tokens; may be repeated.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="How the cache stores tokens.")] = DEFAULT_SCHEME,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Bytes of a packed cache beside a 16-bit one, for a model's geometry and a context."""
    from skvq_ext import report
    from skvq_ext.ledger import Ledger, find_geometry

    geometry = find_geometry(model)
    counted = Ledger(geometry, _scheme(scheme))
    rows = [counted.at(n) for n in context or report.CONTEXTS]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        report.show_ledger(model, counted, rows)


app.command()(calibrate)
app.command("eval")(evaluate)


def _scheme(text: str) -> Scheme:
    from skvq_ext.scheme import Scheme

    return Scheme.parse(text)


def _scheme_and_plan(
    scheme: str | None, path: Path | None, loaded: LanguageModel
) -> tuple[Scheme, Plan | None]:
    """The scheme asked for, or else that of the plan; the plan, checked against model and scheme."""
    from skvq_ext.geometry import Geometry
    from skvq_ext.plan import Plan

    parsed = None if scheme is None else _scheme(scheme)
    if path is None:
        return parsed or _scheme(DEFAULT_SCHEME), None
    geometry = Geometry.from_config(loaded.model.config)
    plan = Plan.load(path, geometry, parsed, loaded.tokenizer_fingerprint)
    return parsed or plan.scheme, plan


def _load(model: str, dtype: str, device: str) -> LanguageModel:
    from skvq_ext.models import load_model

    return load_model(model, dtype, device)


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(result, indent=2)
    if str(path) == "-":
        typer.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
