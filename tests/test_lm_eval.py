"""The model "skvq" of the lm-evaluation-harness, on a tiny model, held against plain rows."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB, ReferenceCache, make_model, make_tokens

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'skvq_ext[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from skvq_ext.generation import packed_cache
from skvq_ext.geometry import Geometry
from skvq_ext.lm_eval import SkvqLM
from skvq_ext.lm_eval.__main__ import main
from skvq_ext.perplexity import score
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

SCHEME = "k2-v1.5-ghead-w16-sink2-fp8"
FINE = "k8-v8-g32-w16-sink2-fp16-identity"
CLOSE = 1e-3  # nats per token; a tile that is read packed and should not be, or the reverse, gives far more
PREFIX = 1  # "<s>": stands before a text that has no context, and ends one
SPECIAL = 2  # tokens that are not written out; generation is told to leave them out
GREEDY = {"do_sample": False, "until": ["w999"], "suppress_tokens": [0, PREFIX]}


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def text(count: int, seed: int) -> str:
    return words(make_tokens(count, seed=seed)[0].tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a tokenizer whose words are the numbers of its tokens."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", spread=0.1).save_pretrained(path)
    names = {"<pad>": 0, "<s>": PREFIX} | {f"w{i}": i for i in range(2, VOCAB)}
    plain = Tokenizer(WordLevel(names, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="<s>"
    ).save_pretrained(path)
    return path


def make_lm(folder: Path, **arguments: Any) -> SkvqLM:
    """Read in float32, so that only the order of sums differs from the reference."""
    given = {"scheme": SCHEME, "exact": True, "batch_size": 4, "device": "cpu"} | arguments
    return SkvqLM(str(folder), **given)


def requests(kind: str, rows: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


# Of unequal lengths, with equal contexts and with contexts of one token.
ROWS = [
    (text(200, 3), " w5 w6 w7"),
    (text(200, 3), " w9"),
    (text(131, 4), " " + text(40, 5)),
    ("w8", " w9 w10"),
    (text(260, 6), " w4"),
    ("", text(100, 7)),
    (text(200, 3), " w11 w12"),
]


def split(row: tuple[str, str]) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, read from the words themselves."""
    context, wanted = ([int(word[1:]) for word in part.split()] for part in row)
    return context or [PREFIX], wanted


@torch.no_grad()
def step_by_step(
    model: Any, row: tuple[str, str], prefill: str, cache: Any = None
) -> tuple[float, bool]:
    """The answer from single steps, one sequence at a time, through a packed cache or a given one."""
    context, wanted = split(row)
    ids = torch.tensor([context + wanted])
    cache = packed_cache(model, Scheme.parse(SCHEME), exact=True) if cache is None else cache
    exact = len(context) - 1 if prefill == "exact" else 0
    sizes = [exact] * (exact > 0) + [1] * (len(ids[0]) - 1 - exact)
    parts = ids[:, :-1].split(sizes, dim=1)
    logits = torch.cat([model(part, past_key_values=cache).logits[0] for part in parts])
    scored = logits[len(context) - 1 :].log_softmax(-1)
    found = scored.gather(1, torch.tensor(wanted)[:, None]).sum()
    return float(found), scored.argmax(-1).tolist() == wanted


def test_continuations_read_what_plain_rows_say() -> None:
    """The direct computation itself, against rows that are quantized without a packed cache."""
    row, model = ROWS[0], make_model("llama", spread=0.1)
    found, _ = step_by_step(model, row, "exact")
    model.set_attn_implementation("eager")
    expected, _ = step_by_step(model, row, "exact", ReferenceCache(model, SCHEME))
    assert found == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("prefill", ["exact", "packed"])
def test_continuations_read_the_packed_history(folder: Path, prefill: str) -> None:
    lm = make_lm(folder, prefill=prefill)
    found = lm.loglikelihood(requests("loglikelihood", ROWS))
    plain = HFLM(str(folder), device="cpu").loglikelihood(requests("loglikelihood", ROWS))
    moved = []
    for row, (total, greedy), (unpacked, _) in zip(ROWS, found, plain, strict=True):
        expected, likeliest = step_by_step(lm.model, row, prefill)
        assert total == pytest.approx(expected, abs=CLOSE * len(split(row)[1]))
        assert greedy == likeliest
        moved.append(abs(total - unpacked))
    # All but the three tokens of the fourth row reach back to packed tiles, the ones too whose
    # only scored token follows the context.
    assert min(moved[:3] + moved[4:]) > 5 * CLOSE
    assert moved[3] < CLOSE


def test_both_prefills_differ(folder: Path) -> None:
    row = requests("loglikelihood", ROWS[4:5])
    (exact, _), (packed, _) = (
        make_lm(folder, prefill=prefill).loglikelihood(row)[0] for prefill in ("exact", "packed")
    )
    assert abs(exact - packed) > 5 * CLOSE


@pytest.mark.parametrize("prefill", ["exact", "packed"])
def test_fine_codes_give_what_the_harness_gives_without_them(folder: Path, prefill: str) -> None:
    asked = requests("loglikelihood", ROWS)
    found = make_lm(folder, scheme=FINE, prefill=prefill).loglikelihood(asked)
    plain = HFLM(str(folder), device="cpu").loglikelihood(asked)
    for (total, greedy), (expected, likeliest) in zip(found, plain, strict=True):
        assert total == pytest.approx(expected, abs=0.1)
        assert greedy == likeliest


@pytest.mark.parametrize("prefill", ["exact", "packed"])
def test_a_rolling_text_costs_what_perplexity_says(folder: Path, prefill: str) -> None:
    """A text has no context: each token reads the ones before it, whatever the prefill."""
    lm, (whole, short) = make_lm(folder, prefill=prefill), (text(210, 8), text(90, 9))
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(whole,), (short,)]))
    for total, written in zip(found, (whole, short), strict=True):
        ids = torch.tensor([[PREFIX, *split(("", written))[1]]])
        cache = packed_cache(lm.model, Scheme.parse(SCHEME), exact=True)
        losses = score(lm.model, ids, cache, chunk=1).losses
        assert total == pytest.approx(-float(losses.sum()), abs=CLOSE * len(losses))


def test_a_context_that_is_too_long_loses_its_start(folder: Path) -> None:
    lm = make_lm(folder, max_length=150)
    cut = words(split(ROWS[0])[0][-148:])
    asked = requests("loglikelihood", [ROWS[0], (cut, ROWS[0][1])])
    first, second = lm.loglikelihood(asked)
    assert first == pytest.approx(second, abs=1e-5)
    with pytest.raises(ValueError, match="continuation of 151 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("w8", " " + text(151, 5))]))


@torch.no_grad()
def greedy_text(model: Any, context: str, count: int, prefill: str) -> str:
    """Greedy continuation from single steps through a packed cache."""
    cache = packed_cache(model, Scheme.parse(SCHEME), exact=True)
    ids = torch.tensor([split((context, ""))[0]])
    exact = ids.shape[1] - 1 if prefill == "exact" else 0
    sizes = [exact] * (exact > 0) + [1] * (ids.shape[1] - exact)
    for part in ids.split(sizes, dim=1):
        logits = model(part, past_key_values=cache).logits
    written: list[int] = []
    while len(written) < count:
        written.append(SPECIAL + int(logits[0, -1, SPECIAL:].argmax()))
        logits = model(torch.tensor([written[-1:]]), past_key_values=cache).logits
    return words(written)


@pytest.mark.parametrize("prefill", ["exact", "packed"])
def test_generation_reads_the_packed_history_of_a_padded_batch(folder: Path, prefill: str) -> None:
    contexts = [text(200, 3), text(131, 4), "w8", text(90, 6)]
    how = GREEDY | {"max_gen_toks": 40}
    lm = make_lm(folder, prefill=prefill)
    found = lm.generate_until(requests("generate_until", [(context, how) for context in contexts]))
    for context, written in zip(contexts, found, strict=True):
        assert written == greedy_text(lm.model, context, 40, prefill)
    plain = HFLM(str(folder), device="cpu", batch_size=4)
    assert plain.generate_until(requests("generate_until", [(contexts[0], how)])) != found[:1]


def test_beams_share_what_was_read(folder: Path) -> None:
    how = GREEDY | {"max_gen_toks": 12, "num_beams": 3}
    asked = requests("generate_until", [(text(200, 3), how), (text(90, 6), how)])
    found = make_lm(folder, scheme=FINE).generate_until(asked)
    assert found == HFLM(str(folder), device="cpu", batch_size=2).generate_until(asked)


def write_tasks(path: Path, choices: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Two tasks on local files, "tiny_choice" and "tiny_answer"."""
    for name, rows in (("choice", choices), ("answer", answers)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task: dict[str, Any] = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / f"{name}.jsonl")}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
        }
        if name == "choice":
            task |= {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
            task["metric_list"] = [{"metric": "acc"}]
        else:
            task |= {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
            task["generation_kwargs"] = GREEDY | {"max_gen_toks": 5}
        (path / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions of each kind, of which the model gets two and one right."""
    path, questions = tmp_path_factory.mktemp("tasks"), [text(n, n) for n in (150, 190, 230)]
    model = make_model("llama", spread=0.1)
    choices, answers = [], []
    for index, question in enumerate(questions):
        options = ["w5 w6", "w7", "w8 w9 w10"]
        totals = [step_by_step(model, (question, o), "exact")[0] for o in options]
        best = totals.index(max(totals))
        right = best if index < 2 else (best + 1) % 3
        choices.append({"question": question, "choices": options, "answer": right})
        written = greedy_text(model, question, 5, "exact")
        answers.append({"question": question, "answer": written if index == 0 else "w3"})
    write_tasks(path, choices, answers)
    return path


def test_the_harness_runs_both_kinds_of_task(folder: Path, tasks: Path) -> None:
    found = simple_evaluate(
        model=make_lm(folder),
        tasks=["tiny_choice", "tiny_answer"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert found["results"]["tiny_answer"]["exact_match,none"] == pytest.approx(1 / 3)
    assert found["config"]["skvq_scheme"] == SCHEME
    assert found["config"]["skvq_prefill"] == "exact"


@pytest.fixture()
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were looked up; each look-up fails."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Runs the command in this process, without reading the harness's thousands of own tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "skvq", "--device", "cpu", *arguments])
    main()


def test_the_command_writes_results_offline(
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    no_network: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tmp_path / "plan.safetensors"
    geometry = Geometry.from_config(make_model("llama").config)
    Plan.default(geometry, Scheme.parse(SCHEME)).save(plan)
    command(
        monkeypatch,
        *("--model_args", f"pretrained={folder},plan={plan},exact=True"),
        *("--include_path", str(tasks), "--tasks", "tiny_choice"),
        *("--output_path", str(tmp_path / "out")),
    )
    written = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert written["results"]["tiny_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert written["config"]["skvq_scheme"] == f"{SCHEME}-hadamard-clip"  # that of the plan
    assert len(written["config"]["skvq_plan_sha256"]) == 64
    assert not no_network


def test_the_command_says_in_one_line_what_is_wrong(
    folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(
            monkeypatch,
            *("--model_args", f"pretrained={folder},scheme=k5-v2"),
            *("--include_path", str(tasks), "--tasks", "tiny_choice"),
        )
    assert stop.value.code == 2
    assert "skvq: 'k5': '5' is not a tensor format" in capsys.readouterr().err.splitlines()[-1]


def test_wrong_arguments_are_named(folder: Path, tmp_path: Path) -> None:
    other = Geometry.from_config(make_model("gemma2").config)
    Plan.default(other, Scheme.parse(SCHEME)).save(foreign := tmp_path / "foreign.safetensors")
    for arguments, message in (
        ({"scheme": "k2-v1.5-kivi"}, "refused"),
        ({"prefill": "none"}, "prefill='none' is not known; use one of exact, packed"),
        ({"plan": tmp_path / "absent"}, "there is no such file"),
        ({"plan": foreign}, "the plan does not fit"),
        ({"batch_size": "auto"}, "batch_size='auto': give a number"),
        ({"mixed_precision_dtype": "bfloat16"}, "give dtype instead"),
    ):
        with pytest.raises(ValueError, match=message):
            make_lm(folder, **arguments)
