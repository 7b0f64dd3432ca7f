"""Specs, memory, whole runs, and the command."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import sample_result
from evaluate_models import SMALL, make_loaded, make_packed, make_text, make_tokenizer
from hf_models import make_model
from typer.testing import CliRunner

from skvq_ext import cli, report
from skvq_ext.baselines.registry import build
from skvq_ext.evaluate import command, tables
from skvq_ext.evaluate.memory import measure_memory
from skvq_ext.evaluate.method import FullPrecision, Packed
from skvq_ext.evaluate.result import MEASURES, Result
from skvq_ext.evaluate.run import Options, Source, check, evaluate
from skvq_ext.evaluate.specs import Builder, split
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.geometry import Geometry
from skvq_ext.ledger import Ledger
from skvq_ext.models import LanguageModel
from skvq_ext.plan import Part, Plan, PlanError, SplitPlan
from skvq_ext.scheme import Scheme, SchemeError

KIVI = "kivi:k4-v4-g32-w16-sink3"
QUICK = Options(
    tokens=64,
    skip=100,
    lengths=(300,),
    depths=(0.0, 0.5),
    haystacks=1,
    prompt_tokens=80,
    new_tokens=64,
    layer_tokens=128,
    contexts=(100, 1000),
)


@pytest.fixture(scope="module")
def loaded() -> LanguageModel:
    return make_loaded()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two to measure on, one to calibrate on."""
    where = tmp_path_factory.mktemp("texts")
    paths = [where / f"{name}.txt" for name in ("one", "two", "fit")]
    for seed, path in enumerate(paths):
        path.write_text(make_text(700, seed))
    return paths


@pytest.fixture(scope="module")
def plan(loaded: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "mine.safetensors"
    made = Plan.default(Geometry.from_config(loaded.model.config), Scheme.parse(SMALL))
    made.save(path)
    return path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("k2-v1.5", ("", "k2-v1.5")),
        ("k3:1/2+2-v1.5@a:b.safetensors", ("", "k3:1/2+2-v1.5@a:b.safetensors")),
        ("KIVI:k2-v2", ("kivi", "k2-v2")),
        ("int-hadamard:", ("int-hadamard", "")),
        ("@plans/x.safetensors", ("", "@plans/x.safetensors")),
        ("@C:/x", ("", "@C:/x")),
    ],
)
def test_specs_are_split(spec: str, expected: tuple[str, str]) -> None:
    assert split(spec) == expected


def test_methods_of_specs(loaded: LanguageModel, plan: Path) -> None:
    builder = Builder(loaded, simulate=True)
    specs = [SMALL, f"{SMALL}@{plan}", f"@{plan}", KIVI]
    full = builder.build([])[0]
    default, planned, alone, kivi = (builder.build([spec])[1] for spec in specs)
    assert full.method.bits == 32 and full.spec == ""
    assert default.method.packed and default.method.plan is None
    assert planned.method.plan is not None and planned.method.name == f"{SMALL}, plan mine"
    assert str(alone.method.scheme) == str(alone.method.plan.scheme)
    assert not kivi.method.packed and kivi.spec == KIVI


def test_what_is_fitted_gets_the_calibration_text(loaded: LanguageModel, texts: list[Path]) -> None:
    ids = Source.read(loaded, texts[2]).passage.ids
    spec = "published:k2-v2-g64-w16-reorder-pre_rope-clip0.92-sink3-fp8"
    done: list[tuple[str, int, int]] = []
    builder = Builder(loaded, ids, step=lambda *step: done.append(step))
    method = builder.build([spec])[1].method
    assert method.packed and method.protocol.startswith("window 16, 3 sinks")
    assert done[-1][1:] == (2, 2)


def test_bits_of_full_precision_are_those_of_the_model() -> None:
    half = LanguageModel("half", make_model("llama").bfloat16(), make_tokenizer())
    assert Builder(half).build([])[0].method.bits == 16


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([KIVI], "packs nothing: it is simulated.*--simulate"),
        ([SMALL, SMALL], "asked for twice"),
        (["published:k2-v2-g64-w128"], "--calibration-text"),
        (["kivvi:k2"], "nearest: 'kivi'"),
        ([f"{SMALL}@nowhere.safetensors"], "there is no plan 'nowhere.safetensors'"),
        (["k2-v2-hadamrd"], "nearest: 'hadamard'"),
    ],
)
def test_specs_that_are_refused(loaded: LanguageModel, specs: list[str], message: str) -> None:
    with pytest.raises((EvaluationError, SchemeError, ValueError), match=message):
        Builder(loaded).build(specs)


def test_a_plan_of_another_model_or_scheme(plan: Path) -> None:
    other = LanguageModel("other", make_model("gemma3"), make_tokenizer())
    with pytest.raises(PlanError, match="num_layers: 3 here, 2 in the plan"):
        Builder(other).build([f"{SMALL}@{plan}"])
    with pytest.raises(PlanError, match="k: '3' here, '2' in the plan"):
        Builder(make_loaded()).build([f"k3-v1.5-g32@{plan}"])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_bytes_are_those_of_the_ledger(kind: str) -> None:
    """The ledger counts a plan with all tables that calibration may fill; so does this one."""
    loaded = make_loaded(kind)
    geometry, scheme = Geometry.from_config(loaded.model.config), Scheme.parse(SMALL)
    kivi = build(KIVI, loaded.model)
    plan = Plan.default(geometry, scheme)
    plan.layers[:] = [deepcopy(layer) for layer in plan.layers]
    for _, _, tensor in plan.named_tensors():
        tensor.shift, tensor.scale = tensor.shift + 1, tensor.scale * 2
    contexts = (30, 100, 5000)
    methods = [FullPrecision(), make_packed(loaded), Packed(geometry, scheme, plan), kivi]
    found = measure_memory(geometry, methods, contexts)
    ledger = Ledger(geometry, scheme)
    rows = [ledger.at(n) for n in contexts]
    full, default, planned, simulated = found.methods
    assert full.total == tuple(row.full_precision for row in rows)
    assert full.per_token == ledger.full_bytes_per_token
    assert planned.total == tuple(row.total for row in rows) and planned.allocated
    assert planned.per_token == default.per_token == ledger.bytes_per_token
    saved = {a - b for a, b in zip(planned.total, default.total, strict=True)}
    assert len(saved) == 1 and saved.pop() == geometry.num_layers * 2 * 3 * 64 * 4 * (
        geometry.num_kv_heads
    )
    assert simulated.total == pytest.approx([n * kivi.bits / 16 for n in full.total], abs=1)
    assert full.allocated and not simulated.allocated
    with pytest.raises(EvaluationError, match="1 token or more"):
        measure_memory(geometry, [], (0,))


def test_bits_and_bytes_of_heads_in_several_formats() -> None:
    one, whole = Geometry(1, 2, 1, 64), Geometry(2, 4, 2, 64)
    parts = tuple(
        Part((head,), k, "2", Plan.default(one, Scheme(k, "2", 32)).layers[0])
        for head, k in enumerate(("4", "2"))
    )
    scheme = Scheme.parse("bits3-g32-w16-sink3")
    plan = Plan(scheme, whole, [SplitPlan(parts)] * 2)
    method = Packed(whole, scheme, plan)
    bits = [Scheme(k, "2", 32).record_format(64).bits_per_value for k in ("4", "2")]
    assert method.bits == pytest.approx(sum(bits) / 2)
    (found,) = measure_memory(whole, [method], (100, 10_100)).methods
    assert found.per_token == pytest.approx(2 * 2 * 2 * 64 * method.bits / 8)
    pages = [64 * found.per_token * ((n - 19) // 64) for n in (100, 10_100)]
    tables = 4 * 2 * 2 * ((10_100 - 19) // 64 - 1)  # a page table of each part in each layer
    assert found.total[1] - found.total[0] == pages[1] - pages[0] + tables


def _run(loaded: LanguageModel, texts: list[Path], options: Options = QUICK) -> Result:
    sources = [Source.read(loaded, path) for path in texts[:2]]
    built = Builder(loaded, simulate=True).build([SMALL, KIVI])
    return evaluate(loaded, built, sources, options=options)


def test_equal_seeds_give_equal_results(loaded: LanguageModel, texts: list[Path]) -> None:
    """Byte by byte, but for the times."""
    first, again = (_run(loaded, texts) for _ in range(2))
    assert replace(first, times={}).to_json() == replace(again, times={}).to_json()
    assert [entry.kind for entry in first.methods] == ["full", "packed", "simulated"]
    names = [entry.name for entry in first.methods]
    for measure in MEASURES:
        assert [m.method for m in getattr(first, measure).methods] == names
    timed = ("ppl", "needles", "generation", "layers")
    assert set(first.times) == {f"{measure}: {name}" for measure in timed for name in names}
    assert Result.from_json(first.to_json()) == first
    other = _run(loaded, texts, replace(QUICK, seed=1, measures=("generation",)))
    assert other.generation != first.generation and other.ppl is None


def test_progress_ends_where_it_said(loaded: LanguageModel, texts: list[Path]) -> None:
    """One bar per measurement, for all methods and texts together."""
    last: dict[str, tuple[int, int]] = {}

    def step(name: str, done: int, total: int) -> None:
        assert last.get(name, (0, total))[1] == total
        last[name] = done, total

    sources = [Source.read(loaded, path) for path in texts[:2]]
    evaluate(loaded, Builder(loaded).build([SMALL]), sources, options=QUICK, step=step)
    assert set(last) == {"ppl", "needles", "generation", "layers"}
    assert all(0 <= total - done <= 4 for done, total in last.values())


def test_texts_are_named(loaded: LanguageModel, texts: list[Path], tmp_path: Path) -> None:
    source = Source.read(loaded, texts[0])
    assert source.text.name == "one.txt" and source.text.tokens == 700
    assert Source.read(loaded, texts[0], 50).passage.ids.shape == (1, 50)
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match="is not UTF-8 text"):
        Source.read(loaded, tmp_path / "raw")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 650}, "one.txt has 700 tokens; 650 .* need 750"),
        ({"lengths": (800,)}, "1 haystacks of 800 need 800"),
        ({"prompt_tokens": 701}, "too few for a prompt of 701"),
        ({"layer_tokens": 701}, "fewer than the 701"),
        ({"measures": ("ppl", "needle")}, "unknown measurement 'needle'; nearest: 'needles'"),
        ({"measures": ()}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    loaded: LanguageModel, texts: list[Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        check(loaded, [Source.read(loaded, texts[0])], None, replace(QUICK, **changes))


def test_texts_that_are_one(loaded: LanguageModel, texts: list[Path], tmp_path: Path) -> None:
    one, two, fit = (Source.read(loaded, path) for path in texts)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(texts[1].read_bytes())
    with pytest.raises(EvaluationError, match="both the calibration text and evaluated on"):
        check(loaded, [one, two], Source.read(loaded, copy, 100), QUICK)
    with pytest.raises(EvaluationError, match="different file names"):
        check(loaded, [one, one], fit, QUICK)
    check(loaded, [one, two], fit, QUICK)


def test_every_table_says_how_methods_store(capsys: pytest.CaptureFixture[str]) -> None:
    result = sample_result()
    width, report.console.width = report.console.width, 240
    try:
        tables.show(result)
    finally:
        report.console.width = width
    shown = capsys.readouterr().out
    blocks = shown.split("\n\n")
    for measure in MEASURES:
        found = getattr(result, measure)
        assert " ".join(found.protocol.split()) in " ".join(shown.split())
    for entry in result.methods:
        lines = [line for line in shown.splitlines() if line.strip().startswith(entry.name)]
        assert len(lines) == 6 and blocks
        for line in lines[1:]:
            assert f"{entry.bits:.4g}" in line and entry.kind in line
            assert tables.exact_tokens(entry.protocol) in line
    assert "+0.1260 ± 0.0086" in shown and "1.75" in shown and "never" in shown


def test_exact_tokens() -> None:
    assert tables.exact_tokens("simulated; window 128, 5 sinks; K per channel") == (
        "window 128, 5 sinks"
    )
    assert tables.exact_tokens("every token exact") == "every token exact"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(where)
    make_tokenizer().save_pretrained(where)
    return where


def _arguments(model_dir: Path, texts: list[Path], **changes: object) -> list[str]:
    options: dict[str, object] = {
        "method": SMALL,
        "text": texts[0],
        "tokens": 64,
        "length": 400,
        "haystacks": 1,
        "prompt-tokens": 80,
        "new-tokens": 64,
        "layer-tokens": 128,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["eval", str(model_dir), *(str(x) for n, v in options.items() for x in (f"--{n}", v))]


def test_the_command(model_dir: Path, texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = _arguments(model_dir, texts, out=out, calibration_text=texts[2])
    arguments += ["--text", str(texts[1]), "--method", KIVI, "--simulate"]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = Result.from_json((out / "result.json").read_text())
    assert [entry.kind for entry in result.methods] == ["full", "packed", "simulated"]
    assert result.setting.calibration is not None
    assert all(getattr(result, measure) is not None for measure in MEASURES)
    assert "Perplexity" in done.stdout and "report.html" in done.stdout.replace("\n", "")
    assert "html" in (out / "report.html").read_text()[:200].lower()


def test_the_command_writes_nothing_unless_told(model_dir: Path, texts: list[Path]) -> None:
    arguments = _arguments(model_dir, texts, measure="memory, layers")
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "Layers" in done.stdout and "Perplexity" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "ppl,memroy"}, "nearest: 'memory'"),
        ({"tokens": 5000}, "has 700 tokens"),
        ({"method": KIVI}, "--simulate"),
        ({"method": "k2-v2-smooth"}, "'balance' is the scaling"),
    ],
)
def test_mistakes_are_one_line(
    model_dir: Path,
    texts: list[Path],
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SKVQ_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["skvq", *_arguments(model_dir, texts, **changes)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and "Traceback" not in said


def test_missing_packages_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"needs no_such_package: pip install 'skvq_ext\[hf,eval\]'"
    ):
        command._need(("json", "no_such_package"))


def test_json_is_plain(loaded: LanguageModel, texts: list[Path]) -> None:
    result = _run(loaded, texts, replace(QUICK, measures=("memory",)))
    values = json.loads(result.to_json())
    assert values["memory"]["contexts"] == [100, 1000] and values["times"] == {}
    assert values["setting"]["versions"]["torch"] == torch.__version__
