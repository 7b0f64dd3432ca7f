"""Calibration: one pass over a text gives centre, balanced scaling, bands, exponents and clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.door import Door
from skvq_ext.geometry import Geometry
from skvq_ext.plan import DEFAULT_EXPONENTS, LayerPlan, Plan, TensorPlan, TensorShape
from skvq_ext.scheme import TRANSFORMS, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from skvq_ext.observe import LayerStatistics, Moments

# Called with (what is being done, units done, units in all).
Step = Callable[[str, int, int], None]

CHUNK = 1024  # tokens of a forward
MIN_TOKENS = 64  # that can be quantized; fewer say nothing about a channel
SAMPLED_ROWS = 512  # tokens per layer kept for the clip search
CLIPS = tuple(1 - step / 50 for step in range(36))  # 1.00, 0.98 .. 0.30

_HEADROOM = 8.0  # unseen tokens may have scales and zeros this many times the largest seen
_LARGEST = 448.0  # of E4M3; fp16 reaches further
_FLOOR = 1e-8  # of the mean over channels: what is less than this is dead
_BALANCE_LIMIT = 100.0  # of the geometric mean: a dead channel is neither blown up nor lost


class CalibrationError(ValueError):
    """A text or a model that cannot be calibrated on."""


def calibrate(
    model: Any,
    token_ids: Tensor,
    scheme: Scheme,
    *,
    max_tokens: int = 8192,
    seed: int = 0,
    progress: bool | Step = True,
) -> Plan:
    """Makes a plan for a transformers decoder from one pass over a text.

    Args: model; token_ids, int64 [n] or [1, n]; scheme, whose transform says which parts to use
    (None = all); max_tokens of the text to read; seed of the sampled rows; progress, True for a bar
    on the terminal or a function called with (name, done, total).
    Returns: the plan; equal arguments give equal plans.
    Raises: CalibrationError, ObservationError, GeometryError.
    """
    geometry = Geometry.from_config(model.config)
    if scheme.transform is None:
        scheme = replace(scheme, transform=frozenset(TRANSFORMS))
    ids = _check_ids(token_ids, geometry, scheme)[:max_tokens]
    plan = Plan(scheme, geometry, [], origin=f"calibrated on {len(ids)} tokens, seed {seed}")
    with _steps(progress) as step:
        layers = _read(model, ids, plan, seed, step)
        for index, layer in enumerate(layers):
            plan.layers.append(_plan_layer(layer, plan))
            step("choosing clip ratios", index + 1, len(layers))
    return plan


def _check_ids(token_ids: Tensor, geometry: Geometry, scheme: Scheme) -> Tensor:
    ids = token_ids[0] if token_ids.dim() == 2 and token_ids.shape[0] == 1 else token_ids
    if ids.dim() != 1 or ids.is_floating_point():
        raise CalibrationError(
            f"token_ids is {token_ids.dtype} {list(token_ids.shape)}; calibration reads one text "
            "of integer ids [n]."
        )
    least = MIN_TOKENS + scheme.sinks
    if len(ids) < least:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, too few to calibrate on: at least {least} are "
            "needed, and a few thousand are better. Give a longer text."
        )
    size = geometry.vocab_size
    if size is not None and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise CalibrationError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, the model's vocabulary "
            f"has {size}. Use the tokenizer of this model."
        )
    return ids


def _read(model: Any, ids: Tensor, plan: Plan, seed: int, step: Step) -> list[LayerStatistics]:
    """Runs the model over the text. Sinks never get quantized, so they do not count."""
    from skvq_ext.observe import Observer, observing

    sinks = plan.scheme.sinks
    chunks = [chunk for chunk in torch.split(ids, CHUNK) if len(chunk) > sinks]
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(chunk) - sinks for chunk in chunks)
    sampled = torch.randperm(total, generator=generator)[:SAMPLED_ROWS].sort().values
    balance = "balance" in (plan.scheme.transform or ())
    observer = Observer(plan.geometry.num_layers, sinks, output_energy=balance)
    first, training = 0, model.training
    model.eval()
    try:
        with torch.no_grad(), observing(model, observer):
            for done, chunk in enumerate(chunks):
                last = first + len(chunk) - sinks
                observer.sampled = sampled[(sampled >= first) & (sampled < last)] - first
                model.base_model(input_ids=chunk[None].to(model.device), use_cache=False)
                observer.check_complete()
                first = last
                step("reading the text", done + 1, len(chunks))
    finally:
        model.train(training)
    return observer.layers


def _plan_layer(layer: LayerStatistics, plan: Plan) -> LayerPlan:
    queries, output = layer.q.power(), layer.output_energy
    k = _plan_transform("k", layer.k, queries, plan)
    v = _plan_transform("v", layer.v, torch.ones_like(queries) if output is None else output, plan)
    door = Door(LayerPlan(k, v), k.permutation.shape[0])
    meta = plan.scheme.meta
    for tensor, rows, shape in (
        (k, door.map_k(layer.k.sample()), plan.shapes["k"]),
        (v, door.map_v(layer.v.sample()), plan.shapes["v"]),
    ):
        tensor.exponents = _choose_exponents(rows, shape, tensor.exponents)
        if plan.scheme.clip is None:
            tensor.clip = _choose_clip(rows, shape, tensor.exponents, meta)
        else:
            tensor.clip.fill_(plan.scheme.clip)
    return LayerPlan(k, v)


def _plan_transform(name: str, seen: Moments, energy: Tensor, plan: Plan) -> TensorPlan:
    """Everything before quantization. energy, f64 [H, D]: what an error in a channel is worth."""
    shape, transform = plan.shapes[name], plan.scheme.transform or frozenset()
    tensor = TensorPlan.neutral(seen.mean().shape[0], shape, DEFAULT_EXPONENTS[name])
    power, energy = seen.power().cpu(), energy.cpu()
    if "centre" in transform:
        tensor.shift = seen.mean().float().cpu()
        power = (power - seen.mean().cpu().square()).clamp(min=0)
    scale = balanced_scale(power, energy) if "balance" in transform else torch.ones_like(power)
    if len(shape.band_edges) > 2:
        # The first band is the wider one: the channels whose error would weigh most go there.
        order = (power * energy).argsort(stable=True, dim=-1, descending=True)
        tensor.permutation = order.int()
        scale = scale.gather(-1, order)
    tensor.scale = scale.float()
    if "hadamard" in transform:
        tensor.rotation = "hadamard"
    return tensor


def balanced_scale(power: Tensor, energy: Tensor) -> Tensor:
    """The divisor of each channel that makes its power times what it is multiplied with least.

    A channel is stored times s = (energy / power)^(1/4), the other side is divided by s: both then
    have the power sqrt(energy * power), and an evenly spread error does least harm.
    Args: power, energy f64 [H, D]. Returns: f64 [H, D], 1 / s, of geometric mean 1 per head.
    """
    log = (_alive(power).log() - _alive(energy).log()) / 4
    log = log - log.mean(-1, keepdim=True)
    limit = math.log(_BALANCE_LIMIT)
    return log.clamp(-limit, limit).exp()


def _alive(x: Tensor) -> Tensor:
    return torch.maximum(x, _FLOOR * x.mean(-1, keepdim=True)).clamp(min=1e-30)


def _choose_exponents(rows: Tensor, shape: TensorShape, default: Tensor) -> Tensor:
    """Powers of two that put the observed scales and zeros near the top of E4M3's normal range.

    Args: rows f32 [n, H, D] as the cache sees them; default i32 [H, 2] for heads without any range.
    Returns: i32 [H, 2], of scale and zero.
    """
    largest = torch.zeros(2, rows.shape[1])
    for (start, stop), levels in zip(shape.groups, shape.levels, strict=True):
        low, high = rows[..., start:stop].aminmax(dim=-1)
        largest[0] = largest[0].maximum(((high - low) / (levels - 1)).amax(0))
        largest[1] = largest[1].maximum(low.abs().maximum(high.abs()).amax(0))
    chosen = (largest * (_HEADROOM / _LARGEST)).log2().ceil()
    return torch.where(largest.T > 0, chosen.T, default).clamp(-100, 100).int()


def _choose_clip(rows: Tensor, shape: TensorShape, exponents: Tensor, meta: str) -> Tensor:
    """The clip ratio of least squared error, per head and group.

    Args: rows f32 [n, H, D] as the cache sees them; exponents i32 [H, 2].
    Returns: f32 [H, groups], values of CLIPS; 1 is always a candidate and wins ties.
    """
    ratios = torch.tensor(CLIPS)
    clip = torch.empty(rows.shape[1], len(shape.groups))
    for head, (scale_exponent, zero_exponent) in enumerate(exponents.tolist()):
        for index, ((start, stop), code) in enumerate(zip(shape.groups, shape.codes, strict=True)):
            x = rows[:, head, start:stop].repeat(1, len(CLIPS))
            edges = torch.arange(len(CLIPS) + 1, dtype=torch.int32) * (stop - start)
            options = {"scale_exponent": scale_exponent, "zero_exponent": zero_exponent}
            codes, scales = ops.quantize_pack(x, edges, ratios, code=code, meta=meta, **options)
            back = ops.dequantize_unpack(codes, scales, edges, code=code, **options)
            errors = (
                (back - x).square().view(len(x), len(CLIPS), -1).sum((0, 2), dtype=torch.float64)
            )
            clip[head, index] = ratios[errors.argmin()]
    return clip


@contextmanager
def _steps(progress: bool | Step) -> Iterator[Step]:
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        from skvq_ext.report import steps

        with steps() as step:
            yield step
    else:
        yield lambda name, done, total: None
