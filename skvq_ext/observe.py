"""Streaming statistics of what attention sees: post-RoPE keys and queries, and values."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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


@dataclass
class Moments:
    """Sums over tokens of one tensor in one layer, per head and channel, and some of its rows."""

    count: int = 0
    total: Tensor | float = 0.0  # f64 [H, D]
    squares: Tensor | float = 0.0  # f64 [H, D]
    rows: list[Tensor] = field(default_factory=list)  # f32 [n, H, D] each

    def add(self, x: Tensor, sampled: Tensor) -> None:
        """x [H, num_tokens, D]; sampled, int64 positions of the tokens to keep as rows."""
        wide = x.double()
        self.count += x.shape[1]
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)
        self.rows.append(x[:, sampled].transpose(0, 1).float().cpu())

    def mean(self) -> Tensor:
        """f64 [H, D]."""
        return torch.as_tensor(self.total) / self.count

    def power(self) -> Tensor:
        """Mean square, f64 [H, D]."""
        return torch.as_tensor(self.squares) / self.count

    def sample(self) -> Tensor:
        """The rows that were kept, f32 [n, H, D]."""
        return torch.cat(self.rows)


@dataclass
class LayerStatistics:
    """What calibration knows about one layer; queries are summed over the heads of a KV head."""

    k: Moments = field(default_factory=Moments)
    v: Moments = field(default_factory=Moments)
    q: Moments = field(default_factory=Moments)
    output_energy: Tensor | None = None  # f64 [H, D], squares of the W_o columns a value meets


class Watcher:
    """Sees every attention call of a model; `observing` calls it. Does nothing by itself."""

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Before a call: query [B, Hq, T, D], key and value [B, H, T, D], after RoPE."""

    def attended(
        self, module: Any, rows: tuple[Tensor, Tensor, Tensor], out: Tensor, options: dict[str, Any]
    ) -> None:
        """After a call. rows: query, key and value as `see` gets them; out [B, T, Hq, D]; options,
        keyword arguments of the call in the protocol of transformers.AttentionInterface."""


class Observer(Watcher):
    """Collects statistics while a model runs; the first `skip` tokens of a call do not count."""

    def __init__(self, num_layers: int, skip: int, *, output_energy: bool = True) -> None:
        """Args: skip, tokens at the start of each call; output_energy, whether W_o is looked at."""
        self.layers = [LayerStatistics() for _ in range(num_layers)]
        self.sampled = torch.zeros(0, dtype=torch.int64)  # positions of the current call
        self._skip, self._output_energy = skip, output_energy

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One attention call: query [1, Hq, T, D], key and value [1, H, T, D], after RoPE."""
        index = layer_of(module, len(self.layers))
        layer, (heads, _, dim) = self.layers[index], key.shape[1:]
        keep = self.sampled.to(key.device)
        for name, moments, x in (("keys", layer.k, key), ("values", layer.v, value)):
            check_finite(index, name, x)
            moments.add(x[0, :, self._skip :], keep)
        check_finite(index, "queries", query)
        grouped = query[0, :, self._skip :].reshape(heads, -1, dim)
        layer.q.add(grouped, keep[:0])
        if self._output_energy and layer.output_energy is None:
            layer.output_energy = output_energy(module, index, query.shape[1], heads, dim)

    def check_complete(self) -> None:
        """Raises ObservationError where a layer's attention was never called."""
        seen = [index for index, layer in enumerate(self.layers) if layer.k.count]
        check_seen(seen, len(self.layers))


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


def output_energy(module: Any, layer: int, num_q_heads: int, heads: int, dim: int) -> Tensor:
    """Per KV head and channel, the squares of the output projection's columns it is read by."""
    found = [getattr(module, name) for name in _OUTPUT_PROJECTIONS if hasattr(module, name)]
    weight = getattr(found[0], "weight", None) if found else None
    if weight is None:
        raise ObservationError(
            f"layer {layer}: {type(module).__name__} has no output projection under any of the "
            f"names {', '.join(_OUTPUT_PROJECTIONS)}, so values cannot be balanced. Leave "
            "'balance' out of the scheme."
        )
    if not weight.is_floating_point() or weight.dim() != 2 or weight.shape[1] != num_q_heads * dim:
        raise ObservationError(
            f"layer {layer}: the output projection is {weight.dtype} {list(weight.shape)}; "
            f"expected floating point [hidden_size, {num_q_heads * dim}]. Load the model with its "
            "weights dequantized, or leave 'balance' out of the scheme."
        )
    energy: Tensor = weight.detach().double().square().sum(0)
    return energy.view(heads, -1, dim).sum(1)
