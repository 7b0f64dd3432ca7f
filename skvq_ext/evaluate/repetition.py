"""How much a text repeats itself: what a model does when its memory of the text gets blurred."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skvq_ext.evaluate.result import Repetition


def repetition(ids: Sequence[int]) -> Repetition:
    """Repetition of a text of 4 tokens or more.

    Distinct-n is that of Li et al. 2016 (a diversity-promoting objective), the share of 4-grams
    that occurred before is 1 - distinct-4 (Welleck et al. 2019, seq-rep-4).
    """
    return Repetition(
        repeated_4grams=1 - _distinct(ids, 4),
        distinct_1=_distinct(ids, 1),
        distinct_2=_distinct(ids, 2),
        longest_loop=longest_loop(ids),
    )


def _distinct(ids: Sequence[int], n: int) -> float:
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)


def longest_loop(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that is one phrase said twice or more, 0 = there is none.

    A phrase of p tokens loops where each token equals the one p before it, for p tokens at least.
    """
    text = torch.tensor(ids)
    longest = 0
    for period in range(1, len(text) // 2 + 1):
        run = _longest_run(text[period:] == text[:-period])
        if run >= period:
            longest = max(longest, run + period)
    return longest


def _longest_run(holds: Tensor) -> int:
    """Most neighbouring True values."""
    breaks = (~holds).nonzero()[:, 0]
    edges = torch.cat([breaks.new_tensor([-1]), breaks, breaks.new_tensor([len(holds)])])
    return int(edges.diff().max()) - 1
