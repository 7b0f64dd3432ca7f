"""The command `skvq calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skvq_ext.plan import Plan

DEFAULT = "bits2.25-g128-w128-sink5-fp8"


def calibrate(
    model: Annotated[str, typer.Argument(help="As --model of the other commands.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The plan.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="UTF-8 text, or a .safetensors file with token ids; may be repeated. Default: a small "
            "text that comes with the package.",
        ),
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="Formats ('k2-v1.5'), or a budget in average bits ('bits2.25').")
    ] = DEFAULT,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens that errors are measured on.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn at random.")] = 0,
    formats: Annotated[
        str,
        typer.Option(
            help="Pairs a head may get under a budget, such as 'k2-v1.5,k3-v2'; 'cuda' for those this "
            "build reads on a GPU. Default: all."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="dtype the model runs in.")] = "float32",
    device: Annotated[str, typer.Option(help="torch device the model runs on.")] = "cpu",
) -> None:
    """Searches a plan for a model: transform, clip and, under a budget, formats of every head.

    An interrupted search goes on where it stopped when the same command is given again."""
    from skvq_ext import report
    from skvq_ext.calibrate.formats import read_pairs
    from skvq_ext.calibrate.resume import forget
    from skvq_ext.calibrate.run import calibrate as search
    from skvq_ext.calibrate.texts import packaged_text, read_tokens
    from skvq_ext.geometry import Geometry
    from skvq_ext.models import load_model
    from skvq_ext.scheme import Scheme

    parsed = Scheme.parse(scheme)
    loaded = load_model(model, dtype, device)
    pairs = read_pairs(formats, parsed, Geometry.from_config(loaded.model.config).head_dim)
    ids = [read_tokens(path, loaded.encode) for path in text or []]
    partial = output.with_name(f"{output.name}.partial")
    with report.steps() as step:
        plan = search(
            loaded.model,
            ids or loaded.encode(packaged_text()),
            parsed,
            max_tokens=tokens,
            seed=seed,
            progress=step,
            formats=pairs,
            tokenizer=loaded.tokenizer_fingerprint,
            resume=partial,
        )
    plan.save(output)
    forget(partial)
    _show(plan, f"{output}: plan of {loaded.name}, {plan.origin}")


def _show(plan: Plan, title: str) -> None:
    """What was made, and how many heads got which formats."""
    from skvq_ext import report

    report.say(title)
    counts: dict[tuple[str, str], int] = {}
    for _, part in plan.named_parts():
        key = part.k_format, part.v_format
        counts[key] = counts.get(key, 0) + len(part.heads)
    total = sum(counts.values())
    report.table(
        f"{plan.scheme}: {plan.bits_per_value:.3f} bits per value, scales and zeros included",
        ("formats", "KV heads", "share"),
        [
            (f"k{k}-v{v}", n, f"{100 * n / total:.0f} %")
            for (k, v), n in sorted(counts.items(), key=lambda item: -item[1])
        ],
    )
