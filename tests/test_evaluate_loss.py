"""Perplexity and needles of methods."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
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

from skvq_ext.evaluate import needles
from skvq_ext.evaluate.loss import measure_loss
from skvq_ext.evaluate.method import FullPrecision
from skvq_ext.evaluate.needles import build_haystacks, measure_needles
from skvq_ext.evaluate.result import STRETCHES
from skvq_ext.evaluate.subject import EvaluationError, Passage, Subject
from skvq_ext.models import LanguageModel
from skvq_ext.perplexity import Score, score_full, score_packed
from skvq_ext.scheme import Scheme


@pytest.fixture(scope="module")
def loaded() -> LanguageModel:
    return make_loaded()


def test_loss_of_two_texts(loaded: LanguageModel) -> None:
    """Numbers against the losses of `skvq ppl`, averaged by hand."""
    passages = [make_passage(loaded, 400, seed) for seed in range(2)]
    subject = make_subject(loaded, make_packed(loaded))
    found = measure_loss(subject, passages, scored=190, skip=30)
    full, packed = found.methods
    above, errors = [], []
    for passage, text in zip(passages, packed.texts, strict=True):
        ids = passage.ids[:, :220]
        exact = score_full(loaded.model, ids, 30)
        lossy = score_packed(loaded.model, ids, Scheme.parse(SMALL), skip=30, exact=True)
        difference = (lossy.losses - exact.losses).numpy()
        means = np.array([part.mean() for part in np.array_split(difference, STRETCHES)])
        assert text.nll == pytest.approx(lossy.nll, abs=1e-6)
        assert text.top1 == pytest.approx(lossy.hits.double().mean().item())
        assert text.stretches == pytest.approx(means, abs=1e-6)
        above.append(difference.mean())
        errors.append(means.std(ddof=1) / STRETCHES**0.5)
    assert packed.above == pytest.approx(np.mean(above), abs=1e-6)
    assert packed.above_stderr == pytest.approx(np.hypot(*errors) / 2, rel=1e-4)
    assert packed.perplexity == pytest.approx(np.exp(np.mean([t.nll for t in packed.texts])))
    assert full.above == full.above_stderr == 0 and set(full.texts[1].stretches) == {0}
    assert set(subject.times) == {"ppl: full precision", f"ppl: {packed.method}"}


def test_the_model_attends_as_before() -> None:
    loaded = make_loaded()
    before = loaded.model.config._attn_implementation
    measure_loss(make_subject(loaded, make_packed(loaded)), [make_passage(loaded, 100)], 64, 0)
    assert loaded.model.config._attn_implementation == before == "sdpa"


def test_progress_counts_tokens(loaded: LanguageModel) -> None:
    seen: list[tuple[str, int, int]] = []
    subject = Subject(loaded, [FullPrecision()], lambda *step: seen.append(step))
    measure_loss(subject, [make_passage(loaded, 100, seed) for seed in (0, 1)], 64, 0)
    assert seen == [("ppl", 64, 128), ("ppl", 128, 128)]


@pytest.mark.parametrize(
    ("scored", "skip", "message"),
    [(64, 40, "has 100 tokens; 64 .* need 104"), (63, 0, "too few to give a standard error")],
)
def test_texts_that_are_too_short(
    loaded: LanguageModel, scored: int, skip: int, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure_loss(make_subject(loaded), [make_passage(loaded, 100)], scored, skip)


def test_more_than_the_model_was_made_for(loaded: LanguageModel) -> None:
    with pytest.raises(EvaluationError, match="tiny llama was made for 4096"):
        measure_loss(make_subject(loaded), [make_passage(loaded, 5000)], 4100, 0)


def test_a_loss_that_is_nan() -> None:
    loaded = make_loaded()
    subject = make_subject(loaded, BrokenMethod(name="broken"))
    with pytest.raises(EvaluationError, match="broken on text 0: the loss is NaN"):
        measure_loss(subject, [make_passage(loaded, 100)], 64, 0)


DEPTHS = (0.0, 0.5, 1.0)


def _stacks(loaded: LanguageModel, seed: int = 0) -> list[needles.Haystack]:
    passage = make_passage(loaded, 1200)
    return build_haystacks(make_subject(loaded), passage, (300, 600), DEPTHS, 2, seed)


def test_planted_numbers_are_where_they_are_looked_for(loaded: LanguageModel) -> None:
    for stack, length in zip(_stacks(loaded), (300, 300, 600, 600), strict=True):
        text = "".join(loaded.tokenizer.convert_ids_to_tokens(stack.ids[0].tolist()))
        planted = list(re.finditer(r"\n\nThe number of (\w+) is (\d{5})\.\n\n", text))
        asked = dict(re.findall(r"\n\nThe number of (\w+) is (\d{5})(?!\.)", text))
        assert len(planted) == len(DEPTHS) == len(asked)
        for depth, (share, match) in enumerate(zip(DEPTHS, planted, strict=True)):
            assert asked[match[1]] == match[2]
            hay = length - sum(len(m[0]) for m in planted)
            place = match.start() - sum(len(m[0]) for m in planted[:depth])
            assert abs(place - share * hay) <= 48
            assert place in (0, hay) or text[match.start() - 1] in ".\n"
            (answer,) = (a for a in stack.answers if a.depth == depth)
            assert "".join(text[p] for p in answer.positions) == match[2]
            assert answer.digits == (1,) * 5
        assert text.index("\n\nThe number", planted[-1].end()) == length


def test_haystacks_differ_and_depend_on_the_seed(loaded: LanguageModel) -> None:
    first, again, other = (_stacks(loaded, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=False))
    assert not torch.equal(first[0].ids, first[1].ids)


def test_a_first_token_comes_once(loaded: LanguageModel) -> None:
    """Tokenizers that begin every text with a special token."""
    passage = make_passage(loaded, 1200)
    begun = Passage("begun", torch.cat([torch.tensor([[1]]), passage.ids], 1))
    for stack in build_haystacks(make_subject(loaded), begun, (300,), DEPTHS, 2, 0):
        assert (stack.ids[0] == 1).nonzero().tolist() == [[0]]


def test_digits_are_counted(loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that knows nothing of depth 0, all of depth 1, and one digit less of depth 0.5."""
    stacks = iter(_stacks(loaded))

    def scored(subject: Subject, measure: str, method: object, text: Passage, skip: int, _: object):
        stack = next(stacks)
        assert torch.equal(text.ids, stack.ids) and skip == 1
        hits = torch.zeros(stack.ids.shape[1] - 1, dtype=torch.bool)
        for answer in stack.answers:
            known = answer.positions[: (0, 4, 5)[answer.depth]]
            hits[[position - 1 for position in known]] = True
        return Score(torch.zeros(len(hits)), hits, 0.0)

    monkeypatch.setattr(needles, "score_method", scored)
    subject = make_subject(loaded)
    found = measure_needles(subject, make_passage(loaded, 1200), (300, 600), DEPTHS, 2, 0)
    assert found.digits == ((10, 10, 10),) * 2 and found.numbers == ((2, 2, 2),) * 2
    (method,) = found.methods
    assert method.digits == ((0, 8, 10),) * 2 and method.numbers == ((0, 0, 2),) * 2
    assert method.total == 36 and found.total == 60


def test_hits_are_those_of_the_model(loaded: LanguageModel) -> None:
    passage = make_passage(loaded, 1200)
    found = measure_needles(make_subject(loaded), passage, (300, 600), DEPTHS, 2, 0)
    right = 0
    for stack in _stacks(loaded):
        with torch.inference_mode():
            guesses = loaded.model(stack.ids).logits[0].argmax(-1)
        where = torch.tensor([p for answer in stack.answers for p in answer.positions])
        right += int((guesses[where - 1] == stack.ids[0, where]).sum())
    assert found.methods[0].total == right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((300,), DEPTHS, 5, 0), "5 haystacks of 300 need 1500"),
        (((300, 300), DEPTHS, 1, 0), "give each length once"),
        (((300,), (0.5, 1.5), 1, 0), "from 0"),
        (((150,), DEPTHS, 1, 0), "fill more than half"),
        (((300,), DEPTHS, 0, 0), "give 1 or more"),
    ],
)
def test_grids_that_cannot_be(
    loaded: LanguageModel, arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        build_haystacks(make_subject(loaded), make_passage(loaded, 1200), *arguments)


def test_a_tokenizer_without_digits(loaded: LanguageModel) -> None:
    class Deaf:
        all_special_ids = (0,)

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [5] * len(text)}

        def decode(self, ids: list[int]) -> str:
            return "x"

    deaf = replace(loaded, tokenizer=Deaf())
    with pytest.raises(EvaluationError, match="digits cannot be counted"):
        build_haystacks(make_subject(deaf), make_passage(loaded, 1200), (300,), DEPTHS, 1, 0)
