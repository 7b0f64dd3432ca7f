"""Calibration from end to end: equal input equal bytes, within the budget, clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrate_models import BUDGET, PAIRS, divergence, make_lively, make_phi3, run, short_search
from hf_models import make_model, make_tokens
from transformers import DeepseekV3Config, FalconConfig, FalconForCausalLM, Gemma3nTextConfig

from skvq_ext.calibrate import CalibrationError, calibrate
from skvq_ext.geometry import Geometry, GeometryError
from skvq_ext.observe import ObservationError
from skvq_ext.plan import LayerPlan, Plan, PlanError, SplitPlan
from skvq_ext.scheme import Scheme

__all__ = ["short_search"]
NAMED = Scheme.parse("k2-v1.5-g64-w32-sink3-hadamard-clip")  # a single transform: fast


@pytest.mark.usefixtures("short_search")
def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    model = make_lively()
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c", "d")]
    run(model).save(paths[0])
    with torch.inference_mode():
        run(model, ids=make_tokens(200)).save(paths[1])
    run(model, seed=1).save(paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    plan = Plan.load(paths[0], Geometry.from_config(model.config), BUDGET)
    assert plan.scheme == BUDGET
    assert plan.origin == "searched on 400 tokens after lessons from 0, seed 0"
    plan.save(paths[3])
    assert paths[0].read_bytes() == paths[3].read_bytes()


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3"]
)
def test_every_kind_of_model(kind: str) -> None:
    """Its plan keeps the budget, and its cache reads it."""
    model = make_phi3() if kind == "phi3" else make_model(kind)
    plan = run(model, replace(BUDGET, transform=frozenset({"hadamard"})))
    narrowest = Scheme("2", "1.5", 64).record_format(64).bits_per_value
    assert narrowest <= plan.bits_per_value <= 2.3 + 1e-9
    assert len(plan.layers) == plan.geometry.num_layers == model.config.num_hidden_layers
    for layer in plan.layers:
        assert isinstance(layer, SplitPlan)
        assert {(part.k_format, part.v_format) for part in layer.parts} <= set(PAIRS)
    assert 0 < divergence(model, plan) < 0.5


@pytest.mark.usefixtures("short_search")
def test_it_is_worth_it() -> None:
    """On a text it has not seen, at equal bits: searched transforms, then formats per head."""
    model = make_lively()
    formats = Scheme.parse("k2-v2-g64-w32-sink3")
    bits = formats.record_format(64).bits_per_value
    default = divergence(model, Plan.default(Geometry.from_config(model.config), formats), seed=3)
    searched = run(model, formats)
    assert all(isinstance(layer, LayerPlan) for layer in searched.layers)
    assert (error := divergence(model, searched, seed=3)) < 0.6 * default
    spent = run(model, replace(BUDGET, bits=bits), formats=None)
    assert spent.bits_per_value <= bits + 1e-9
    assert divergence(model, spent, seed=3) < 0.95 * error


def test_bits_go_where_errors_cost_something() -> None:
    """The outputs of the second layer's first KV head are not read at all."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :128] = 0
    plan = run(model, replace(BUDGET, transform=frozenset({"hadamard"})))
    first, second = (
        {head: part.k_format + part.v_format for part in layer.parts for head in part.heads}
        for layer in plan.layers
    )
    assert second[0] == "21.5" and "32" in {second[1], *first.values()}


@pytest.mark.parametrize("named", ["identity", "centre-balance-hadamard-clip", "balance-clip0.9"])
def test_the_scheme_says_what_is_used(named: str) -> None:
    scheme = Scheme.parse(f"k2-v2-g64-w32-sink3-{named}")
    plan = run(make_lively(), scheme)
    assert plan.scheme == scheme
    for _, _, tensor in plan.named_tensors():
        assert bool(tensor.shift.any()) == ("centre" in named)
        assert bool((tensor.scale != 1).any()) == ("balance" in named)
        assert tensor.rotation == ("hadamard" if "hadamard" in named else "none")
        if scheme.clip is not None:
            assert bool((tensor.clip == scheme.clip).all())


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("gemma2").train()
    frozen, free = model.lm_head.weight, model.model.norm.weight
    frozen.requires_grad_(False)
    before = model.config._attn_implementation
    run(model, NAMED)
    with pytest.raises(RuntimeError, match="stop"):
        run(model, NAMED, progress=_stop)
    assert model.training and free.requires_grad and not frozen.requires_grad
    assert model.config._attn_implementation == before
    assert all(p.grad is None for p in model.parameters())


def _stop(name: str, done: int, total: int) -> None:
    raise RuntimeError("stop")


def test_progress_is_reported() -> None:
    calls: list[tuple[str, int, int]] = []
    run(make_model("llama"), NAMED, progress=lambda *call: calls.append(call))
    assert calls == [
        ("weighing heads", 1, 2),
        ("weighing heads", 2, 2),
        ("searching layers", 1, 2),
        ("searching layers", 2, 2),
    ]
    run(make_model("llama"), NAMED, progress=True)


def test_a_plan_knows_its_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    run(make_model("llama"), NAMED, tokenizer="0123").save(path)
    assert Plan.load(path, tokenizer="0123").tokenizer == "0123"
    Plan.load(path)
    with pytest.raises(PlanError, match="tokenizer: 4567 here, 0123 in the plan"):
        Plan.load(path, tokenizer="4567")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ids": make_tokens(98)[0]},
            "the text has 98 tokens, too few to calibrate on: at least 99",
        ),
        ({"ids": make_tokens(300)[0] + 5}, "the model's vocabulary has 97"),
        ({"max_tokens": 98}, "max_tokens is 98, too few"),
        ({"formats": [("4", "4")]}, "a budget of 2.3 bits per value cannot be kept"),
        ({"scheme": NAMED, "formats": PAIRS}, "have no use with the scheme k2-v1.5"),
    ],
)
def test_what_cannot_be_calibrated(options: dict[str, Any], message: str) -> None:
    """Before anything is read or searched."""
    options = {"scheme": BUDGET, "progress": _stop, **options}
    with pytest.raises(CalibrationError, match=message):
        run(make_model("llama"), **options)


@pytest.mark.parametrize(("part", "name"), [("k_proj", "keys"), ("v_proj", "values")])
def test_nan_names_the_layer(part: str, name: str) -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[3, 3] = float("nan")
    with pytest.raises(ObservationError, match=f"the {name} of layer 1 hold NaN or infinity"):
        run(model)
    assert model.config._attn_implementation == before


def test_attention_outside_the_interface_is_refused() -> None:
    config = FalconConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=128,
        vocab_size=128,
        attn_implementation="eager",
    )
    with pytest.raises(ObservationError, match="never called the attention interface"):
        run(FalconForCausalLM(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config(), "caches a latent"),
        (Gemma3nTextConfig(), "shares K and V between layers"),
    ],
)
def test_attention_that_cannot_be_packed_is_refused(config: Any, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        calibrate(SimpleNamespace(config=config), make_tokens(300), BUDGET)
