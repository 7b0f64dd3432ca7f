"""Specs of baselines: what they mean, how they are written, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from hf_models import make_model, make_tokens

from skvq_ext.baselines.coding import BaselineError
from skvq_ext.baselines.registry import NAMES, build
from skvq_ext.evaluate.method import Packed
from skvq_ext.geometry import GeometryError
from skvq_ext.perplexity import score


def test_names_show_every_key_with_its_default() -> None:
    model, text = make_model("llama"), make_tokens(300)
    for name, line in NAMES.items():
        written = line.rpartition("; ")[2]
        assert "\n" not in line and written.startswith(f"{name}:")
        assert build(name, model, text).name == build(written, model, text).name == written


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("KIVI: k4 w64, sink0 ", "kivi:k4-v4-g32-w64-sink0-fp16"),
        ("int_hadamard:v2", "int-hadamard:k4-v2-g32-w128-sink5"),
        ("saliency:k8/3-high12.5", "saliency:k8/3-v8/3-w128-sink5-high12.5-probe10"),
        ("gear:rank4", "gear:k2-v2-g32-w128-sink5-rank4-outliers2-block64-fp16"),
    ],
)
def test_specs_are_read_in_any_spelling(spec: str, name: str) -> None:
    assert build(spec, make_model("llama")).name == name


def test_rtn_is_packed_where_the_format_holds_it() -> None:
    model = make_model("llama")
    packed = build("rtn:k2-v1.5-g32-w100-sink2", model)
    assert isinstance(packed, Packed) and packed.packed
    assert str(packed.scheme) == "k2-v1.5-g32-w100-sink2-fp8-identity"
    assert packed.name == "rtn:k2-v1.5-g32-w100-sink2-fp8"
    for spec in ("rtn:g16", "rtn:w0"):
        assert not build(spec, model).packed


def test_equal_seeds_give_equal_methods() -> None:
    model, text, ids = make_model("llama"), make_tokens(400, seed=3), make_tokens(200)
    for spec in ("rptq:g32-w20", "kvquant:w20"):
        scores = [
            score(model, ids, method.cache(model), chunk=method.chunk).losses
            for method in (build(spec, model, text, seed=7) for _ in range(2))
        ]
        assert torch.equal(*scores)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kiwi:k2", "unknown baseline 'kiwi' in 'kiwi:k2'; nearest: 'kivi'. Known: rtn, "),
        (
            "kivi:k2-rank4",
            "'kivi:k2-rank4': unknown key 'rank4'; known: k, v, w, sink, g, fp16|fp8",
        ),
        ("kivi:k5", "'k5': k is one of 8, 4, 3, 2, 1.5"),
        ("saliency:k2/4", "'k2/4': k is one of 8/4, "),
        ("kivi:k2-k3", "'k3': 'k' is given twice"),
        ("kivi:fp8-fp16", "'fp16': 'meta' is given twice"),
        ("kivi:w1.5", "'w1.5': needs a whole number"),
        ("oscar:kclip", "'kclip': needs a number"),
        ("kivi:2", "unknown key '2'"),
        ("kivi:g48", "g48: groups of 48 do not divide the tokens of a tile, 64"),
        ("rtn:g40", "g40: groups of 40 do not divide head_dim 64"),
        ("rptq:g48", "g48: groups of 48 do not divide the channels of a token, or of a head, 128"),
        ("gear:rank65", "rank65: the rank is at most 64"),
        ("gear:outliers100", "outliers100: give a percentage below 100"),
        ("gear:block32", "tile must be 64 or more, got 32"),
        ("kvquant:outliers100", "outliers100: give a percentage below 100"),
        ("saliency:high0", "high0: give a percentage above 0"),
        ("saliency:probe101", "probe101: give a percentage above 0"),
        ("oscar:vclip1.5", "vclip1.5: a quantile lies in 0 .. 1"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: str, message: str) -> None:
    with pytest.raises(BaselineError, match=re.escape(message)):
        build(spec, make_model("llama"), make_tokens(300))


@pytest.mark.parametrize("name", ["smoothquant", "rptq", "kvquant", "oscar"])
def test_what_is_calibrated_asks_for_a_text(name: str) -> None:
    model = make_model("llama")
    with pytest.raises(BaselineError, match="give token_ids"):
        build(name, model)
    with pytest.raises(BaselineError, match=r"\[1, 6\].* more than 6 tokens"):
        build(name, model, make_tokens(6))


def test_heads_that_do_not_suit_a_method() -> None:
    import transformers as hf

    sizes = {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 48}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=97, intermediate_size=64, num_hidden_layers=1, **sizes)
    )
    with pytest.raises(BaselineError, match=r"head_dim 48: llama\.cpp rotates"):
        build("int-hadamard:g16", model)
    with pytest.raises(BaselineError, match="head_dim 48: OSCAR"):
        build("oscar:g16", model, make_tokens(100))
    assert not build("rtn:g16", model).packed
    model.config.kv_lora_rank = 4
    with pytest.raises(GeometryError, match="MLA"):
        build("kivi:g16", model)
