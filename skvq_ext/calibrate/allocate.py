"""Spending a budget of bits: which head gets which formats, so that the sum of errors is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from skvq_ext.calibrate.texts import CalibrationError


@dataclass(frozen=True)
class Choice:
    """One way to store one head: formats of K and of V, average bits per value, and the error."""

    k: str
    v: str
    bits: float
    error: float


def allocate(units: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice per unit, within the budget on average.

    Walks each unit's lower convex hull of error over bits, always taking the step that saves most
    error per bit (the optimum of the continuous relaxation), then fills what is left with the single
    changes that still fit.
    Args: units, choices of each head; budget, average bits over units. Raises: CalibrationError
    where even the cheapest choices need more.
    """
    hulls = [_hull(choices) for choices in units]
    taken = [0] * len(hulls)
    least = sum(hull[0].bits for hull in hulls)
    check_budget(least / len(hulls), budget)
    left = budget * len(hulls) - least + 1e-9
    steps = [
        (_gain(a, b), unit, rank)
        for unit, hull in enumerate(hulls)
        for rank, (a, b) in enumerate(pairwise(hull))
    ]
    for _, unit, rank in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = hulls[unit][rank + 1].bits - hulls[unit][rank].bits
        if taken[unit] == rank and cost <= left:
            taken[unit], left = rank + 1, left - cost
    return _fill(units, [hull[rank] for hull, rank in zip(hulls, taken, strict=True)], left)


def check_budget(least: float, budget: float) -> None:
    """Raises CalibrationError where the narrowest formats take more than the budget."""
    if least > budget + 1e-9:
        raise CalibrationError(
            f"a budget of {budget:g} bits per value cannot be kept: the narrowest formats take "
            f"{least:.3f}, scales and zeros included. Allow more bits or use wider groups (ghead)."
        )


def _fill(units: Sequence[Sequence[Choice]], chosen: list[Choice], left: float) -> list[Choice]:
    while True:
        changes = [
            (now.error - other.error, unit, other)
            for unit, now in enumerate(chosen)
            for other in units[unit]
            if other.error < now.error and other.bits - now.bits <= left
        ]
        if not changes:
            return chosen
        _, unit, other = max(changes, key=lambda change: (change[0], -change[1]))
        left -= other.bits - chosen[unit].bits
        chosen[unit] = other


def _gain(a: Choice, b: Choice) -> float:
    return (a.error - b.error) / (b.bits - a.bits)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Choices no mixture of others beats, by growing bits."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull
