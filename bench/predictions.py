"""What docs/gpu.md predicts, beside what a run found.

The table behind the mark `<!-- predictions` has the columns: step, name, figure, GPU, predicted, because.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARK = "<!-- predictions"
COLUMNS = ("step", "name", "figure", "gpu", "predicted", "because")


@dataclass(frozen=True)
class Prediction:
    """`figure` of the entry `name` in the results of a step. gpu: a word of the device's name, or "any"."""

    step: str
    name: str
    figure: str
    gpu: str
    predicted: str
    because: str

    def holds(self, value: float) -> bool:
        """Whether a value is what was predicted: "= 0", ">= 85", "<= 9" or "75 to 80"."""
        between = re.fullmatch(r"([\d.]+) to ([\d.]+)", self.predicted)
        if between:
            return float(between[1]) <= value <= float(between[2])
        bound = re.fullmatch(r"(=|>=|<=) ([\d.]+)", self.predicted)
        if bound is None:
            raise ValueError(
                f"prediction {self.predicted!r} of {self.name!r}: expected = N, >= N, <= N or N to M"
            )
        limit = float(bound[2])
        return {"=": value == limit, ">=": value >= limit, "<=": value <= limit}[bound[1]]


def read_predictions(page: Path) -> list[Prediction]:
    """The table of a page. Raises: ValueError where it has other columns."""
    section = page.read_text(encoding="utf-8").split(MARK)[1].split("\n\n")[1]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
    ]
    if tuple(cell.lower() for cell in rows[0]) != COLUMNS:
        raise ValueError(
            f"the table of predictions has columns {rows[0]}, expected {list(COLUMNS)}"
        )
    return [Prediction(*row) for row in rows[2:]]


def find_figure(stages: Sequence[dict[str, Any]], prediction: Prediction) -> float | None:
    """The predicted figure in the stages of a report, or None where nothing was measured."""
    for stage in stages:
        if stage["step"] != prediction.step:
            continue
        figures = stage["figures"]
        for entry in [*figures.get("results", []), *figures.get("findings", [])]:
            value = {**entry, **entry.get("figures", {})}.get(prediction.figure)
            if entry.get("name") == prediction.name and isinstance(value, int | float):
                return float(value)
    return None


def compare(
    predictions: Sequence[Prediction], stages: Sequence[dict[str, Any]], gpu: str
) -> list[dict[str, Any]]:
    """Each prediction that is meant for this GPU with its outcome."""
    rows = []
    for p in predictions:
        if p.gpu != "any" and p.gpu.lower() not in gpu.lower():
            continue
        value = find_figure(stages, p)
        verdict = (
            "not measured" if value is None else "holds" if p.holds(value) else "does not hold"
        )
        rows.append({**asdict(p), "outcome": value, "verdict": verdict})
    return rows
