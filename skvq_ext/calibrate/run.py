"""Calibration from end to end: read, weigh, search layer by layer, spend the bits, write the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skvq_ext.calibrate.allocate import Choice, allocate, check_budget
from skvq_ext.calibrate.formats import layer_of_heads, open_pairs, shapes_of, split_layer
from skvq_ext.calibrate.objective import Softmax
from skvq_ext.calibrate.resume import Progress, fingerprint
from skvq_ext.calibrate.search import LayerRows, Option, search_head
from skvq_ext.calibrate.sensitivity import fisher
from skvq_ext.calibrate.texts import check_texts, make_segments
from skvq_ext.geometry import Geometry
from skvq_ext.observe import Watcher, check_finite, frozen, layer_of, observing
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

# Called with (what is being done, units done, units in all).
Step = Callable[[str, int, int], None]

QUERIES = 96  # of each segment that errors are measured at
LEAST = 64  # tokens behind sinks and window; fewer say nothing about a channel

Head = dict[str, dict[str, Option]]  # side -> format -> option


@torch.inference_mode(False)
def calibrate(
    model: Any,
    token_ids: Tensor | Sequence[Tensor],
    scheme: Scheme,
    *,
    max_tokens: int = 4096,
    seed: int = 0,
    progress: bool | Step = True,
    formats: Sequence[tuple[str, str]] | None = None,
    tokenizer: str = "",
    resume: Path | None = None,
) -> Plan:
    """Searches a plan for a transformers decoder: transforms, clip, and under a budget the formats.

    Two readings of the calibration segments (`texts.make_segments`): one with gradients, for what
    an error in each head costs; one in which each layer is searched while it computes, so that no
    more than one layer's keys are in memory.

    Args: model; token_ids, one text int64 [n] or [1, n] or several; scheme, whose transform and
    clip, where given, are kept, and whose budget 'bits' lets heads have formats of their own;
    max_tokens that errors are measured on; seed of everything drawn; progress, True for a bar on
    the terminal or a function called with (name, done, total); formats, pairs (k, v) heads may get
    under a budget, None = all; tokenizer, fingerprint the plan will be checked against; resume, a
    directory where finished layers are kept, and found again, until `resume.forget`.
    Returns: the plan; equal arguments give equal plans.
    Raises: CalibrationError, ObservationError, GeometryError, SchemeError.
    """
    geometry = Geometry.from_config(model.config)
    least = scheme.sinks + scheme.window + LEAST
    texts = check_texts(token_ids, least, geometry.vocab_size)
    segments = make_segments(texts, max_tokens, seed, least)
    pairs = open_pairs(scheme, geometry.head_dim, formats)
    bits = {pair: _bits(scheme, pair, geometry.head_dim) for pair in pairs}
    if scheme.bits is not None:
        check_budget(min(bits.values()), scheme.bits)  # not after hours
    origin = f"searched on {segments}, seed {seed}"
    plan = Plan(scheme, geometry, [], origin=origin, tokenizer=tokenizer)
    mark = fingerprint(model, geometry, scheme, segments.together, pairs, seed)
    with _steps(progress) as step, frozen(model), torch.no_grad():
        kept = Progress(resume, mark)
        weights = kept.fisher(
            lambda: fisher(
                model,
                segments.judged,
                geometry.num_layers,
                seed,
                lambda done, total: step("weighing heads", done, total),
            )
        )
        searched = _Search(plan, weights, pairs, seed, len(segments.judged), kept, step)
        with observing(model, searched):
            read = segments.together.to(model.device)
            model.base_model(input_ids=read, use_cache=False)
    plan.layers.extend(_assemble(searched.found, scheme, bits))
    return plan


class _Search(Watcher):
    """Searches each layer the moment the model computes it."""

    def __init__(
        self,
        plan: Plan,
        weights: list[Tensor],
        pairs: Sequence[tuple[str, str]],
        seed: int,
        judged: int,
        kept: Progress,
        step: Step,
    ) -> None:
        """Args: judged, how many of the segments read errors are measured on, from the first on."""
        self.found: dict[int, list[Head]] = {}
        self._plan, self._weights, self._seed, self._judged = plan, weights, seed, judged
        self._shapes = shapes_of(plan, pairs)
        self._kept, self._step = kept, step

    def attended(
        self, module: Any, rows: tuple[Tensor, Tensor, Tensor], out: Tensor, options: dict[str, Any]
    ) -> None:
        index = layer_of(module, self._plan.geometry.num_layers)
        for name, x in zip(("queries", "keys", "values"), rows, strict=True):
            check_finite(index, name, x)
        heads = self._kept.layer(index, self._shapes)
        if heads is None:
            layer = self._rows(index, rows, options)
            scheme = self._plan.scheme
            heads = [
                search_head(layer, head, self._shapes, scheme, self._seed)
                for head in range(rows[1].shape[1])
            ]
            self._kept.keep(index, heads)
        self.found[index] = heads
        self._step("searching layers", len(self.found), self._plan.geometry.num_layers)

    def _rows(
        self, index: int, rows: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
    ) -> LayerRows:
        q, k, v = (x.detach().float().cpu() for x in rows)
        scheme, tokens = self._plan.scheme, k.shape[2]
        first = scheme.sinks + scheme.window
        dice = torch.Generator().manual_seed(self._seed + index)
        some = torch.randperm(tokens - first, generator=dice)[:QUERIES].sort().values + first
        scale, sinks = options.get("scaling"), options.get("s_aux")
        windows = self._plan.geometry.sliding_windows or ()
        how = Softmax(
            q.shape[-1] ** -0.5 if scale is None else float(scale),
            float(options.get("softcap") or 0.0),
            windows[index],
            None if sinks is None else sinks.detach().float().cpu(),
        )
        n = self._judged
        lessons = (k[n:], v[n:]) if len(k) > n else None
        asked = q[:n, :, some].contiguous()
        return LayerRows(asked, k[:n], v[:n], some, how, self._weights[index], lessons)


def _assemble(
    found: dict[int, list[Head]], scheme: Scheme, bits: dict[tuple[str, str], float]
) -> list[Any]:
    """Layer plans from what was found, formats chosen within the budget where there is one.

    Args: bits per value of each pair of formats.
    """
    heads = [(index, head) for index in sorted(found) for head in found[index]]
    if scheme.bits is None:
        chosen = list(bits) * len(heads)
    else:
        units = [
            [
                Choice(k, v, each, head["k"][k].error.nats + head["v"][v].error.nats)
                for (k, v), each in bits.items()
            ]
            for _, head in heads
        ]
        chosen = [(choice.k, choice.v) for choice in allocate(units, scheme.bits)]
    layers: dict[int, list[Any]] = {}
    for (index, head), (k, v) in zip(heads, chosen, strict=True):
        layers.setdefault(index, []).append((k, v, head["k"][k].tensor, head["v"][v].tensor))
    build = layer_of_heads if scheme.bits is None else split_layer
    return [build(layers[index]) for index in sorted(layers)]


def _bits(scheme: Scheme, pair: tuple[str, str], head_dim: int) -> float:
    one = replace(scheme, k=pair[0], v=pair[1], bits=None)
    return one.record_format(head_dim).bits_per_value


def _steps(progress: bool | Step) -> Any:
    if not isinstance(progress, bool):
        return nullcontext(progress)
    from skvq_ext import report

    return report.steps() if progress else nullcontext(report.no_steps)
