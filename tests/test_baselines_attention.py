"""Baselines that look at attention, and rows of a calibration text, against the model's own answers."""

from __future__ import annotations

import pytest
import torch
from hf_models import make_model, make_tokens
from torch import Tensor

from skvq_ext.baselines.coding import Coded, PreRope
from skvq_ext.baselines.registry import build
from skvq_ext.baselines.saliency import Saliency, attention_weights
from skvq_ext.baselines.samples import collect
from skvq_ext.generation import full_cache
from skvq_ext.rope import Rope


def test_saliency_is_the_mean_attention_of_those_who_could_see() -> None:
    """With all queries probed: the weights that eager attention returns, token by token."""
    model, ids = make_model("llama", spread=0.15), make_tokens(150)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[1][0]  # [heads, n, n]
        method = build("saliency:w20-sink3-probe100", model)
        quantizer = Saliency(("4", "2"), ("4", "2"), 13, 1.0)
        cache = method.cache(model)
        cache._shared.quantizer = quantizer
        model(ids, past_key_values=cache)
    wanted = weights.mean(0).sum(0) / torch.arange(150, 0, -1)
    known = quantizer.layers[1]
    torch.testing.assert_close((known.weight / known.queries).float(), wanted, rtol=1e-4, atol=1e-6)
    chosen = quantizer.salient(1, 3, 64)
    assert chosen.sum() == 13
    assert wanted[3:67][chosen].min() >= wanted[3:67][~chosen].max()


def test_probe_queries_are_a_share_of_all() -> None:
    model, ids = make_model("llama"), make_tokens(200)
    with torch.no_grad():
        cache = build("saliency:probe25", model).cache(model)
        model(ids, past_key_values=cache)
    assert 48 <= float(cache._shared.quantizer.layers[0].queries[0]) <= 52


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_watched_attention_knows_softcap_and_learned_sinks(kind: str) -> None:
    model, ids = make_model(kind, spread=0.15), make_tokens(90)
    model.set_attn_implementation("eager")
    seen = {}

    class Watcher(Saliency):
        def watch(self, layer: int, what: object) -> None:
            seen[layer] = what

    with torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions
        cache = build("saliency", model).cache(model)
        cache._shared.quantizer = Watcher(("4", "2"), ("4", "2"), 13, 1.0)
        model(ids, past_key_values=cache)
        for layer, weights in enumerate(wanted):
            found = attention_weights(seen[layer].query, seen[layer], seen[layer].visible)
            torch.testing.assert_close(found, weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_before_rope_is_where_keys_do_not_turn(kind: str) -> None:
    """The coder sees the same keys wherever the tile stands, and gets them back rotated."""
    model = make_model(kind)
    generator = torch.Generator().manual_seed(0)
    rope, plain = Rope.of(model), torch.randn(2, 64, 64, generator=generator)
    given = []

    def coder(layer: int, x: Tensor, start: int) -> Coded:
        given.append(x)
        return Coded(2 * x, 1.0)

    for start in (0, 500):
        keys = rope.rotate(plain, torch.arange(start, start + 64), 0)
        values, bits = PreRope(coder, rope)(0, keys, start)
        torch.testing.assert_close(given[-1], plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, 2 * keys, rtol=1e-4, atol=1e-4)
        assert bits == 1.0


def test_collected_rows_are_what_attention_sees() -> None:
    model, ids = make_model("gemma3"), make_tokens(1100)
    rows = collect(model, ids, skip=3)
    cache = full_cache(model)
    with torch.no_grad():
        model(ids[:, :1024], past_key_values=cache)
    assert len(rows) == 3 and rows[0].k.shape == (2, 1100 - 6, 64)
    assert rows[0].positions.tolist() == [*range(3, 1024), *range(3, 76)]
    found = rows[1]  # the layer that sees everything, so the cache holds all of it
    torch.testing.assert_close(found.k[:, :1021], cache.layers[1].keys[0, :, 3:])
    torch.testing.assert_close(found.v[:, :1021], cache.layers[1].values[0, :, 3:])
    weight = model.model.layers[1].self_attn.o_proj.weight
    assert float(found.output[1, 5]) == float(weight.abs()[:, [128 + 5, 192 + 5]].max())
    assert found.k_gradient is None and not any(p.grad is not None for p in model.parameters())


def test_gradients_of_keys_and_values() -> None:
    """Adding one vector to all keys changes no softmax: their gradients sum to nothing. The last
    token's rows meet no query whose loss counts."""
    model, ids = make_model("llama"), make_tokens(60)
    for layer in collect(model, ids, skip=0, sensitivity=True):
        gradient = layer.k_gradient
        assert gradient.abs().max() > 0 and layer.v_gradient.abs().max() > 0
        assert gradient.sum(1).abs().max() < 1e-4 * gradient.abs().sum(1).max()
        assert not gradient[:, -1].any() and not layer.v_gradient[:, -1].any()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
