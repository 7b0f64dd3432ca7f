"""Default plans of models that normalise queries and keys: balanced by what the weights tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrate_models import divergence
from hf_models import make_model
from test_calibrate_sensitivity import TINY, make
from transformers import Olmo2Config, Olmo2ForCausalLM

from skvq_ext.geometry import Geometry
from skvq_ext.hf import SkvqHFCache
from skvq_ext.hf.norms import key_scales
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

SCHEME = "k2-v4-g64-w32-sink3"


def weight_of(norm: Any, kind: str) -> torch.Tensor:
    """What a norm multiplies a channel with; Gemma's is one more than its weight."""
    return norm.weight.detach().double() + (1 if kind == "gemma3" else 0)


def make_uneven(kind: str) -> Any:
    """Channels of keys of very different size, and queries that make up for it."""
    model = make_model(kind, spread=0.1)
    dice, one = torch.Generator().manual_seed(0), 1 if kind == "gemma3" else 0
    with torch.no_grad():
        for layer in model.model.layers:
            sizes = (2 * torch.randn(32, generator=dice)).exp2().repeat(2)
            layer.self_attn.k_norm.weight.copy_(sizes - one)
            layer.self_attn.q_norm.weight.copy_(2 / sizes - one)
    return model


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_channels_are_balanced_by_the_weights(kind: str) -> None:
    """s = sqrt(RMS of keys / RMS of queries), of geometric mean 1."""
    model = make_uneven(kind)
    with torch.no_grad():
        for layer in model.model.layers:  # the two channels that RoPE mixes need not be equal
            layer.self_attn.k_norm.weight[:5] += 0.25
    found = key_scales(model, Geometry.from_config(model.config))
    assert found is not None and found.dtype == torch.float32
    for layer, scale in zip(model.model.layers, found, strict=True):
        k, q = (weight_of(getattr(layer.self_attn, f"{x}_norm"), kind) for x in "kq")
        k, q = (((x**2).view(2, 32).mean(0) ** 0.5).repeat(2) for x in (k, q))
        k, q = (x.clamp(min=float((x**2).mean() * 1e-3) ** 0.5) for x in (k, q))  # dead channels
        expected = (k / q).sqrt()
        expected = expected / expected.log().mean().exp()
        torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_the_default_plan_errs_far_less_than_a_rotation_alone(kind: str) -> None:
    model, scheme = make_uneven(kind), Scheme.parse(SCHEME)
    balanced = SkvqHFCache(model, SCHEME).plan
    rotated = Plan.default(Geometry.from_config(model.config), scheme)
    assert divergence(model, balanced) < 0.4 * divergence(model, rotated)


def test_where_no_norm_tells_there_is_nothing() -> None:
    for model in (make_model("llama"), make_model("gemma2"), make_model("gpt_oss")):
        assert key_scales(model, Geometry.from_config(model.config)) is None
    whole = Olmo2ForCausalLM(Olmo2Config(**TINY))  # one norm over all heads
    assert key_scales(whole, Geometry.from_config(whole.config)) is None


def test_models_that_see_images_have_norms_too() -> None:
    model = make("images too")
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.k_norm.weight[::8] += 9
    found = key_scales(model, Geometry.from_config(model.config))
    assert found is not None and found.shape == (2, 16)
    assert torch.equal(found[0], torch.ones(16)) and found[1, 0] > 2 * found[1, 1]


def test_a_named_transform_is_taken_as_it_is() -> None:
    model = make_uneven("qwen3")
    named = SkvqHFCache(model, f"{SCHEME}-hadamard-clip").plan
    from_configuration = SkvqHFCache(model.config, SCHEME).plan
    for plan in (named, from_configuration):
        assert all(bool((tensor.scale == 1).all()) for _, _, tensor in plan.named_tensors())
    default = SkvqHFCache(model, SCHEME).plan
    scaled = [bool((x.scale != 1).any()) for _, _, x in default.named_tensors()]
    assert scaled == [True, False] * 2, "keys only"
    assert default.layers[0].v.rotation == default.layers[0].k.rotation == "hadamard"
