"""Errors per layer and head, against attention in float64 over rows quantized by the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
from hf_models import ReferenceCache
from torch import Tensor
from torch.nn.functional import cosine_similarity

from skvq_ext.baselines.registry import build
from skvq_ext.evaluate.keys import packed_keys, read_logits
from skvq_ext.evaluate.layers import PROBE, measure_layers
from skvq_ext.evaluate.subject import EvaluationError
from skvq_ext.geometry import Geometry
from skvq_ext.hf import SkvqHFCache
from skvq_ext.layer_cache import LayerCache
from skvq_ext.observe import Watcher, observing
from skvq_ext.plan import Part, Plan, SplitPlan
from skvq_ext.published import Published
from skvq_ext.reference import fake_quantize_side, packed_len
from skvq_ext.scheme import Scheme

GEOMETRY = Geometry(2, 4, 2, 64)
TOKENS = 186  # a multiple of PROBE, and more than one packed tile


class _Recorder(Watcher):
    """Keeps q, k and v of every layer of one forward, [heads, tokens, head_dim]."""

    def __init__(self, num_layers: int) -> None:
        self.rows: list[tuple[Tensor, ...]] = [()] * num_layers

    def see(self, module: Any, *rows: Tensor) -> None:
        self.rows[module.layer_idx] = tuple(x[0].double() for x in rows)


def _quantized(layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All rows as the reference reads them back, sinks and window too."""
    every = slice(0, k.shape[1])
    found = (layer._read_back(x[None].float(), side, every)[0] for side, x in (("k", k), ("v", v)))
    return tuple(x.double() for x in found)  # type: ignore[return-value]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, packed: Any
) -> tuple[Tensor, Tensor]:
    """Outputs and logits of every query, one by one, over exact rows or those packed by then."""
    outs, logits = [], []
    for position in range(q.shape[1]):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        keys, values = packed(k, v, position + 1)
        keys, values = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (keys, values))
        row = torch.einsum("hd,htd->ht", q[:, position], keys[:, seen]) * scale
        logits.append(row)
        outs.append(torch.einsum("ht,htd->hd", row.softmax(-1), values[:, seen]))
    return torch.stack(outs), logits  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_errors_are_those_of_the_reference(kind: str) -> None:
    loaded = make_loaded(kind)
    scheme, passage = Scheme.parse(SMALL), make_passage(loaded, 200)
    found = measure_layers(make_subject(loaded, make_packed(loaded)), passage, TOKENS).methods[1]
    assert found.logits is not None
    recorder = _Recorder(len(found.output))
    with observing(loaded.model, recorder), torch.inference_mode():
        loaded.model(passage.ids[:, :TOKENS])
    for index, layer in enumerate(ReferenceCache(loaded.model, SMALL).layers):
        q, k, v = recorder.rows[index]
        lossy = _quantized(layer, k, v)

        def packed(k: Tensor, v: Tensor, length: int, lossy: Any = lossy) -> tuple[Tensor, ...]:
            end = scheme.sinks + packed_len(length, scheme.sinks, scheme.window)
            rows = torch.arange(k.shape[1])[:, None]
            inside = (rows >= scheme.sinks) & (rows < end)
            return tuple(torch.where(inside, y, x) for x, y in zip((k, v), lossy, strict=True))

        window = 48 if layer.is_sliding else 0
        exact_out, exact_logits = _attention(q, k, v, 1 / 8, window, lambda k, v, _: (k, v))
        out, logits = _attention(q, k, v, 1 / 8, window, packed)
        half = slice(TOKENS // 2, None)
        power = exact_out[half].square().sum((0, 2))
        error = ((out - exact_out)[half].square().sum((0, 2)) / power).sqrt()
        cosine = cosine_similarity(out[half], exact_out[half], dim=-1).mean(0)
        probes = [n - 1 for n in range(PROBE, TOKENS + 1, PROBE) if n > TOKENS // 2]
        wrong = torch.cat([(logits[p] - exact_logits[p]).abs() for p in probes], 1).mean(1)
        assert len(probes) == 3 and error.min() > 1e-2
        assert found.output[index] == pytest.approx(error.tolist(), rel=1e-3)
        assert found.cosine[index] == pytest.approx(cosine.tolist(), abs=1e-5)
        assert found.logits[index] == pytest.approx(wrong.tolist(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_full_precision_against_itself(kind: str) -> None:
    """Softcap, learned sinks and windows included; the exact attention is another function."""
    loaded = make_loaded(kind)
    (full,) = measure_layers(make_subject(loaded), make_passage(loaded, 150), 140).methods
    assert full.logits is not None
    assert max(max(row) for row in full.logits) == 0
    assert max(max(row) for row in full.output) < 1e-5
    assert min(min(row) for row in full.cosine) > 1 - 1e-6


def test_equal_runs_are_equal_and_leave_the_model_as_it_was() -> None:
    loaded = make_loaded()
    before, passage = loaded.model.config._attn_implementation, make_passage(loaded, 200)
    coarse, fine = make_packed(loaded), make_packed(loaded, "k8-v8-g32-w16-sink3-fp16")
    found = measure_layers(make_subject(loaded, coarse, fine), passage, TOKENS)
    assert loaded.model.config._attn_implementation == before
    again = measure_layers(make_subject(loaded, coarse), passage, TOKENS)
    assert again.methods[1] == found.methods[1]
    assert max(max(row) for row in found.methods[2].output) < 0.02


def test_keys_of_caches_that_hand_on_new_rows_only() -> None:
    class Telling:
        def read_keys(self) -> Tensor:
            return rows

    rows, query = torch.randn(2, 9, 8), torch.randn(4, 8)
    cache = SimpleNamespace(layers=[object(), Telling()])
    assert read_logits(cache, 0, rows[None, :, -3:], query, 0.5, seen=7) is None
    found = read_logits(cache, 1, rows[None, :, -3:], query, 0.5, seen=7)
    assert found is not None
    for head in range(4):
        torch.testing.assert_close(found[head], rows[head // 2, 2:] @ query[head] / 2)


def test_other_methods_are_compared_too() -> None:
    """SKVQ as published, whose keys are stored before RoPE, and a simulated one."""
    loaded = make_loaded()
    kivi = build("kivi:k4-v4-g32-w16-sink3", loaded.model)
    ids = make_passage(loaded, 600, seed=1).ids
    published = Published.fit(loaded.model, ids, "k4-v4-g32-w16-reorder-pre_rope-sink3-fp8")
    subject = make_subject(loaded, kivi, published)
    for method in measure_layers(subject, make_passage(loaded, 200), TOKENS).methods[1:]:
        assert method.logits is not None
        for grid in (method.logits, method.output):
            assert min(min(row) for row in grid) > 1e-3 and max(max(row) for row in grid) < 0.5


@pytest.mark.parametrize("length", [1, 3, 30, 83, 84, 300])
@pytest.mark.parametrize("sliding_window", [0, 48])
def test_keys_read_from_the_bytes(length: int, sliding_window: int) -> None:
    """Sinks and window as they came, packed rows as the reference rounds them; after pages were
    used again by a sliding layer, too."""
    scheme = Scheme.parse(SMALL)
    plan = Plan.default(Geometry(1, 4, 2, 64), scheme).layers[0]
    cache = LayerCache(plan, scheme, num_q_heads=4, sliding_window=sliding_window)
    k = torch.randn(length, 2, 64, generator=torch.Generator().manual_seed(0))
    cache.append(k, k)
    mapped = cache.door.map_k(k)
    exponents = torch.cat([plan.k.exponents, plan.v.exponents], -1)
    rounded = fake_quantize_side(mapped, cache.format, "k", plan.k.clip, exponents)
    end = scheme.sinks + packed_len(length, scheme.sinks, scheme.window)
    mapped[scheme.sinks : end] = rounded[scheme.sinks : end]
    newest = min(length, sliding_window or length)
    assert torch.equal(packed_keys(cache, newest), mapped[-newest:].transpose(0, 1))


def _filled(plan: Plan, scheme: Scheme, keys: Tensor) -> SkvqHFCache:
    """A packed cache whose layer 1 holds keys [tokens, 2, 64], and as values too."""
    cache = SkvqHFCache(make_loaded().model, scheme, plan, exact=True)
    layer, handed = cache.layers[1], keys.transpose(0, 1)[None]
    layer.lazy_initialization(handed, handed)
    layer.cache.append(keys, keys)
    return cache


def _errors(cache: SkvqHFCache, keys: Tensor, query: Tensor) -> Tensor:
    """Of the logits of every query head, [4, tokens]."""
    found = read_logits(cache, 1, keys[-1:].transpose(0, 1)[None], query, 0.125, len(keys))
    exact = torch.einsum("khd,tkd->kht", query.view(2, 2, 64), keys).flatten(0, 1) / 8
    assert found is not None
    return (found - exact).abs()


def test_logits_of_a_plan_that_shifts_and_scales() -> None:
    """With many bits they are nearly those of the keys that went in."""
    scheme = Scheme.parse("k8-v8-ghead-w16-sink3-fp16-centre-balance-hadamard-clip1")
    generator = torch.Generator().manual_seed(0)
    plan = Plan.default(GEOMETRY, Scheme.parse("k8-v8-ghead-w16-sink3-fp16-hadamard"))
    plan.scheme = scheme
    for _, _, tensor in plan.named_tensors():
        tensor.shift = torch.randn(tensor.shift.shape, generator=generator)
        tensor.scale = torch.rand(tensor.scale.shape, generator=generator) + 0.5
    keys, query = (torch.randn(*n, 64, generator=generator) for n in ((200, 2), (4,)))
    errors = _errors(_filled(plan, scheme, keys), keys, query)
    assert 1e-4 < errors.max() < 0.06  # without the shift: 1


def test_logits_of_heads_in_several_formats() -> None:
    """KV head 1 comes first and coarse, KV head 0 second and fine."""
    scheme = Scheme.parse("bits4-g32-w16-sink3")
    formats = {(1,): "1.5", (0,): "8"}
    one = Geometry(1, 2, 1, 64)
    parts = tuple(
        Part(heads, k, "2", Plan.default(one, Scheme(k, "2", 32)).layers[0])
        for heads, k in formats.items()
    )
    plan = Plan(scheme, GEOMETRY, [SplitPlan(parts)] * 2)
    generator = torch.Generator().manual_seed(0)
    keys, query = (torch.randn(*n, 64, generator=generator) for n in ((200, 2), (4,)))
    errors = _errors(_filled(plan, scheme, keys), keys, query).mean(1)
    assert errors[:2].max() < 0.05 and errors[2:].min() > 0.1


def test_layers_that_cannot_be_compared() -> None:
    loaded = make_loaded()
    subject, passage = make_subject(loaded), make_passage(loaded, 100)
    with pytest.raises(EvaluationError, match="fewer than the 200"):
        measure_layers(subject, passage, 200)
    with pytest.raises(EvaluationError, match="too few for layers"):
        measure_layers(subject, passage, 40)
    with pytest.raises(EvaluationError, match="layer 0 holds NaN"):
        measure_layers(make_subject(loaded, BrokenMethod(name="broken")), passage, 100)
