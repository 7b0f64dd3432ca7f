"""RoPE off and on again, against what the models themselves compute."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers as hf
from hf_models import _SIZES, make_model

from skvq_ext.rope import Rope, RopeError

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(24)],
    "long_factor": [2.0 + 0.05 * i for i in range(24)],
    "partial_rotary_factor": 0.75,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def makers() -> dict[str, Any]:
    small = _SIZES | {"initializer_range": 0.06}
    few = {name: value for name, value in small.items() if name != "head_dim"}
    few |= {"hidden_size": 256}
    return {
        "llama": lambda: make_model("llama"),
        "qwen3": lambda: make_model("qwen3"),
        "gemma3": lambda: make_model("gemma3"),
        "gpt_oss": lambda: make_model("gpt_oss"),
        "phi": lambda: model_of(hf.PhiConfig(**few, rope_parameters=PARTIAL)),
        "phi3": lambda: model_of(
            hf.Phi3Config(**few, rope_parameters=dict(LONG), original_max_position_embeddings=256)
        ),
        "glm": lambda: model_of(hf.GlmConfig(**small, rope_parameters=PARTIAL)),
        "cohere": lambda: model_of(hf.CohereConfig(**few)),
        "yarn": lambda: model_of(hf.LlamaConfig(**small, rope_parameters=YARN)),
        "smollm3": lambda: model_of(
            hf.SmolLM3Config(**small, no_rope_layers=[1, 0], layer_types=["full_attention"] * 2)
        ),
    }


def captured(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """What each layer's attention gave to apply_rotary_pos_emb and got back, during one forward."""
    file = sys.modules[type(model.base_model.rotary_emb).__module__]
    usual, calls = file.apply_rotary_pos_emb, []

    def spy(q, k, *args, **kwargs):
        out = usual(q, k, *args, **kwargs)
        calls.append({"before": k, "after": out[1]})
        return out

    file.apply_rotary_pos_emb = spy
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        file.apply_rotary_pos_emb = usual
    return calls


@pytest.mark.parametrize("name", makers())
def test_rotate_is_what_the_model_does_and_unrotate_takes_it_off(name: str) -> None:
    model = makers()[name]()
    rope, tokens = Rope.of(model), 300
    ids = torch.randint(2, 97, (2, tokens))
    calls = captured(model, ids)
    layers = [index for index, rotated in enumerate(rope.rotated) if rotated]
    assert len(calls) == len(layers) == (1 if name == "smollm3" else len(rope.rotated))
    positions = torch.arange(tokens)
    for layer, call in zip(layers, calls, strict=True):
        before, after = call["before"], call["after"]
        # Some files cut off the channels that rotate before they call, some inside.
        found = rope.rotate(before, positions, layer)
        torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
        again = rope.unrotate(found, positions, layer)
        torch.testing.assert_close(again, before, rtol=0, atol=2e-5)
        assert (found - before).abs().max() > 0.1


def test_channels_that_do_not_rotate_stay() -> None:
    rope = Rope.of(makers()["phi3"]())
    x = torch.randn(3, 10, 64)
    turned = rope.rotate(x, torch.arange(10) + 7, 0)
    assert torch.equal(turned[..., 48:], x[..., 48:])
    assert (turned[..., :48] - x[..., :48]).abs().amax((0, 1)).min() > 0


def test_a_layer_without_rope_is_left_alone() -> None:
    rope = Rope.of(makers()["smollm3"]())
    x = torch.randn(3, 10, 64)
    assert rope.rotated == (True, False)
    assert torch.equal(rope.rotate(x, torch.arange(10), 1), x)


def test_lengths_keep_their_scaling() -> None:
    """yarn and longrope multiply keys: rotating must, and taking it off must divide."""
    for name in ("yarn", "phi3"):
        rope = Rope.of(makers()[name]())
        x = torch.randn(2, 4, 64)
        turned = rope.rotate(x, torch.arange(4), 0)
        part = slice(0, 48 if name == "phi3" else 64)
        factor = turned[..., part].norm(dim=-1) / x[..., part].norm(dim=-1)
        assert factor.min() > 1.05
        assert (factor - factor.mean()).abs().max() < 1e-5


def test_frequencies_of_longrope_follow_the_length() -> None:
    rope = Rope.of(makers()["phi3"]())
    assert rope.switches_at == 256
    assert Rope.of(makers()["yarn"]()).switches_at == 0
    x, positions = torch.randn(2, 6, 64), torch.arange(6)
    short, long = (rope.rotate(x, positions, 0, length=n) for n in (200, 300))
    assert not torch.allclose(short, long, atol=1e-2)
    torch.testing.assert_close(rope.unrotate(long, positions, 0, length=300), x, rtol=0, atol=2e-5)
    # What the model does to the same tokens at the start of a sequence longer than 256.
    model = makers()["phi3"]()
    call = captured(model, torch.randint(2, 97, (1, 300)))[0]
    found = rope.rotate(call["before"][:, :, :6], positions, 0, length=300)
    torch.testing.assert_close(found, call["after"][:, :, :6], rtol=0, atol=1e-5)


def test_positions_per_sequence_and_half_precision() -> None:
    rope = Rope.of(make_model("llama"))
    x = torch.randn(2, 3, 4, 64)
    positions = torch.stack([torch.arange(4), torch.arange(4) + 900])
    found = rope.rotate(x, positions, 0)
    for row in range(2):
        torch.testing.assert_close(found[row], rope.rotate(x[row], positions[row], 0))
    half = rope.rotate(x.bfloat16(), positions, 0)
    assert half.dtype == torch.float32
    assert torch.equal(half, rope.rotate(x.bfloat16().float(), positions, 0))


def test_a_bfloat16_model_is_recognised() -> None:
    assert all(Rope.of(make_model("llama").bfloat16()).rotated)


def test_models_that_cannot_be_followed_are_refused() -> None:
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=97))
    with pytest.raises(RopeError, match=r"GPT2LMHeadModel has no rotary_emb .* without pre_rope"):
        Rope.of(gpt2)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(RopeError, match="scales its RoPE dynamically"):
        Rope.of(model_of(hf.LlamaConfig(**_SIZES, rope_parameters=dynamic)))


def test_keys_that_are_not_what_the_module_says_are_noticed(monkeypatch) -> None:
    model = make_model("llama")
    file = sys.modules[type(model.base_model.rotary_emb).__module__]
    usual = file.apply_rotary_pos_emb
    # Not linear, so that taking it off and putting it on again does not give what the model has.
    twisted = lambda *args: tuple(x * x.abs() for x in usual(*args))  # noqa: E731
    monkeypatch.setattr(file, "apply_rotary_pos_emb", twisted)
    with pytest.raises(RopeError, match="layer 0 of LlamaForCausalLM does not rotate its keys as"):
        Rope.of(model)


def test_wrong_positions_are_refused() -> None:
    rope = Rope.of(make_model("llama"))
    with pytest.raises(RopeError, match=r"positions are torch.int64 \[3\] for 4 tokens"):
        rope.rotate(torch.randn(2, 4, 64), torch.arange(3), 0)
    with pytest.raises(RopeError, match="float32"):
        rope.rotate(torch.randn(2, 4, 64), torch.arange(4.0), 0)
