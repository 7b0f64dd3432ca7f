"""Watching attention changes nothing; what cannot be watched is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import make_model, make_tokens
from torch import Tensor

from skvq_ext.observe import (
    ObservationError,
    Watcher,
    check_finite,
    check_seen,
    layer_of,
    observing,
    output_projection,
)


class _Keeper(Watcher):
    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...]]] = []
        self.outs: list[Tensor] = []
        self.options: list[dict[str, Any]] = []

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        assert key.shape == value.shape
        self.seen.append((module.layer_idx, tuple(query.shape)))

    def attended(self, module: Any, rows: Any, out: Tensor, options: dict[str, Any]) -> None:
        self.outs.append(out)
        self.options.append(options)


@pytest.mark.parametrize(
    ("kind", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")]
)
def test_observing_changes_nothing_in_the_model(kind: str, implementation: str) -> None:
    model, ids = make_model(kind), make_tokens(50)
    model.set_attn_implementation(implementation)
    watcher, layers = _Keeper(), model.config.num_hidden_layers
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with observing(model, watcher):
            assert torch.equal(model(input_ids=ids).logits, plain)
        assert torch.equal(model(input_ids=ids).logits, plain)
        with observing(model, Watcher()):
            assert torch.equal(model(input_ids=ids).logits, plain)
    assert watcher.seen == [(layer, (1, 4, 50, 64)) for layer in range(layers)]
    assert all(out.shape == (1, 50, 4, 64) for out in watcher.outs)
    assert all(options["scaling"] == 64**-0.5 for options in watcher.options)
    assert model.config._attn_implementation == implementation


def test_the_model_is_given_back_after_an_error() -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), observing(model, Watcher()):
        raise KeyError
    assert model.config._attn_implementation == before


def test_what_cannot_be_watched() -> None:
    module = torch.nn.Module()
    for index in (None, "1", 2):
        module.layer_idx = index
        with pytest.raises(ObservationError, match="Module has no usable layer_idx"):
            layer_of(module, 2)
    check_seen({1, 0}, 2)
    with pytest.raises(ObservationError, match=r"layers \[1, 2\] of 3 never called"):
        check_seen([0], 3)
    check_finite(0, "keys", torch.ones(3))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ObservationError, match="the keys of layer 7 hold NaN or infinity"):
            check_finite(7, "keys", torch.tensor([0.0, bad]))


def test_output_projection() -> None:
    attention = torch.nn.Module()
    with pytest.raises(ObservationError, match=r"Module needs an output .* found none. Wait."):
        output_projection(attention, 256, "Wait.")
    attention.o_proj = torch.nn.Linear(128, 256)
    with pytest.raises(ObservationError, match=r"\[hidden_size, 256\] .*found .*\[256, 128\]"):
        output_projection(attention, 256, "")
    attention.o_proj = torch.nn.Linear(256, 128)
    assert torch.equal(output_projection(attention, 256, ""), attention.o_proj.weight)
