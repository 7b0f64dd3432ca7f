"""The packed cache as a guest in transformers: plain runs, memory, and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from hf_models import KINDS, make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache

from skvq_ext.geometry import GeometryError
from skvq_ext.hf import SkvqHFCache, enable
from skvq_ext.plan import PlanError

PACKED = "k2-v1.5-ghead-w16-sink2-fp8"
PADDED = torch.tensor([[0] * 30 + [1] * 120, [1] * 150])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_without_the_packed_cache_nothing_changes(kind: str, mask: Tensor | None) -> None:
    """Forward, DynamicCache, training mode: as eager attention, softcap and learned sinks too."""
    model, ids = make_model(kind), make_tokens(150, batch_size=2)
    real = torch.ones(2, 150, dtype=torch.bool) if mask is None else mask.bool()
    results = []
    for select in (lambda: model.set_attn_implementation("eager"), lambda: enable(model)):
        select()
        cache = DynamicCache(config=model.config)
        one = model(ids, attention_mask=mask).logits
        two = model(ids, attention_mask=mask, past_key_values=cache).logits
        wider = None if mask is None else torch.cat([mask, mask.new_ones(2, 3)], dim=1)
        three = model(ids[:, :3], attention_mask=wider, past_key_values=cache).logits
        model.train()
        with torch.enable_grad():
            labels = ids.masked_fill(~(real & real.roll(1, 1)), -100)  # none after padding
            loss = model(ids, attention_mask=mask, labels=labels).loss
            (gradient,) = torch.autograd.grad(loss, [model.model.layers[0].self_attn.k_proj.weight])
        model.eval()
        results.append([one[real], two[real], three, gradient])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_memory_is_all_that_is_kept() -> None:
    model, ids = make_model("gemma3"), make_tokens(1500)
    cache = SkvqHFCache(model, PACKED)
    model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    gc.collect()
    found, seen, stack = {}, set(), [cache.layers]
    while stack:  # everything the layers can reach
        for item in gc.get_referents(stack.pop()):
            if id(item) in seen or isinstance(item, (type, hf.PreTrainedConfig)):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, (list, tuple, dict)) or type(item).__module__.startswith("skvq"):
                stack.append(item)
    plans = sum(x.nbytes for layer in cache.plan.layers[:1] for x in [*layer.k.tensors().values()])
    memory = cache.memory()
    assert memory["total"] <= sum(found.values()) <= memory["total"] + 4 * plans
    # One layer sees everything; two see 48 tokens.
    window = 2 * (16 + 64 + 64 + 2) * 2 * 64 * 4
    assert memory["ring"] + memory["sinks"] == 3 * window
    assert memory["full_precision"] == 2 * (1504 + 2 * 48) * 2 * 64 * 4
    full_layer = cache.layers[1].cache
    assert full_layer.tensors.pages.shape[0] == (1500 - 18) // 64
    assert all(cache.layers[i].cache.tensors.pages.shape[0] <= 16 for i in (0, 2))


def test_bfloat16() -> None:
    model, ids = make_model("llama").to(torch.bfloat16), make_tokens(150)
    cache = SkvqHFCache(model, "k8-v8-g32-w16-sink2-fp16")
    found = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert found.shape == (1, 170) and cache.lengths == [169]
    layer = cache.layers[0].cache
    assert layer.tensors.ring_k.dtype == torch.bfloat16
    full = model(found[:, :-1], past_key_values=DynamicCache(config=model.config)).logits[:, -1]
    cache.crop(-1)
    packed = model(found[:, -2:-1], past_key_values=cache).logits[:, -1]
    assert (packed - full).abs().max() < 0.1


def test_the_cache_takes_its_geometry_from_a_configuration_alone() -> None:
    model, ids = make_model("mistral"), make_tokens(20)
    cache = SkvqHFCache(model.config, PACKED)
    assert cache.is_sliding == [True, True] and len(cache) == 2
    assert not cache.is_compileable and cache.layers[0].is_croppable
    assert cache.layers[0].get_max_length() == -1 and cache.batch_size == -1
    with pytest.raises(RuntimeError, match=r"attends with 'sdpa'.*hf\.enable\(model\)"):
        model(ids, past_key_values=cache)
    enable(model)(ids, past_key_values=cache)
    assert cache.lengths == [20]


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_another_attention_is_refused(other: str) -> None:
    model, ids = make_model("llama"), make_tokens(20)
    cache = SkvqHFCache(model, PACKED)
    model.set_attn_implementation(other)
    with pytest.raises(RuntimeError, match=f"attends with '{other}'"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_keys_that_never_reach_the_attention_are_missed() -> None:
    """A configuration that is not the model's own cannot be asked, so the keys are counted."""
    model, ids = make_model("llama"), make_tokens(20)
    other = enable(make_model("llama"))
    cache = SkvqHFCache(other.config, PACKED)
    model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="never reached the attention implementation 'skvq'"):
        model(ids[:, :1], past_key_values=cache)


def test_a_forward_that_stopped_half_way_is_noticed() -> None:
    model, ids = make_model("llama"), make_tokens(20)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = SkvqHFCache(model, PACKED)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"\(0 and 20\): the last forward did not finish"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert model(ids, past_key_values=cache).logits.isfinite().all()


def test_the_attention_can_be_chosen_when_a_model_is_loaded() -> None:
    config = make_model("llama").config
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="skvq").eval()
    cache = SkvqHFCache(model.config, PACKED)
    model(make_tokens(20), past_key_values=cache)
    assert cache.lengths == [20]


def refuse(model: Any, message: str, error: type[Exception] = ValueError, **inputs: Any) -> None:
    """The forward fails with this message, and after a reset the cache is as good as new."""
    cache = SkvqHFCache(model, PACKED)
    model(make_tokens(40), past_key_values=cache)
    with pytest.raises(error, match=message):
        model(make_tokens(3), past_key_values=cache, **inputs)
    cache.reset()
    with torch.no_grad():
        model.eval()(make_tokens(40), past_key_values=cache)
    assert cache.lengths == [40]


def test_masks_it_cannot_honour_are_refused() -> None:
    model = make_model("llama")
    hidden = torch.ones(1, 43, dtype=torch.long)
    hidden[0, 7] = 0
    refuse(model, r"shows \[39\] of the cached tokens, but \[40\] are", attention_mask=hidden)
    refuse(model, "has 3 columns; the cache holds 40 and 3", attention_mask=hidden[:, :3])
    refuse(model, r"mask of shape \[1, 1, 3, 43\].*2-D", attention_mask=torch.ones(1, 1, 3, 43))
    gemma = make_model("gemma3")
    gemma.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="not plainly causal"):
        gemma(make_tokens(5), past_key_values=SkvqHFCache(gemma, PACKED))


def test_what_needs_more_than_softmax_of_the_past_is_refused() -> None:
    refuse(make_model("llama"), "layer 0 was asked for output_attentions", output_attentions=True)
    model = make_model("llama")
    message = r"gradients cannot flow.*no_grad"
    with torch.enable_grad(), pytest.raises(RuntimeError, match=message):
        model(make_tokens(5), past_key_values=SkvqHFCache(model, PACKED))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout"):
        model.train()(make_tokens(5), past_key_values=SkvqHFCache(model, PACKED))


def test_a_changed_batch_or_geometry_is_refused() -> None:
    model = make_model("llama")
    cache = SkvqHFCache(model, PACKED)
    model(make_tokens(40), past_key_values=cache)
    with pytest.raises(ValueError, match="a batch of 2 was given to a cache that holds 1"):
        model(make_tokens(3, batch_size=2), past_key_values=cache)
    wide = enable(make_model("gpt_oss"))
    with pytest.raises(ValueError, match="layer 0 attends with sliding_window=48"):
        wide(make_tokens(3), past_key_values=SkvqHFCache(model.config, PACKED))
    wide.config.num_key_value_heads = 4
    with pytest.raises(
        ValueError, match=r"keys of shape \[1, 2, 3, 64\], expected \[1, 4, 3, 64\]"
    ):
        wide(make_tokens(3), past_key_values=SkvqHFCache(wide.config, PACKED))


def test_columns_that_cannot_be_cropped() -> None:
    model, ids = make_model("llama"), make_tokens(150, batch_size=2)
    cache = SkvqHFCache(model, PACKED)
    model(ids, attention_mask=PADDED, past_key_values=cache)
    with pytest.raises(ValueError, match=r"only the newest 120 hold no padding"):
        cache.crop(-130)
    with pytest.raises(ValueError, match="cannot crop sequence 0 to 50"):
        cache.crop(-70)
    cache.crop(-64)
    assert cache.get_seq_length() == 86 and cache.lengths == [56, 86]
    cache.crop(-86)
    assert cache.lengths == [0, 0]
    model(ids, attention_mask=PADDED, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        cache.layers[0].offload()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: hf.DeepseekV3Config(), "MLA"),
        (lambda: hf.T5Config(), "encoder-decoder"),
        (lambda: hf.LlamaConfig(head_dim=72), "72"),
        (lambda: hf.Qwen3NextConfig(), "linear_attention"),
        (lambda: hf.Gemma3nTextConfig(), "shares K and V"),
    ],
)
def test_models_that_cannot_be_packed(config: Any, message: str) -> None:
    with pytest.raises((ValueError, GeometryError), match=message):
        SkvqHFCache(config(), PACKED)


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50)
    with pytest.raises(ValueError, match=r"num_attention_heads|stays"):
        SkvqHFCache(hf.MambaForCausalLM(config))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = SkvqHFCache(make_model("gemma3"), PACKED).plan
    with pytest.raises(PlanError, match=r"num_layers: 2 here, 3 in the plan(.|\n)*model_type"):
        SkvqHFCache(make_model("llama"), PACKED, plan)
