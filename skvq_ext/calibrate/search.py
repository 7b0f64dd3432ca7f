"""The search of one layer: for every head and format the transform and clip of least error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skvq_ext.calibrate.objective import Error, HeadErrors, Softmax
from skvq_ext.calibrate.quantizer import HeadQuantizer
from skvq_ext.calibrate.transforms import LEARNED, HeadRows, Make, candidates
from skvq_ext.plan import DEFAULT_EXPONENTS, TensorPlan, TensorShape
from skvq_ext.scheme import Scheme

FACTORS = (1.0, 0.85, 1.2, 1.45)  # of the clip ratio of least squared error, tried on the outputs
SPREAD = (1.0, 0.8, 1.25)  # of the ratio, between which every token may choose when it is packed
FINALISTS = 2  # transforms that are tried in every format
_ALWAYS = ("identity", "hadamard")  # what no calibration needs is never out of the race


@dataclass(frozen=True)
class Option:
    """One head's K or V in one format: what was found for it and what it costs."""

    name: str  # of the transform
    tensor: TensorPlan  # of this head
    error: Error


@dataclass(frozen=True)
class LayerRows:
    """Calibration data of one layer.

    q f32 [B, Hq, n, D], sampled queries; k, v f32 [B, H, T, D]; positions int64 [n] of the queries.
    fisher f64 [Hq, D, D]. lessons, keys and values f32 [m, H, T, D] of other text, that transforms
    are made from; without any they are made from k and v, and none is learned.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    how: Softmax
    fisher: Tensor
    lessons: tuple[Tensor, Tensor] | None = None


Shapes = dict[str, dict[str, TensorShape]]  # side ("k", "v") -> format -> shape


def search_head(
    layer: LayerRows, head: int, shapes: Shapes, scheme: Scheme, seed: int
) -> dict[str, dict[str, Option]]:
    """The best option of one KV head for every format of K and of V.

    Args: shapes, formats to fill in, the first of a side being the one transforms are compared in;
    scheme, whose transform and clip may fix what is otherwise searched. Returns: side -> format ->
    option.
    """
    group = layer.q.shape[1] // layer.k.shape[1]
    mine = slice(head * group, (head + 1) * group)
    sinks = layer.how.sink_logits
    errors = HeadErrors(
        (layer.q[:, mine], layer.k[:, head], layer.v[:, head]),
        layer.positions,
        Softmax(
            layer.how.scale,
            layer.how.softcap,
            layer.how.sliding_window,
            None if sinks is None else sinks[mine],
        ),
        layer.fisher[mine],
        window=scheme.window,
        sinks=scheme.sinks,
    )
    energies = {
        "k": layer.q[:, mine].double().square().mean((0, 1, 2)),
        "v": layer.fisher[mine].diagonal(dim1=-2, dim2=-1).sum(0),
    }
    found = {}
    for index, side in enumerate(("k", "v")):
        whole = errors.k if side == "k" else errors.v
        lessons = whole if layer.lessons is None else layer.lessons[index][:, head]
        rows = lessons[:, scheme.sinks :].flatten(0, 1)
        measure = errors.of_keys if side == "k" else errors.of_values
        makes = candidates(scheme.transform)
        if layer.lessons is None:  # a rotation seems good on the rows it was learned from
            makes = {name: make for name, make in makes.items() if name not in LEARNED}
        judge = _Judge(makes, (rows, energies[side]), whole, measure, scheme, side, seed)
        found[side] = judge.options(shapes[side])
    return found


class _Judge:
    """Compares transforms and clip ratios for one side of one head."""

    def __init__(
        self,
        makes: dict[str, Make],
        lessons: tuple[Tensor, Tensor],
        whole: Tensor,
        measure: Callable[[Tensor], Error],
        scheme: Scheme,
        side: str,
        seed: int,
    ) -> None:
        """Args: makes, the transforms by name; lessons, rows f32 [n, D] and energy f64 [D] they are made
        from; whole, rows f32 [B, T, D] to quantize; measure, of what is read instead of them."""
        self._open, self._lessons, self._whole = makes, lessons, whole
        self._measure, self._scheme, self._side, self._seed = measure, scheme, side, seed
        self._made: dict[tuple[Any, ...], TensorPlan] = {}
        self._fitted: dict[tuple[str, TensorShape], HeadQuantizer] = {}

    def options(self, shapes: dict[str, TensorShape]) -> dict[str, Option]:
        """The best option per format; transforms are ranked in the first one."""
        names = list(self._open)
        first = next(iter(shapes.values()))
        plain = [name for name in names if name not in LEARNED]
        ranked = self._rank(plain, first)
        # Learning takes longest: it goes on from what is good already.
        learned = [name for name, start in LEARNED.items() if name in names and start in ranked[:3]]
        finalists = self._rank([*ranked[:FINALISTS], *learned], first)[:FINALISTS]
        found = {}
        for code, shape in shapes.items():
            tried = [self._best_clip(name, shape) for name in finalists]
            always = [name for name in _ALWAYS if name in names and name not in finalists]
            found[code] = _choose(tried + [self._plain(name, shape) for name in always])
        return found

    def _rank(self, names: Sequence[str], shape: TensorShape) -> list[str]:
        """Names by the error each makes with the clip of least squared error."""
        tried = {name: self._option(name, self._fit(name, shape)).error.fit for name in names}
        return sorted(names, key=tried.__getitem__)

    def _best_clip(self, name: str, shape: TensorShape) -> Option:
        if self._scheme.clip is not None:
            return self._plain(name, shape)
        start = self._fit(name, shape)
        tries = {factor: start.scaled(factor) for factor in FACTORS}
        options = {factor: self._option(name, one) for factor, one in tries.items()}
        best = min(options, key=lambda factor: options[factor].error.fit)
        spread = self._option(name, tries[best].spread(SPREAD))
        return _choose([*options.values(), spread, self._plain(name, shape)])

    def _plain(self, name: str, shape: TensorShape) -> Option:
        """Without any clip, unless the scheme names one."""
        start = self._fit(name, shape)
        if self._scheme.clip is not None:
            return self._option(name, start)
        ones = torch.ones_like(start.tensor.clip)
        return self._option(name, start.with_tables(ones, start.tensor.exponents))

    def _fit(self, name: str, shape: TensorShape) -> HeadQuantizer:
        """With the clip of least squared error, or the one the scheme names."""
        key = name, shape
        if key not in self._fitted:
            start = HeadQuantizer(self._make(name, shape), shape, self._scheme.meta)
            start = start.fitted(self._lessons[0])
            if self._scheme.clip is not None:
                clip = torch.full_like(start.tensor.clip, self._scheme.clip)
                start = start.with_tables(clip, start.tensor.exponents)
            self._fitted[key] = start
        return self._fitted[key]

    def _make(self, name: str, shape: TensorShape) -> TensorPlan:
        """The transform, made once for all formats of the same groups: levels matter little to it."""
        key = name, shape.groups, shape.band_edges
        if key not in self._made:
            neutral = TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS[self._side])
            head = HeadRows(*self._lessons, shape, neutral, self._seed)
            self._made[key] = self._open[name](head)
        return self._made[key]

    def _option(self, name: str, quantizer: HeadQuantizer) -> Option:
        return Option(name, quantizer.tensor, self._error(quantizer))

    def _error(self, quantizer: HeadQuantizer) -> Error:
        back = quantizer.read_back(self._whole.flatten(0, 1)).view_as(self._whole)
        return self._measure(back)


def _choose(options: Sequence[Option]) -> Option:
    """The least error on the queries choices are made on, unless the others disagree.

    The winner must not lose to doing nothing, nor to the default, on the queries that were held out.
    """
    best = min(options, key=lambda option: option.error.fit)
    rivals = [o for o in options if o.name in _ALWAYS and o.error.held < best.error.held]
    return min([best, *rivals], key=lambda o: o.error.fit * 3 + o.error.held)
