"""Needles: five-digit numbers planted in a text, and how many of their digits come back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skvq_ext.evaluate.loss import score_method
from skvq_ext.evaluate.result import MethodNeedles, NeedlesResult
from skvq_ext.evaluate.subject import READING, EvaluationError, Passage, Subject
from skvq_ext.models import LanguageModel

CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Seoul", "Paris", "Madrid", "Tokyo"),
    *("Vienna", "Dublin", "Athens", "Havana", "Prague", "Berlin", "Warsaw", "Moscow", "Nairobi"),
    *("Bogota", "Manila", "Sydney", "Zurich", "Boston"),
)
DIGITS = 5
LENGTHS, DEPTHS = (512, 1024, 2048, 4096), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_REACH = 48  # tokens a needle moves at most, so that it stands between two sentences


@dataclass(frozen=True)
class Answer:
    """Where the number of one depth is asked for: positions of its tokens, and digits of each."""

    depth: int  # index
    positions: tuple[int, ...]
    digits: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """Text with planted numbers and, behind it, the questions with their answers."""

    length: int  # index
    ids: torch.Tensor  # int64 [1, n]
    answers: tuple[Answer, ...]


def measure_needles(
    subject: Subject,
    passage: Passage,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    haystacks: int = 2,
    seed: int = 0,
) -> NeedlesResult:
    """Digits that come back right, by length and depth.

    Args: passage the haystacks are cut from; lengths, tokens of a haystack without the questions;
    depths, 0 = its beginning, 1 = its end; haystacks per length.
    Raises: EvaluationError where the passage, a length or the tokenizer does not do.
    """
    stacks = build_haystacks(subject, passage, lengths, depths, haystacks, seed)
    asked = _count(stacks, None, len(lengths), len(depths))
    texts = [Passage(f"haystack {i + 1}", stack.ids) for i, stack in enumerate(stacks)]
    total = len(subject.methods) * sum(text.ids.shape[1] - 1 for text in texts)
    count = subject.counter("needles", total)
    methods = []
    for method in subject.methods:
        hits = [score_method(subject, "needles", method, t, 1, count).hits for t in texts]
        right = _count(stacks, hits, len(lengths), len(depths))
        methods.append(MethodNeedles(method.name, *right))
    protocol = (
        f"{haystacks} haystacks per length, cut from {passage.name}. Each hides one sentence "
        "'The number of <city> is <five digits>.' per depth, between two sentences; behind it all "
        "cities are asked for in random order. A digit counts when it is the likeliest token after "
        f"what comes before it. {READING} Digits at depth 1 may still lie in the window."
    )
    return NeedlesResult(protocol, tuple(lengths), tuple(depths), *asked, tuple(methods))


def build_haystacks(
    subject: Subject,
    passage: Passage,
    lengths: Sequence[int],
    depths: Sequence[float],
    haystacks: int,
    seed: int,
) -> list[Haystack]:
    """The haystacks of all lengths; those of one length begin at different places of the passage.

    Args: as `measure_needles`. Raises: EvaluationError.
    """
    _check_grid(lengths, depths, haystacks)
    needed = haystacks * max(lengths)
    if passage.ids.shape[1] < needed:
        raise EvaluationError(
            f"{passage.name} has {passage.ids.shape[1]} tokens; {haystacks} haystacks of "
            f"{max(lengths)} need {needed}. Ask for fewer or shorter ones, or give a longer text."
        )
    planter = _Planter(subject.loaded, passage, tuple(depths), seed)
    made = [
        planter.haystack(index, length, number)
        for index, length in enumerate(lengths)
        for number in range(haystacks)
    ]
    subject.check_room(max(stack.ids.shape[1] for stack in made), "the longest haystack")
    return made


def _check_grid(lengths: Sequence[int], depths: Sequence[float], haystacks: int) -> None:
    if not lengths or len(set(lengths)) < len(lengths):
        raise EvaluationError(f"haystacks of lengths {list(lengths)}: give each length once.")
    if not 1 <= len(depths) <= len(CITIES) or not all(0 <= depth <= 1 for depth in depths):
        raise EvaluationError(
            f"needles at depths {list(depths)}: give 1 to {len(CITIES)} of them, from 0 (the "
            "beginning) to 1 (the end)."
        )
    if haystacks < 1:
        raise EvaluationError(f"{haystacks} haystacks were asked for; give 1 or more.")


@dataclass(frozen=True)
class _Planter:
    """Makes haystacks of one passage."""

    loaded: LanguageModel
    passage: Passage
    depths: tuple[float, ...]
    seed: int

    def haystack(self, index: int, length: int, number: int) -> Haystack:
        """The haystack `number` of lengths[index] = length."""
        dice = random.Random(f"{self.seed} {length} {number}")
        cities = dice.sample(CITIES, len(self.depths))
        answers = [f"{dice.randrange(10**DIGITS):0{DIGITS}d}" for _ in self.depths]
        pairs = list(zip(cities, answers, strict=True))
        needles = [self._encode(f"\n\nThe number of {city} is {it}.\n\n") for city, it in pairs]
        ids = self._begin() + self._planted(self._hay(length, number, needles), needles)
        asked = []
        for depth in dice.sample(range(len(pairs)), len(pairs)):
            ids += self._encode(f"\n\nThe number of {cities[depth]} is")
            answer = self._encode(f" {answers[depth]}")
            asked.append(self._answer(depth, len(ids), answer))
            ids += answer
        return Haystack(index, torch.tensor([ids], device=self.passage.ids.device), tuple(asked))

    def _encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without what a tokenizer puts around a whole one."""
        tokenizer = self.loaded.tokenizer
        ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        return ids

    def _begin(self) -> list[int]:
        """The token that this tokenizer begins every text with, or none."""
        first: list[int] = self.passage.ids[0, :1].tolist()
        return first if first[0] in self.loaded.tokenizer.all_special_ids else []

    def _hay(self, length: int, number: int, needles: list[list[int]]) -> list[int]:
        """So much text that with the needles it takes `length` tokens."""
        begin = len(self._begin())
        plain = length - begin - sum(map(len, needles))
        if plain < length / 2:
            raise EvaluationError(
                f"a haystack of {length} tokens cannot hide {len(needles)} numbers: they would "
                "fill more than half of it. Ask for longer haystacks."
            )
        start = begin + number * length
        hay: list[int] = self.passage.ids[0, start : start + plain].tolist()
        return hay

    def _planted(self, hay: list[int], needles: list[list[int]]) -> list[int]:
        """The hay with each needle at the end of a sentence that is nearest to its depth."""
        ends = [0, len(hay)]
        ends += [i + 1 for i, token in enumerate(hay) if _ends_sentence(self._piece(token))]
        planted: list[int] = []
        read = 0
        for depth, needle in sorted(zip(self.depths, needles, strict=True)):
            target = round(depth * len(hay))
            nearest = min((abs(end - target), end) for end in ends)[1]
            place = nearest if abs(nearest - target) <= _REACH else target
            planted += hay[read:place] + needle
            read = place
        return planted + hay[read:]

    def _piece(self, token: int) -> str:
        return str(self.loaded.tokenizer.decode([token]))

    def _answer(self, depth: int, first: int, answer: list[int]) -> Answer:
        pieces = [self._piece(token).strip() for token in answer]
        found = [(first + i, len(piece)) for i, piece in enumerate(pieces) if piece.isdecimal()]
        if sum(count for _, count in found) != DIGITS:
            raise EvaluationError(
                f"the tokenizer of {self.loaded.name} cuts a five-digit number into {pieces}: its "
                "digits cannot be counted. Leave 'needles' out."
            )
        return Answer(depth, *zip(*found, strict=True))


def _ends_sentence(piece: str) -> bool:
    return piece.rstrip().endswith((".", "!", "?")) or "\n" in piece


def _count(
    stacks: list[Haystack], hits: list[torch.Tensor] | None, lengths: int, depths: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Digits and whole numbers by length and depth: those that hit, or None = all."""
    digits = [[0] * depths for _ in range(lengths)]
    numbers = [[0] * depths for _ in range(lengths)]
    for i, stack in enumerate(stacks):
        for answer in stack.answers:
            # Scored behind one token of context: the token at position p is hits[p - 1].
            right = [hits is None or bool(hits[i][p - 1]) for p in answer.positions]
            found = sum(n for n, hit in zip(answer.digits, right, strict=True) if hit)
            digits[stack.length][answer.depth] += found
            numbers[stack.length][answer.depth] += all(right)
    return tuple(map(tuple, digits)), tuple(map(tuple, numbers))
