"""What an error in the output of a head costs: the Fisher information of the attention outputs.

The loss of a model whose attention outputs o are off by e grows by e · F · e / 2 nats, where
F = E[g · g^T] and g is the gradient of the log-likelihood of a token that the model itself drew
(the second-order expansion of the Kullback-Leibler divergence). It makes errors of different layers
and heads comparable, which is what a budget of bits is spent by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skvq_ext.calibrate.texts import CalibrationError
from skvq_ext.observe import Watcher, layer_of, observing

_BLOCK = 256  # tokens whose logits are in memory at once


class _Gradients(Watcher):
    """Sums g · g^T over tokens, per layer and query head."""

    def __init__(self, num_layers: int) -> None:
        self.sums: list[Tensor | None] = [None] * num_layers

    def attended(
        self, module: Any, rows: tuple[Tensor, Tensor, Tensor], out: Tensor, options: dict[str, Any]
    ) -> None:
        if out.requires_grad:
            index = layer_of(module, len(self.sums))
            out.register_hook(partial(self._add, index))

    def _add(self, layer: int, gradient: Tensor) -> None:
        rows = gradient.flatten(0, 1).transpose(0, 1).float()  # [Hq, tokens, D]
        product = (rows.mT @ rows).double().cpu()
        before = self.sums[layer]
        self.sums[layer] = product if before is None else before + product


def fisher(
    model: Any, segments: Tensor, num_layers: int, seed: int, step: Callable[[int, int], None]
) -> list[Tensor]:
    """F of every layer, one segment at a time, in the memory of one layer's graph.

    Args: model, frozen by the caller; segments, int64 [n, tokens]; seed of the drawn tokens; step,
    called with (segments done, segments). Returns: f64 [num_q_heads, head_dim, head_dim] each, mean
    over tokens. Raises: CalibrationError where gradients are not finite or do not arrive.
    """
    seen, dice = _Gradients(num_layers), torch.Generator().manual_seed(seed)
    with observing(model, seen), _recomputing(model):
        for done, ids in enumerate(segments):
            _backward(model, ids[None].to(model.device), dice)
            step(done + 1, len(segments))
    tokens, found = segments.numel(), []
    for layer, total in enumerate(seen.sums):
        if total is None or not torch.isfinite(total).all():
            raise CalibrationError(
                f"layer {layer}: the gradients of its attention are "
                f"{'missing' if total is None else 'not finite'}, so what its errors cost is not "
                "known. Run the model in float32, with an attention of transformers' interface."
            )
        found.append(total / tokens)
    return found


def _backward(model: Any, ids: Tensor, dice: torch.Generator) -> None:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    top = hidden.detach().requires_grad_()
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    for rows in torch.split(torch.arange(ids.shape[1], device=ids.device), _BLOCK):
        with torch.enable_grad():
            logits = model.get_output_embeddings()(top[0, rows]).float()
            logits = cap * torch.tanh(logits / cap) if cap else logits
            likely = logits.log_softmax(-1)
            drawn = torch.multinomial(likely.detach().exp().cpu(), 1, generator=dice)
            likely.gather(-1, drawn.to(likely.device)).sum().backward()
    hidden.backward(top.grad)


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """While inside, decoder layers keep their input only and compute again for the gradients."""
    layers = list(getattr(model.base_model, "layers", []))

    def wrapped(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A GPU computes gradients in a thread of its own, which must see the same observer.
        here = copy_context()
        return checkpoint(partial(here.run, forward), *args, use_reentrant=False, **kwargs)

    for layer in layers:
        layer.forward = partial(wrapped, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the method of its class comes back
