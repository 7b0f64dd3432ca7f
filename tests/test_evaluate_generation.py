"""Long generation: divergence under teacher forcing, free running, repetition."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from evaluate_models import (
    SMALL,
    BrokenMethod,
    make_loaded,
    make_packed,
    make_passage,
    make_subject,
)
from hf_models import ReferenceCache

from skvq_ext.evaluate import long_generation
from skvq_ext.evaluate.long_generation import likeliest, measure_generation, nucleus
from skvq_ext.evaluate.repetition import longest_loop, repetition
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.models import LanguageModel

PROMPT, NEW = 70, 64


@pytest.fixture(scope="module")
def loaded() -> LanguageModel:
    return make_loaded()


def _steps(loaded: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities of single steps over rows that the packed bytes stand for."""
    usual = loaded.model.config._attn_implementation
    loaded.model.config._attn_implementation = "sdpa"
    cache = ReferenceCache(loaded.model, SMALL)
    rows = [loaded.model(ids[:, [i]], past_key_values=cache).logits[0] for i in range(ids.shape[1])]
    loaded.model.config._attn_implementation = usual
    return torch.cat(rows).double().log_softmax(-1)


def test_divergence_is_that_of_single_steps(
    loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a cache of plain rows, token by token, with the divergence computed in float64."""
    texts: list[list[int]] = []
    real = long_generation._write

    def recorded(*arguments: object) -> list[int]:
        texts.append(real(*arguments))
        return texts[-1]

    monkeypatch.setattr(long_generation, "_write", recorded)
    subject = make_subject(loaded, make_packed(loaded))
    prompts = [make_passage(loaded, 200, seed) for seed in range(2)]
    found = measure_generation(subject, prompts, PROMPT, NEW, seed=3)
    curves, agrees = [], []
    with torch.inference_mode():
        for prompt, written in zip(prompts, texts[:2], strict=True):
            ids = torch.cat([prompt.ids[:, :PROMPT], torch.tensor([written])], 1)[:, :-1]
            full = loaded.model(ids).logits[0].double().log_softmax(-1)[PROMPT - 1 :]
            mine = _steps(loaded, ids)[PROMPT - 1 :]
            curves.append((full.exp() * (full - mine)).sum(-1))
            agrees.append((full.argmax(-1) == mine.argmax(-1)).double())
    kl, agreement = torch.stack(curves).mean(0), torch.stack(agrees).mean(0)
    full, packed = found.methods
    assert len(kl) == NEW and packed.kl > 1e-3
    assert packed.kl == pytest.approx(kl.mean().item(), rel=2e-3)
    assert packed.kl_quarters == pytest.approx(kl.view(4, -1).mean(1).tolist(), rel=1e-2)
    assert packed.kl_stretches == pytest.approx(
        kl.view(32, -1).mean(1).tolist(), rel=3e-2, abs=1e-6
    )
    assert packed.agreement == pytest.approx(agreement.mean().item(), abs=0.02)
    assert packed.drift == packed.kl_quarters[3] / packed.kl_quarters[0]
    error = torch.tensor(packed.kl_stretches).std().item() / math.sqrt(32)
    assert packed.kl_stderr == pytest.approx(error, rel=1e-4)


def test_full_precision_against_itself(loaded: LanguageModel) -> None:
    found = measure_generation(make_subject(loaded), [make_passage(loaded, 100)], 80, 64, seed=0)
    (full,) = found.methods
    assert full.kl == full.kl_stderr == 0 and set(full.kl_quarters) == set(full.kl_stretches) == {0}
    assert full.agreement == 1 and full.drift is None
    assert [run.divergence for run in full.runs] == [None]


def test_free_text_is_that_of_generate(loaded: LanguageModel) -> None:
    """Full precision's greedy text, and where a coarse method leaves it."""
    packed = make_packed(loaded, "k1.5-v1.5-g32-w8-sink0")
    subject, passage = make_subject(loaded, packed), make_passage(loaded, 100)
    texts = []
    for method in subject.methods:
        cache = method.cache(loaded.model)
        read = loaded.model.generate(
            passage.ids,
            attention_mask=torch.ones_like(passage.ids),
            past_key_values=cache,
            max_new_tokens=64,
            do_sample=False,
            suppress_tokens=[0, 1],
            prefill_chunk_size=64,
        )
        texts.append(read[0, 100:].tolist())
    found = measure_generation(subject, [passage], 100, 64, seed=0)
    for method, text in zip(found.methods, texts, strict=True):
        assert method.runs[0].repetition == repetition(text)
        assert method.runs[0].excerpt == loaded.decode(torch.tensor(text))
    first = next(i for i in range(64) if texts[0][i] != texts[1][i])
    assert found.methods[1].runs[0].divergence == first


def test_special_tokens_are_never_written() -> None:
    loaded = make_loaded()
    loaded.model.generation_config.eos_token_id = [40]
    with torch.no_grad():  # what the model would say otherwise
        loaded.model.lm_head.weight[[0, 1, 40]] *= 50
    subject, passage = make_subject(loaded), make_passage(loaded, 80)
    for choose in (likeliest, nucleus(0)):
        method = subject.methods[0]
        written = long_generation._write(subject, method, passage, 64, choose, print)
        assert len(written) == 64 and not {0, 1, 40} & set(written)


def test_samples_come_from_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.17, 0.02, 0.01]).log()
    choose = nucleus(0)
    counts = Counter(choose(logits) for _ in range(2000))
    assert set(counts) == {0, 1, 2}
    assert counts[0] / 2000 == pytest.approx(0.5 / 0.97, abs=0.04)
    again, same = nucleus(5), nucleus(5)
    assert [again(logits) for _ in range(50)] == [same(logits) for _ in range(50)]


def test_repetition() -> None:
    plain = list(range(20))
    assert repetition(plain) == long_generation.repetition(plain)
    assert repetition(plain).repeated_4grams == 0 and repetition(plain).distinct_1 == 1
    # 1 2 3 1 2 3 1 2: 4-grams 1231 2312 3123 1231 2312, pairs 12 23 31 12 23 31 12
    loop = repetition([1, 2, 3, 1, 2, 3, 1, 2])
    assert loop.repeated_4grams == pytest.approx(2 / 5)
    assert loop.distinct_1 == 3 / 8 and loop.distinct_2 == pytest.approx(3 / 7)
    assert loop.longest_loop == 8


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        ([1, 2, 3, 4], 0),
        ([7, 7], 2),
        ([1, 2, 3, 1, 2], 0),
        ([1, 2, 3, 1, 2, 3], 6),
        ([9, 1, 2, 1, 2, 1, 8, 8, 8], 5),
        ([5, 4, 3, 2, 1, 1, 2, 3, 4, 5], 2),
    ],
)
def test_the_longest_loop(ids: list[int], tokens: int) -> None:
    assert longest_loop(ids) == tokens


def test_generation_that_cannot_be(loaded: LanguageModel) -> None:
    subject, passage = make_subject(loaded), make_passage(loaded, 100)
    for prompt, new, message in (
        (101, 64, "too few for a prompt of 101"),
        (100, 63, "too short to measure drift"),
        (0, 64, "too short to measure drift"),
        (100, 4000, "made for 4096"),
    ):
        with pytest.raises(EvaluationError, match=message):
            measure_generation(subject, [passage], prompt, new, 0)


def test_logits_that_are_nan() -> None:
    loaded = make_loaded()
    subject = make_subject(loaded, BrokenMethod(name="broken"))
    with pytest.raises(EvaluationError, match="the logits hold NaN"):
        measure_generation(subject, [make_passage(loaded, 100)], 80, 64, 0)
