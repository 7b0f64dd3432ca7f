"""What an error in a head costs: against gradients computed whole, and against what errors really do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from hf_models import make_model, make_tokens
from torch import Tensor

from skvq_ext.calibrate import CalibrationError
from skvq_ext.calibrate.sensitivity import fisher
from skvq_ext.observe import ObservationError, Watcher, observing

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def make(kind: str) -> Any:
    """A model whose head does something special, by the name of what it does."""
    if kind == "divided logits":
        config: Any = hf.GraniteConfig(**TINY, logits_scaling=0.25)
    elif kind == "multiplied logits":
        config = hf.CohereConfig(**TINY, logit_scale=3.0)
    elif kind == "capped logits":
        model = make_model("gemma2", spread=0.2)
        model.config.final_logit_softcapping = 0.5
        return model
    elif kind == "images too":
        config = hf.Gemma3Config(
            text_config=TINY | {"head_dim": 16, "layer_types": ["full_attention"] * 2},
            vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
        )
        torch.manual_seed(0)
        return hf.Gemma3ForConditionalGeneration(config).eval()
    else:
        return make_model(kind, spread=0.2)
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def weigh(model: Any, segments: Tensor, num_layers: int | None = None, seed: int = 3) -> Any:
    config = model.config.get_text_config(decoder=True)
    with torch.no_grad():
        return fisher(
            model, segments, num_layers or config.num_hidden_layers, seed, lambda done, total: None
        )


class _Outputs(Watcher):
    """Keeps the outputs of attention and, in the layers of `noise`, changes them."""

    def __init__(self, noise: dict[int, Tensor] | None = None) -> None:
        self.noise, self.found = noise or {}, {}

    def attended(self, module: Any, rows: Any, out: Tensor, options: Any) -> None:
        if out.requires_grad:
            out.retain_grad()
        self.found[module.layer_idx] = out
        if module.layer_idx in self.noise:
            out += self.noise[module.layer_idx]


def expected_fisher(model: Any, segments: Tensor, seed: int) -> list[Tensor]:
    """By one graph over the whole model, logits by its own forward, sums in float64."""
    dice, sums = torch.Generator().manual_seed(seed), {}
    for ids in segments:
        with observing(model, seen := _Outputs()):
            likely = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        loss = torch.zeros(())
        for block in likely.split(256):
            drawn = torch.multinomial(block.detach().exp(), 1, generator=dice)
            loss = loss + block.gather(-1, drawn).sum()
        loss.backward()
        for index, out in seen.found.items():
            g = out.grad[0].double()
            sums[index] = sums.get(index, 0) + torch.einsum("thi,thj->hij", g, g)
    return [sums[index] / segments.numel() for index in sorted(sums)]


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "gemma2", "gemma3", "gpt_oss"),
        *("divided logits", "multiplied logits", "capped logits", "images too"),
    ],
)
def test_layer_by_layer_it_is_what_one_graph_gives(kind: str) -> None:
    """And the head of the model turns hidden states into logits as it always does."""
    model, segments = make(kind), make_tokens(300, 2)
    found, expected = weigh(model, segments), expected_fisher(model, segments, 3)
    assert len(found) == len(expected)
    for mine, plain in zip(found, expected, strict=True):
        assert mine.shape == plain.shape and mine.dtype == torch.float64
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_the_seed_decides_which_tokens_are_drawn() -> None:
    model, segments = make_model("llama"), make_tokens(100)
    one, same, other = (weigh(model, segments, seed=n)[1] for n in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("layer", [0, 1])
def test_it_foretells_what_an_error_costs(layer: int) -> None:
    """KL divergence of the next token, summed over a text, after small errors in all heads."""
    model, ids = make_model("llama", spread=0.2), make_tokens(300)
    weight = weigh(model, ids)[layer]
    noise = 2e-3 * torch.randn(1, 300, *weight.shape[:2], generator=torch.Generator())
    logs = []
    with torch.no_grad():
        for errors in ({}, {layer: noise}):
            with observing(model, _Outputs(errors)):
                logs.append(model(input_ids=ids).logits[0].double().log_softmax(-1))
    exact, off = logs
    cost = float((exact.exp() * (exact - off)).sum())
    e = noise[0].double()
    foretold = float(torch.einsum("thi,hij,thj->", e, weight, e)) / 2
    assert 1e-4 < cost < 1 and foretold == pytest.approx(cost, rel=0.3)


def test_nothing_is_left_behind() -> None:
    model, ids = make_model("llama"), make_tokens(80)
    first, second = model.model.layers
    own = second.forward
    second.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as device maps have it
    kept, before = second.forward, model.config._attn_implementation
    weigh(model, ids)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(CalibrationError):
        weigh(model, ids)
    assert second.forward is kept and "forward" not in vars(first)
    assert "forward" not in vars(model.model) and model.config._attn_implementation == before


def test_progress_is_reported() -> None:
    model, steps = make_model("llama"), []
    with torch.no_grad():
        fisher(model, make_tokens(70, 3), 2, 0, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@contextmanager
def _spoiled_gradients(model: Any) -> Iterator[None]:
    def spoil(module: Any, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.inf)

    hook = model.model.norm.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def test_what_is_not_finite_is_named() -> None:
    model, ids = make_model("llama"), make_tokens(80)
    with _spoiled_gradients(model), pytest.raises(CalibrationError, match="layer 0: the gradients"):
        weigh(model, ids)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(CalibrationError, match="the logits of the model hold NaN or infinity"):
        weigh(model, ids)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(ObservationError, match="the queries of layer 1 hold NaN or infinity"):
        weigh(model, ids)


def test_models_that_cannot_be_weighed() -> None:
    ids = make_tokens(80)
    with pytest.raises(CalibrationError, match="LlamaModel does not compute its logits"):
        weigh(make_model("llama").model, ids)
    judge = hf.LlamaForSequenceClassification(hf.LlamaConfig(**TINY))
    with pytest.raises(CalibrationError, match="Use a causal language model"):
        weigh(judge.eval(), ids)
    falcon = hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            attn_implementation="eager",
        )
    )
    with pytest.raises(ObservationError, match="never called the attention interface"):
        weigh(falcon.eval(), ids)
