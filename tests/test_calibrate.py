"""Calibration: right statistics, right choices, same input same bytes, clear refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from skvq_ext import calibrate as module
from skvq_ext import ops
from skvq_ext.calibrate import CLIPS, CalibrationError, balanced_scale, calibrate
from skvq_ext.door import Door
from skvq_ext.observe import ObservationError, _output_energy
from skvq_ext.plan import Geometry, LayerPlan, Plan, TensorShape
from skvq_ext.scheme import Scheme

SCHEME = Scheme.parse("k3:1/2+2-v1.5-g32-sink5-fp8")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_size": 96,
    "head_dim": 64,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    with torch.no_grad():  # keys with a mean and channels of very different size, as in real models
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.bias.normal_(0, 2)
            attention.v_proj.bias.normal_(0, 1)
            attention.k_proj.weight *= (2 * torch.randn(128, 1)).exp2()
            attention.o_proj.weight *= torch.randn(1, 384).exp2()
    return model


def text(length: int = 400, seed: int = 1) -> Tensor:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed))


def run(model: Any, scheme: Scheme = SCHEME, ids: Tensor | None = None, **options: Any) -> Plan:
    return calibrate(model, text() if ids is None else ids, scheme, progress=False, **options)


def test_same_input_gives_the_same_file(tmp_path: Path) -> None:
    model = llama()
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")]
    run(model).save(paths[0])
    run(model, ids=text()[None]).save(paths[1])
    run(model, seed=1).save(paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    plan = Plan.load(paths[0], Geometry.from_config(model.config), SCHEME)
    assert str(plan.scheme) == f"{SCHEME}-centre-balance-hadamard-clip"
    assert plan.origin == "calibrated on 400 tokens, seed 0"


def cached(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values of one layer as the model caches them, f64 [tokens, H, D]."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[None], past_key_values=cache)
    rows = cache.layers[layer]
    return rows.keys[0].transpose(0, 1).double(), rows.values[0].transpose(0, 1).double()


def test_shift_is_the_mean_of_the_tokens_that_get_quantized() -> None:
    model = llama()
    plan = run(model)
    for layer in range(2):
        for x, tensor in zip(
            cached(model, text(), layer), vars(plan.layers[layer]).values(), strict=True
        ):
            assert torch.allclose(tensor.shift.double(), x[5:].mean(0), atol=1e-4)


def test_text_is_read_in_chunks_up_to_max_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(module, "CHUNK", 100)
    shift = run(model, ids=text(203), max_tokens=150).layers[1].k.shift.double()
    ids = text(203)
    both = [cached(model, chunk, 1)[0][5:] for chunk in (ids[:100], ids[100:150])]
    assert torch.allclose(shift, torch.cat(both).mean(0), atol=1e-4)
    short = [cached(model, ids[:100], 1)[0][5:]]  # a last chunk of 3 tokens is all sinks
    shift = run(model, ids=ids[:103]).layers[1].k.shift.double()
    assert torch.allclose(shift, torch.cat(short).mean(0), atol=1e-4)


def test_channels_are_balanced_and_sorted() -> None:
    model = llama()
    plan = run(model, replace(SCHEME, transform=frozenset({"centre", "balance"})))
    keys, values = cached(model, text(), 1)
    layer, door = plan.layers[1], Door(plan.layers[1], 6)
    spread = door.map_k(keys.float())[5:].double().var(0, correction=0)
    assert bool((spread.diff(dim=-1) <= 1e-4 * spread[:, :-1]).all()), "the widest band comes first"
    weight = model.model.layers[1].self_attn.o_proj.weight.double()
    energy = weight.square().sum(0).view(2, 3, 64).sum(1)
    inside = energy * layer.v.scale.double() ** 2  # V has one band, so its order is the model's
    ratio = inside / door.map_v(values.float())[5:].double().var(0, correction=0)
    assert torch.allclose(ratio, ratio.mean(-1, keepdim=True).expand_as(ratio), rtol=1e-3)
    assert torch.allclose(layer.v.scale.log().mean(-1), torch.zeros(2), atol=1e-5)


def test_balanced_scale_survives_dead_channels() -> None:
    power = torch.ones(3, 64, dtype=torch.float64)
    energy = torch.ones(3, 64, dtype=torch.float64)
    power[0, 0], energy[0, 1], power[1], energy[2] = 0, 0, 0, 0
    scale = balanced_scale(power, energy)
    assert torch.isfinite(scale).all() and scale.min() >= 0.0099 and scale.max() <= 101
    assert scale[0, 0] < 0.1 and scale[0, 1] > 10
    assert torch.equal(scale[1:], torch.ones(2, 64, dtype=torch.float64))


def squared_errors(rows: Tensor, shape: TensorShape, head: int, layer: Any, clip: Any) -> Tensor:
    """Per group, with `clip` for all groups, or the plan's own where it is None."""
    found = []
    scale_exponent, zero_exponent = layer.exponents[head].tolist()
    options = {"scale_exponent": scale_exponent, "zero_exponent": zero_exponent}
    for index, (start, stop) in enumerate(shape.groups):
        x, edges = rows[:, head, start:stop].contiguous(), torch.tensor([0, stop - start]).int()
        ratio = layer.clip[head, index] if clip is None else torch.tensor(clip)
        codes, meta = ops.quantize_pack(
            x, edges, ratio[None].float(), code=shape.codes[index], meta="fp8", **options
        )
        scale, zero = meta.float().unbind(-1)
        assert scale.max() < 448 and zero.abs().max() < 448, "nothing saturates"
        back = ops.dequantize_unpack(codes, meta, edges, code=shape.codes[index], **options)
        found.append((back - x).double().square().sum())
    return torch.stack(found)


def test_clip_is_the_best_of_the_grid_on_what_was_seen() -> None:
    model = llama()
    plan = run(model)
    keys, values = cached(model, text(), 0)
    door = Door(plan.layers[0], 6)
    for name, rows in (("k", door.map_k(keys.float())), ("v", door.map_v(values.float()))):
        tensor, shape = getattr(plan.layers[0], name), plan.shapes[name]
        for head in range(2):
            chosen = squared_errors(rows[5:], shape, head, tensor, None)
            every = [squared_errors(rows[5:], shape, head, tensor, ratio) for ratio in CLIPS]
            assert bool((chosen <= torch.stack(every).amin(0) * (1 + 1e-6)).all())
            assert chosen[-1] < 0.8 * every[0][-1], "2 bits and less need it"


def test_new_text_does_not_saturate() -> None:
    model = llama()
    plan = run(model)
    keys, values = cached(model, text(seed=2), 1)
    door = Door(plan.layers[1], 6)
    for name, rows in (("k", door.map_k(keys.float())), ("v", door.map_v(values.float()))):
        for head in range(2):
            squared_errors(rows[5:], plan.shapes[name], head, getattr(plan.layers[1], name), None)


@pytest.mark.parametrize(
    ("keys", "shifted", "scaled", "rotation"),
    [
        ("identity", False, False, "none"),
        ("centre", True, False, "none"),
        ("balance-clip0.9", False, True, "none"),
        ("hadamard-clip", False, False, "hadamard"),
        ("centre-balance-hadamard", True, True, "hadamard"),
    ],
)
def test_the_scheme_says_what_is_used(
    keys: str, shifted: bool, scaled: bool, rotation: str
) -> None:
    scheme = Scheme.parse(f"k2-v2-g64-{keys}")
    plan = run(llama(), scheme)
    assert plan.scheme == scheme
    for _, _, tensor in plan.named_tensors():
        assert bool(tensor.shift.any()) == shifted
        assert bool((tensor.scale != 1).any()) == scaled
        assert tensor.rotation == rotation
        if scheme.clip is not None:
            assert bool((tensor.clip == scheme.clip).all())


@pytest.mark.parametrize(
    "model",
    [
        Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=32)),
        Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager")),
        Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        Phi3ForCausalLM(Phi3Config(**(SIZES | {"hidden_size": 384}), pad_token_id=0)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_other_models(model: Any) -> None:
    before = model.config._attn_implementation
    model.train()
    plan = run(model, Scheme.parse("k2-v1.5-g32"))
    assert model.config._attn_implementation == before and model.training
    keys, _ = cached(model.eval(), text(), 1)
    if plan.geometry.sliding_windows == (0, 0):
        assert torch.allclose(plan.layers[1].k.shift.double(), keys[5:].mean(0), atol=1e-4)
    plan.check(Geometry.from_config(model.config), Scheme.parse("k2-v1.5-g32"))


def test_observing_changes_nothing_in_the_model() -> None:
    from skvq_ext.observe import Observer, observing

    model = llama().eval()
    with torch.no_grad():
        plain = model(input_ids=text(50)[None]).logits
        with observing(model, Observer(2, 0)):
            assert torch.equal(model(input_ids=text(50)[None]).logits, plain)
        assert torch.equal(model(input_ids=text(50)[None]).logits, plain)


def test_progress_is_reported() -> None:
    calls: list[tuple[str, int, int]] = []
    calibrate(llama(), text(), SCHEME, progress=lambda *call: calls.append(call))
    assert calls == [
        ("reading the text", 1, 1),
        ("choosing clip ratios", 1, 2),
        ("choosing clip ratios", 2, 2),
    ]
    calibrate(llama(), text(), SCHEME, progress=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (text(60), "the text has 60 tokens, too few to calibrate on: at least 69"),
        (torch.full((100,), 128), r"from 128 to 128, the model's vocabulary has 128"),
        (torch.full((100,), -1), "Use the tokenizer of this model"),
        (torch.zeros(100), r"token_ids is torch.float32 \[100\]"),
        (torch.zeros(2, 100, dtype=torch.int64), r"\[2, 100\]; calibration reads one text"),
    ],
)
def test_unusable_text_is_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(llama(), ids=ids)


@pytest.mark.parametrize(("part", "name"), [("k_proj", "keys"), ("v_proj", "values")])
def test_nan_names_the_layer(part: str, name: str) -> None:
    model = llama()
    before = model.config._attn_implementation
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[3, 3] = float("nan")
    with pytest.raises(ObservationError, match=f"the {name} of layer 1 hold NaN or infinity"):
        run(model)
    assert model.config._attn_implementation == before


def test_attention_outside_the_interface_is_refused() -> None:
    config = FalconConfig(
        num_hidden_layers=2,
        num_attention_heads=6,
        hidden_size=384,
        vocab_size=128,
        attn_implementation="eager",
    )
    with pytest.raises(ObservationError, match="never called the attention interface"):
        run(FalconForCausalLM(config))


def test_output_projection_that_cannot_be_read_is_refused() -> None:
    attention = torch.nn.Module()
    with pytest.raises(ObservationError, match="layer 3: Module has no output projection"):
        _output_energy(attention, 3, 4, 2, 64)
    attention.o_proj = torch.nn.Linear(128, 256)
    with pytest.raises(ObservationError, match=r"expected floating point \[hidden_size, 256\]"):
        _output_energy(attention, 3, 4, 2, 64)
    attention.o_proj = torch.nn.Linear(256, 128)
    assert _output_energy(attention, 3, 4, 2, 64).shape == (2, 64)


def test_mapped_attention_of_a_calibrated_layer_is_unchanged() -> None:
    model = llama()
    plan = run(model)
    keys, values = cached(model, text(), 0)
    door = Door(LayerPlan(**vars(plan.layers[0])), 6)
    q = torch.randn(7, 6, 64)
    keys, values = keys.float(), values.float()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(3, 1)) / 8
        return torch.einsum("qhk,khd->qhd", logits.softmax(-1), v.repeat_interleave(3, 1))

    mapped = attend(door.map_q(q), door.map_k(keys), door.map_v(values))
    assert torch.allclose(door.unmap_o(mapped), attend(q, keys, values), atol=1e-5)
