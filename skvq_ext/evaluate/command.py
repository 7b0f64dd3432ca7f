"""`skvq eval`: methods compared on a model, under one protocol for all."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

_PACKAGES = ("pydantic", "transformers")  # for results, and to run a model
_REPORT_PACKAGES = ("jinja2", "matplotlib")

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Directory in Hugging Face format or with one GGUF file, a .gguf file, an "
        "'owner/name' of the hub, or 'smollm2', the demo model."
    ),
]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        "-m",
        help="What is compared with full precision; may be repeated. 'k2-v1.5': the packed cache. "
        "'k2-v1.5@PLAN' or '@PLAN': with a plan. 'published:SCHEME': SKVQ as published. "
        "'kivi:k2-v2-g32': a baseline, see --simulate.",
    ),
]
TextsOption = Annotated[
    list[Path],
    typer.Option(
        "--text",
        exists=True,
        dir_okay=False,
        readable=True,
        help="UTF-8 text to measure on; may be repeated. Needles and layers read the first.",
    ),
]
MeasureOption = Annotated[
    str, typer.Option(help="Any of ppl, needles, generation, layers, memory, with commas between.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        readable=True,
        help="UTF-8 text for methods that are fitted here; none that is measured on.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Directory for result.json, report.html and plots."),
]
SimulateOption = Annotated[
    bool, typer.Option("--simulate", help="Allow methods that pack nothing, marked as simulated.")
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Packed methods read their pages in float32 on a CPU.")
]


TokensOption = Annotated[int, typer.Option(min=64, help="ppl: tokens scored of each text.")]
SkipOption = Annotated[int, typer.Option(min=0, help="ppl: tokens of context before them.")]
LengthOption = Annotated[
    list[int] | None,
    typer.Option(min=64, help="needles: tokens of a haystack; may be repeated [512 .. 4096]."),
]
HaystacksOption = Annotated[int, typer.Option(min=1, help="needles: haystacks per length.")]
PromptOption = Annotated[int, typer.Option(min=1, help="generation: tokens of a prompt.")]
NewOption = Annotated[int, typer.Option(min=64, help="generation: tokens written.")]
LayerOption = Annotated[int, typer.Option(min=64, help="layers: tokens read.")]
FitOption = Annotated[int, typer.Option(min=64, help="Tokens of --calibration-text to use.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of numbers, samples and clusters.")]
DtypeOption = Annotated[str, typer.Option(help="dtype the model runs in.")]
DeviceOption = Annotated[str, typer.Option(help="torch device the model runs on.")]


def evaluate(
    model: ModelArgument,
    method: MethodOption,
    text: TextsOption,
    measure: MeasureOption = "ppl,needles,generation,layers,memory",
    tokens: TokensOption = 2048,
    skip: SkipOption = 0,
    length: LengthOption = None,
    haystacks: HaystacksOption = 2,
    prompt_tokens: PromptOption = 256,
    new_tokens: NewOption = 2048,
    layer_tokens: LayerOption = 1024,
    calibration_text: CalibrationOption = None,
    calibration_tokens: FitOption = 8192,
    simulate: SimulateOption = False,
    seed: SeedOption = 0,
    out: OutOption = None,
    exact: ExactOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Measures what methods cost a model: perplexity, needles, drift of long texts, errors per
    layer, bytes. docs/evaluation.md says how."""
    _need(_PACKAGES + (_REPORT_PACKAGES if out else ()))
    from skvq_ext import report
    from skvq_ext.evaluate import run, tables
    from skvq_ext.evaluate.specs import Builder
    from skvq_ext.models import load_model

    measures = tuple(name.strip() for name in measure.split(",") if name.strip())
    options = run.Options(
        measures,
        tokens,
        skip,
        haystacks=haystacks,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        layer_tokens=layer_tokens,
        seed=seed,
    )
    options = replace(options, lengths=tuple(length)) if length else options
    loaded = load_model(model, dtype, device)
    sources = [run.Source.read(loaded, path) for path in text]
    fitted = None
    if calibration_text:
        fitted = run.Source.read(loaded, calibration_text, calibration_tokens)
    run.check(loaded, sources, fitted, options)
    with report.steps() as step:
        ids = fitted.passage.ids if fitted else None
        built = Builder(loaded, ids, simulate, seed, exact, step).build(method)
        result = run.evaluate(loaded, built, sources, fitted, options, step)
    tables.show(result)
    if out:
        from skvq_ext.evaluate.html import write

        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(result.to_json(), encoding="utf-8")
        write(result, out)
        report.say(f"{out / 'result.json'}, {out / 'report.html'}")


def _need(packages: tuple[str, ...]) -> None:
    """Raises ValueError, before anything is computed, where a package is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"'skvq eval' needs {' and '.join(missing)}: pip install 'skvq_ext[hf,eval]'"
        )
