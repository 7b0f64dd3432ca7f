"""From what is written on the command line to methods.

"k2-v1.5", the packed cache with its default plan; "k2-v1.5@plan.safetensors" and "@plan.safetensors",
with a plan; "published:k2-v2-g64-...", SKVQ as published; "kivi:k2-v2-g32", a simulated baseline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skvq_ext.evaluate.method import FullPrecision, Method, Packed
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.geometry import Geometry
from skvq_ext.models import LanguageModel
from skvq_ext.plan import Plan
from skvq_ext.report import Step, no_steps
from skvq_ext.scheme import Scheme

PUBLISHED = "published"


@dataclass(frozen=True)
class Built:
    """A method and the spec it was made from, "" for full precision."""

    spec: str
    method: Method


@dataclass(frozen=True)
class Builder:
    """Makes methods for one model.

    calibration: int64 [1, n], text for methods that are fitted, None = there is none. simulate:
    whether methods that pack nothing are welcome. exact: see `SkvqHFCache`; step: see
    `skvq_ext.report`.
    """

    loaded: LanguageModel
    calibration: Tensor | None = None
    simulate: bool = False
    seed: int = 0
    exact: bool = False
    step: Step = no_steps

    def build(self, specs: Sequence[str]) -> list[Built]:
        """Full precision and the methods of these specs, in order. Raises: ValueError."""
        bits = float(torch.finfo(self.loaded.model.dtype).bits)
        built = [Built("", FullPrecision(bits))]
        for spec in specs:
            method = self._method(spec)
            self._check(spec, method, [b.method.name for b in built])
            built.append(Built(spec, method))
        return built

    def _check(self, spec: str, method: Method, names: list[str]) -> None:
        if not method.packed and not self.simulate:
            raise EvaluationError(
                f"{spec!r} packs nothing: it is simulated with dense rows that hold rounded values. "
                "Pass --simulate to have it in the tables, marked as such."
            )
        if method.name in names:
            raise EvaluationError(f"{method.name!r} was asked for twice; name each method once.")

    def _method(self, spec: str) -> Method:
        kind, rest = split(spec)
        if kind == PUBLISHED:
            return self._published(rest)
        if kind:
            from skvq_ext.baselines.registry import build

            return build(spec, self.loaded.model, self.calibration, self.seed)
        return self._packed(rest)

    def _published(self, scheme: str) -> Method:
        from skvq_ext.published import Published

        if self.calibration is None:
            raise EvaluationError(
                "SKVQ as published is fitted to a model: give a text for that, which is not "
                "measured on, by --calibration-text."
            )
        return Published.fit(
            self.loaded.model, self.calibration, scheme, seed=self.seed, step=self.step
        )

    def _packed(self, text: str) -> Method:
        written, at, path = text.partition("@")
        geometry = Geometry.from_config(self.loaded.model.config)
        if not at:
            return Packed(geometry, Scheme.parse(written), exact=self.exact)
        if not Path(path).is_file():
            raise EvaluationError(
                f"{text!r}: there is no plan {path!r}; make one, 'skvq calibrate'."
            )
        scheme = Scheme.parse(written) if written else None
        plan = Plan.load(path, geometry, scheme, self.loaded.tokenizer_fingerprint)
        name = f"{scheme or plan.scheme}, plan {Path(path).stem}"
        return Packed(geometry, scheme or plan.scheme, plan, name, self.exact)


def split(spec: str) -> tuple[str, str]:
    """Kind and rest of a spec: ("kivi", "k2-v2"), ("", "k3:1/2+2-v1.5@plan")."""
    match = re.fullmatch(r"\s*([A-Za-z_-]+):(.*)", spec)
    return (match[1].lower(), match[2]) if match else ("", spec.strip())
