"""Retrieval from packed history: five-digit numbers planted in a text, digits that come back right.

    python bench/retrieval.py --scheme k2-v1.5 --scheme k3:1/2+2-v1.5

A text of about 2000 tokens hides sentences such as "The number of Lisbon is 40275."; behind it every
city's number is asked for. A digit counts when it is the likeliest token after what comes before it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer

from skvq_ext import report
from skvq_ext.models import DEMO_MODEL, LanguageModel, load_model
from skvq_ext.perplexity import Score, score_full, score_packed
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

TEXT = Path(__file__).resolve().parent.parent / "demo" / "texts" / "persuasion.txt"
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Seoul", "Paris")
FIRST_PARAGRAPH = 40  # of the text; each haystack starts behind the last


def haystack(
    loaded: LanguageModel, paragraphs: list[str], seed: int
) -> tuple[torch.Tensor, list[int]]:
    """Token ids [1, n] of paragraphs with planted numbers and the questions behind them.

    Returns: ids and the positions of the digits of the answers.
    """
    dice = random.Random(seed)
    numbers = {city: f"{dice.randrange(10**5):05d}" for city in dice.sample(CITIES, len(CITIES))}
    lines = list(paragraphs)
    for city, number in numbers.items():
        lines.insert(dice.randrange(len(lines) - 1), f"The number of {city} is {number}.")
    ids = loaded.encode("\n\n".join(lines))[0].tolist()
    digits = []
    for city in dice.sample(CITIES, len(CITIES)):
        ids += loaded.encode(f"\n\nThe number of {city} is")[0].tolist()
        answer = loaded.encode(f" {numbers[city]}")[0].tolist()
        digits += [
            len(ids) + i for i, t in enumerate(answer) if loaded.tokenizer.decode([t]).isdigit()
        ]
        ids += answer
    return torch.tensor([ids]), digits


def main(
    scheme: Annotated[list[str], typer.Option(help="May be repeated.")],
    plan: Annotated[list[Path] | None, typer.Option(help="One per scheme, in order.")] = None,
    model: Annotated[str, typer.Option(help="As of the skvq command.")] = DEMO_MODEL,
    haystacks: Annotated[int, typer.Option(min=1, help="Texts, each with eight numbers.")] = 4,
    paragraphs: Annotated[int, typer.Option(min=2, help="Paragraphs of each text.")] = 20,
) -> None:
    """Prints how many digits of the planted numbers each cache returns."""
    loaded = load_model(model)
    text = TEXT.read_text(encoding="utf-8").split("\n\n")
    starts = [FIRST_PARAGRAPH + i * paragraphs for i in range(haystacks)]
    asked = [haystack(loaded, text[s : s + paragraphs], seed) for seed, s in enumerate(starts)]

    def right(scores: list[Score], skip: int) -> int:
        pairs = zip(scores, asked, strict=True)
        return sum(int(s.hits[[p - skip for p in digits]].sum()) for s, (_, digits) in pairs)

    total = sum(len(digits) for _, digits in asked)
    rows = []
    with report.steps() as step:
        full = [score_full(loaded.model, ids, 1, step) for ids, _ in asked]
        rows.append(("full precision", "", right(full, 1)))
        for index, one in enumerate(scheme):
            parsed = Scheme.parse(one)
            made = Plan.load(plan[index], scheme=parsed) if plan else None
            packed = [
                score_packed(loaded.model, ids, parsed, made, 1, step, f"{one}, text {i + 1}")
                for i, (ids, _) in enumerate(asked)
            ]
            rows.append((one, plan[index] if plan else "", right(packed, 1)))
    lengths = ", ".join(str(ids.shape[1]) for ids, _ in asked)
    report.table(
        f"Digits that came back, of {total}; texts of {lengths} tokens",
        ("cache", "plan", "digits"),
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
