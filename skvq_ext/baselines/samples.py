"""Rows of a calibration text as attention sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skvq_ext.baselines.coding import BaselineError
from skvq_ext.geometry import Geometry
from skvq_ext.observe import Watcher, frozen, observing, output_projection

MAX_TOKENS = 4096
CHUNK = 1024  # tokens of a forward, each with positions from 0


@dataclass(frozen=True)
class LayerRows:
    """One layer's rows after RoPE, f32 on the CPU.

    q [num_q_heads, n, head_dim]; k, v [num_kv_heads, n, head_dim]; positions int64 [n]; output
    [num_kv_heads, head_dim], largest |W_o| that meets a channel of v; k_gradient, v_gradient like k
    and v, of the loss, where they were asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    output: Tensor
    k_gradient: Tensor | None = None
    v_gradient: Tensor | None = None


@dataclass
class _Layer:
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    k_gradient: list[Tensor] = field(default_factory=list)
    v_gradient: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None


class _Keeper(Watcher):
    """Keeps all rows behind the first `skip` of each call."""

    def __init__(self, num_layers: int, skip: int, sensitivity: bool) -> None:
        self.rows = [_Layer() for _ in range(num_layers)]
        self.skip, self.sensitivity = skip, sensitivity

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Args: query [1, Hq, T, D], key and value [1, H, T, D], after RoPE."""
        layer = self.rows[module.layer_idx]
        for name, x in (("q", query), ("k", key), ("v", value)):
            getattr(layer, name).append(self._cut(x))
        if self.sensitivity:
            for name, x in (("k_gradient", key), ("v_gradient", value)):
                kept = getattr(layer, name)
                x.register_hook(lambda gradient, kept=kept: kept.append(self._cut(gradient)))
        if layer.output is None:
            layer.output = _output(module, key.shape[1], query.shape[1], key.shape[3])

    def _cut(self, x: Tensor) -> Tensor:
        return x[0, :, self.skip :].detach().float().cpu()


def collect(
    model: Any,
    token_ids: Tensor,
    skip: int,
    max_tokens: int = MAX_TOKENS,
    sensitivity: bool = False,
) -> list[LayerRows]:
    """Runs a model over a text and keeps what its attention sees, per layer.

    Args: token_ids int64 [n] or [1, n]; skip, tokens at the start of each chunk that are left out,
    because sinks are never quantized; max_tokens of the text to read; sensitivity, whether
    gradients of the next token's loss are kept too.
    Raises: BaselineError for a text that is too short, ObservationError for a model that cannot be
    observed.
    """
    ids = token_ids.reshape(-1)[:max_tokens]
    chunks = [chunk for chunk in torch.split(ids, CHUNK) if len(chunk) > skip + 1]
    if token_ids.numel() != token_ids.shape[-1] or not chunks:
        raise BaselineError(
            f"token_ids is {list(token_ids.shape)}; calibration reads one text of more than "
            f"{skip + 1} tokens, and a few thousand are better."
        )
    keeper = _Keeper(Geometry.from_config(model.config).num_layers, skip, sensitivity)
    with frozen(model), observing(model, keeper), torch.set_grad_enabled(sensitivity):
        for chunk in chunks:
            _run(model, chunk[None].to(model.device), sensitivity)
    positions = torch.cat([torch.arange(skip, len(chunk)) for chunk in chunks])
    return [_joined(layer, positions, index) for index, layer in enumerate(keeper.rows)]


def _run(model: Any, ids: Tensor, sensitivity: bool) -> None:
    if not sensitivity:
        model.base_model(input_ids=ids, use_cache=False)
        return
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()


def _joined(layer: _Layer, positions: Tensor, index: int) -> LayerRows:
    if not layer.k or layer.output is None:
        raise BaselineError(f"layer {index} never called the attention interface of transformers.")
    q, k, v = (torch.cat(parts, dim=1) for parts in (layer.q, layer.k, layer.v))
    gradients = [
        torch.cat(parts, dim=1) if parts else None for parts in (layer.k_gradient, layer.v_gradient)
    ]
    return LayerRows(q, k, v, positions, layer.output, *gradients)


def _output(module: Any, heads: int, num_q_heads: int, dim: int) -> Tensor:
    weight = output_projection(module, num_q_heads * dim, "Choose a method that is not fitted.")
    largest: Tensor = weight.abs().amax(0).float().cpu()
    return largest.view(heads, -1, dim).amax(1)
