"""The `skvq` command, on a small random model that lies in a directory as any other would."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB, make_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from skvq_ext import cli, report
from skvq_ext.cache import DEFAULT_SCHEME
from skvq_ext.calibrate import command
from skvq_ext.generation import full_cache, packed_cache
from skvq_ext.models import ModelError, load_model
from skvq_ext.ops import format_table
from skvq_ext.perplexity import packed_chunk, score, score_full, score_packed
from skvq_ext.plan import Plan
from skvq_ext.report import cuda_formats
from skvq_ext.scheme import Scheme

SMALL = "k2-v1.5-g32-w16-sink3-fp8"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of one token per printable character."""
    where = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(where)
    letters = {"<pad>": 0, "<s>": 1} | {chr(30 + i): i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(2, VOCAB, (600,), generator=generator)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(30 + int(i)) for i in codes))
    return path


def run(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """The error line of a command that must end with exit code 2."""
    monkeypatch.delenv("SKVQ_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["skvq", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_info() -> None:
    known = json.loads(run("info", "--json"))
    assert known["build"]["version"]
    assert {code["name"] for code in known["formats"]["codes"]} >= {"2", "1.5"}
    shown = " ".join(run("info").split())  # a long list is broken where the terminal ends
    assert known["build"]["cpu_isa"] in shown and "1.625" in shown
    cuda = known["build"]["cuda"]
    assert ("not in this build" if cuda is None else cuda["archs"]) in shown
    assert ("Formats that attention reads on CUDA" in shown) == (cuda is not None)


def test_info_of_a_build_for_every_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    built = json.loads(run("info", "--json"))["build"]
    archs = ", ".join(f"{arch}-real" for arch in (80, 86, 89, 90, 100, 120)) + ", 120-virtual"
    instances = ["k2-v2-g64 at head_dim 128"]
    report.show_info(built | {"cuda": {"archs": archs, "instances": instances}}, format_table())
    shown = " ".join(capsys.readouterr().out.split())
    assert archs in shown and "k2-v2 128: 64" in shown


def test_decode_kernels_are_shown_by_format() -> None:
    instances = [f"k3:{n // 2}/{n}+2-v1.5-g64 at head_dim {n}" for n in (64, 128)]
    instances += [f"k2-v2-g{g} at head_dim 64" for g in (32, 64)]
    assert cuda_formats(instances) == [
        ("k3:1/2+2-v1.5", "64: 64; 128: 64"),
        ("k2-v2", "64: 32, 64"),
    ]


def test_default_scheme_is_that_of_the_cache() -> None:
    assert cli.DEFAULT_SCHEME == DEFAULT_SCHEME


def test_ledger_of_a_million_tokens() -> None:
    """Headline scheme on the geometry of Llama-2-7B: 63.5 kB per token in pages, at most."""
    (row,) = json.loads(run("ledger", "llama-2-7b", "-c", 1_000_000, "--json"))
    assert row["pages"] <= 63.5e9
    assert row["total"] <= 1.02 * 63.1e9
    assert row["full_precision"] == 1_000_000 * 32 * 2 * 4096 * 2
    assert "63.6 GB" in run("ledger", "llama-2-7b")


def test_ledger_reads_a_model_directory(model_dir: Path) -> None:
    rows = json.loads(run("ledger", model_dir, "-c", 100, "-c", 1000, "--json", "--scheme", SMALL))
    assert [row["context"] for row in rows] == [100, 1000]


def test_ppl_writes_what_it_measured(model_dir: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("ppl", "--model", model_dir, "--text", text, "--tokens", 200, "--skip", 50)
    lossy = json.loads(run(*arguments, "--scheme", SMALL, "--json", "-"))
    assert lossy["scored"] == 200 and lossy["scheme"] == SMALL and not lossy["exact"]
    assert lossy["ppl_full"] == pytest.approx(math.exp(lossy["nll_full"]))
    assert lossy["nll_packed"] != lossy["nll_full"]
    assert lossy["nll_above"] == pytest.approx(lossy["nll_packed"] - lossy["nll_full"])
    assert 0 < lossy["nll_above_stderr"] < 1
    path = tmp_path / "result.json"
    shown = run(*arguments, "--scheme", "k8-v8-g32-w16-sink3-fp16", "--exact", "--json", path)
    fine = json.loads(path.read_text())
    assert fine["exact"]
    assert fine["nll_full"] == lossy["nll_full"]
    assert fine["nll_packed"] == pytest.approx(fine["nll_full"], abs=5e-3)
    assert "nats per token" in shown


def test_full_score_is_the_plain_loss(model_dir: Path, text: Path) -> None:
    loaded = load_model(str(model_dir))
    ids = loaded.encode(text.read_text())
    assert ids.shape == (1, 600), "one token per character"
    with torch.no_grad():
        logits = loaded.model(ids).logits[0]
    for skip, first in ((0, 1), (1, 1), (130, 130)):
        expected = torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:])
        got = score_full(loaded.model, ids, skip)
        assert got.scored == 600 - first
        assert got.nll == pytest.approx(expected.item(), abs=1e-5)
        assert torch.equal(got.hits, logits[first - 1 : -1].argmax(-1) == ids[0, first:])


@pytest.mark.parametrize("scheme", [SMALL, "k2-v2-g32-w1-sink0", "k2-v2-g32-w70-sink0-rollback9"])
def test_packed_score_is_that_of_single_steps(model_dir: Path, text: Path, scheme: str) -> None:
    """Chunks see what single steps see, so that every old token is read from packed bytes."""
    loaded, parsed = load_model(str(model_dir)), Scheme.parse(scheme)
    ids = loaded.encode(text.read_text())[:, :300]
    chunks = score_packed(loaded.model, ids, parsed, exact=True)
    steps = score(loaded.model, ids, packed_cache(loaded.model, parsed, exact=True), chunk=1)
    torch.testing.assert_close(chunks.losses, steps.losses, atol=2e-4, rtol=1e-4)
    full = score(loaded.model, ids, full_cache(loaded.model))
    assert (full.losses - steps.losses).abs().max() > 0.05, "something was packed"


def test_chunks_never_exceed_the_rollback() -> None:
    assert [packed_chunk(rollback) for rollback in (0, 1, 63, 500)] == [1, 2, 64, 64]


BUDGET = (
    "--scheme",
    "bits2.7-g32-w16-sink3-fp8-centre-hadamard-clip",
    "--formats",
    "k2-v1.5,k3-v2",
)


def test_calibrate_then_use_the_plan(model_dir: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    said = run("calibrate", model_dir, "--text", text, *BUDGET, "-o", plan)
    shown = " ".join(said.split())
    assert "searched on 1200 tokens after lessons from 0, seed 0" in shown
    spent = re.search(r"bits2\.7-g32\S+: (\d\.\d{3}) bits per value", shown)
    assert spent and 2.25 <= float(spent[1]) <= 2.7
    assert (
        "k2-v1.5" in shown and "%" in shown and [x.name for x in tmp_path.iterdir()] == [plan.name]
    )
    result = json.loads(
        run(
            *("ppl", "--model", model_dir, "--text", text, "--tokens", 100, "--skip", 200),
            *("--plan", plan, "--json", "-"),
        )
    )
    assert result["plan"] == str(plan) and result["scheme"] == BUDGET[1]
    assert 0 < result["nll_above"] < 0.5


def test_calibrate_twice(model_dir: Path, text: Path, tmp_path: Path) -> None:
    """The same bytes from the same seed, with tokens from wherever they come."""
    ids = tmp_path / "ids.safetensors"
    save_file({"ids": load_model(str(model_dir)).encode(text.read_text())[0]}, ids)
    plans = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    for plan, options in zip(
        plans,
        (
            ("--text", text),
            ("--text", ids),
            ("--text", text, "--seed", 1),
            ("--text", text, "--text", ids),
        ),
        strict=True,
    ):
        run("calibrate", model_dir, *options, *BUDGET, "--tokens", 600, "-o", plan)
    first, same, *others = (plan.read_bytes() for plan in plans)
    assert first == same and first not in others


def test_calibrate_without_a_text(model_dir: Path, tmp_path: Path) -> None:
    assert Scheme.parse(command.DEFAULT).bits == 2.25
    plan = tmp_path / "plan.safetensors"
    said = run("calibrate", model_dir, *BUDGET, "--tokens", 300, "-o", plan)
    assert "searched on 300 tokens after lessons from 1800, seed 0" in " ".join(said.split())
    assert Plan.load(plan, tokenizer=load_model(str(model_dir)).tokenizer_fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", SMALL, "--formats", "k2-v2"), "have no use with the scheme k2-v1.5-g32"),
        (("--formats", "k2"), "'k2' is not a pair such as 'k2-v1.5'"),
        (("--scheme", "k2-kivi"), "a baseline of the original's tables"),
        (("--scheme", "bits1.2-g128"), "a budget of 1.2 bits per value cannot be kept"),
        (("--tokens", 64), "max_tokens is 64, too few to calibrate on: at least 197"),
        (("--text", "no-such-text"), "does not exist"),
    ],
)
def test_what_cannot_be_calibrated(
    model_dir: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fast = ("--scheme", f"{command.DEFAULT}-hadamard", "--tokens", 200)
    arguments = ("calibrate", model_dir, *fast, *options, "-o", tmp_path / "plan.safetensors")
    assert message in fail(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "plan.safetensors").exists()


def test_a_plan_of_another_tokenizer_is_refused(
    model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, other = tmp_path / "plan.safetensors", tmp_path / "other"
    run("calibrate", model_dir, "--text", text, *BUDGET, "--tokens", 200, "-o", plan)
    shutil.copytree(model_dir, other)
    words = other / "tokenizer.json"
    words.write_text(words.read_text().replace('"a":', '"ä":'))
    arguments = ("ppl", "--model", other, "--text", text, "--plan", plan, "--tokens", 50)
    assert "tokenizer: " in fail(monkeypatch, capsys, *arguments)


def test_generate(model_dir: Path) -> None:
    arguments = ("generate", "--model", model_dir, "--prompt", "Some words to go on with. " * 4)
    shown = run(*arguments, "--tokens", 8, "--scheme", "k8-v8-g32-w8-sink1-fp16", "--full")
    assert "packed: 8 tokens" in shown and "full precision: 8 tokens" in shown
    assert "packed: 8 tokens" in run(*arguments, "--tokens", 8, "--exact")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--scheme": "k2-v2-smooth"}, "'balance' is the scaling"),
        ({"--scheme": "k2-v2-hadamrd"}, "nearest: 'hadamard'"),
        ({"--tokens": 5000}, "has 600 tokens, fewer than --skip 0 + --tokens 5000"),
        ({"--model": "no-such-model"}, "neither a directory, a .gguf file"),
        ({"--text": "no-such-text"}, "does not exist"),
        ({"--dtype": "int8"}, "is not a dtype to run in"),
        ({"--scheme": "k2-v2-balance"}, "calibrat"),
    ],
)
def test_mistakes_are_one_line(
    model_dir: Path,
    text: Path,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"--model": model_dir, "--text": text, "--scheme": SMALL, "--tokens": 10} | change
    arguments = [part for option in options.items() for part in option]
    assert message in fail(monkeypatch, capsys, "ppl", *arguments)


def test_a_plan_of_another_scheme_is_refused(
    model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.safetensors"
    scheme = "k4-v4-g32-w16-sink3-hadamard"
    run("calibrate", model_dir, "--text", text, "--scheme", scheme, "--tokens", 200, "-o", plan)
    arguments = ("ppl", "--model", model_dir, "--text", text, "--scheme", SMALL, "--plan", plan)
    assert "k: '2' here, '4' in the plan" in fail(monkeypatch, capsys, *arguments, "--tokens", 50)


def test_other_mistakes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_formats = ("ledger", "llama-2-7b", "--scheme", "bits2.25")
    assert "leaves the formats of every head to a plan" in fail(monkeypatch, capsys, *no_formats)
    assert "no geometry 'llama-9'" in fail(monkeypatch, capsys, "ledger", "llama-9")
    neither = ("generate", "--model", model_dir)
    assert "--prompt or by --prompt-file" in fail(monkeypatch, capsys, *neither)
    chat = (*neither, "--prompt", "x", "--chat")
    assert "has no chat form" in fail(monkeypatch, capsys, *chat)
    assert "No such command" in fail(monkeypatch, capsys, "perplexity")


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json or exactly one \.gguf file, found neither"):
        load_model(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match="found 2"):
        load_model(str(tmp_path))


def test_planted_numbers_are_where_they_are_looked_for(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import retrieval

    loaded = load_model(str(model_dir))
    ids, digits = retrieval.haystack(loaded, ["One.", "Two.", "Three."], seed=0)
    text = "".join(loaded.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    planted = re.findall(r"The number of (\w+) is (\d{5})\.", text)
    asked = re.findall(r"The number of (\w+) is (\d{5})(?!\.)", text)
    assert len(planted) == 8 and sorted(planted) == sorted(asked)
    found = "".join(loaded.tokenizer.convert_ids_to_tokens(ids[0, digits].tolist()))
    assert found == "".join(number for _, number in asked)


def test_help_needs_no_transformers() -> None:
    code = "import skvq_ext.cli, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_hugging_face_example_of_the_readme(model_dir: Path, tmp_path: Path) -> None:
    """With a small model in the place of the one it names."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (block,) = (block for block in blocks if "from_pretrained" in block)
    small, count = re.subn(r'name = "[^"]+"', f"name = {str(model_dir)!r}", block)
    assert count == 1 and block.count("\n") <= 11
    (tmp_path / "example.py").write_text(small)
    done = subprocess.run([sys.executable, tmp_path / "example.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("bytes")


def test_sizes_for_people() -> None:
    shown = [report.human_bytes(n) for n in (5, 999, 1000, 63_488, 999_600, 63_616_836_480)]
    assert shown == ["5 B", "999 B", "1 kB", "63.5 kB", "1 MB", "63.6 GB"]
    assert report.human_bytes(524_288_000_000) == "524 GB"
    tokens = [report.human_tokens(n) for n in (4096, 131_072, 1_000_000, 1000)]
    assert tokens == ["4k", "128k", "1M", "1,000"]
