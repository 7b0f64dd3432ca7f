"""Watching what attention sees: queries and keys after RoPE, values, and what comes out."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "skvq_observe"
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj")


class ObservationError(ValueError):
    """A model whose attention cannot be observed, or that computes NaN."""


class Watcher:
    """Sees every attention call of a model; `observing` calls it. Does nothing by itself."""

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Before a call: query [B, Hq, T, D], key and value [B, H, T, D], after RoPE."""

    def attended(
        self, module: Any, rows: tuple[Tensor, Tensor, Tensor], out: Tensor, options: dict[str, Any]
    ) -> None:
        """After a call. rows: query, key and value as `see` gets them; out [B, T, Hq, D]; options,
        keyword arguments of the call in the protocol of transformers.AttentionInterface."""


def layer_of(module: Any, num_layers: int) -> int:
    """The layer an attention module belongs to. Raises: ObservationError where it does not say."""
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or index >= num_layers:
        raise ObservationError(
            f"{type(module).__name__} has no usable layer_idx (found {index!r}): its keys "
            "cannot be told apart by layer. Calibration needs a decoder of transformers 5."
        )
    return index


_ACTIVE: ContextVar[tuple[Watcher, str] | None] = ContextVar("skvq_observer", default=None)


@contextmanager
def observing(model: Any, observer: Watcher) -> Iterator[None]:
    """While inside, the model's attention reports to `observer` and computes what it always did."""
    config = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    token = _ACTIVE.set((observer, usual))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _ACTIVE.reset(token)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """While inside, the model is in evaluation mode and its weights want no gradients."""
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    active = _ACTIVE.get()
    assert active is not None, "registered for the time of an observation only"
    observer, usual = active
    observer.see(module, query, key, value)
    if usual == "eager":  # every model file has its own
        inner = sys.modules[type(module).__module__].eager_attention_forward
    else:
        inner = ALL_ATTENTION_FUNCTIONS[usual]
    out, weights = inner(module, query, key, value, *args, **kwargs)
    observer.attended(module, (query, key, value), out, kwargs)
    return out, weights


def check_finite(layer: int, name: str, x: Tensor) -> None:
    """Raises ObservationError where x holds NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ObservationError(
            f"the {name} of layer {layer} hold NaN or infinity. The model overflows on this text; "
            "run it in float32 or bfloat16, or check its weights."
        )


def check_seen(layers: Collection[int], num_layers: int) -> None:
    """Raises ObservationError where a layer is not among those whose attention was seen."""
    missing = [index for index in range(num_layers) if index not in layers]
    if missing:
        raise ObservationError(
            f"layers {missing[:4]} of {num_layers} never called the attention interface "
            "of transformers, so their keys cannot be observed. Use a decoder model that "
            "supports attn_implementation='sdpa' or 'eager' through that interface."
        )


def output_projection(module: Any, width: int, remedy: str) -> Tensor:
    """W_o of an attention module, [hidden_size, width].

    Args: width, num_q_heads * head_dim; remedy, what the user can do where there is none.
    Raises: ObservationError where none of the usual names holds such a matrix.
    """
    found = [getattr(module, name) for name in _OUTPUT_PROJECTIONS if hasattr(module, name)]
    weight = getattr(found[0], "weight", None) if found else None
    usable = weight is not None and weight.is_floating_point() and weight.dim() == 2
    if weight is None or not usable or weight.shape[1] != width:
        what = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise ObservationError(
            f"{type(module).__name__} needs an output projection [hidden_size, {width}] under one of "
            f"the names {', '.join(_OUTPUT_PROJECTIONS)}; found {what}. {remedy}"
        )
    matrix: Tensor = weight.detach()
    return matrix
