"""What an error in the output of a head costs: the Fisher information of the attention outputs.

The loss of a model whose attention outputs o are off by e grows by e · F · e / 2 nats, where
F = E[g · g^T] and g is the gradient of the log-likelihood of a token that the model itself drew
(the second-order expansion of the Kullback-Leibler divergence). It makes errors of different layers
and heads comparable, which is what a budget of bits is spent by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skvq_ext.calibrate.texts import CalibrationError
from skvq_ext.observe import Watcher, check_finite, check_seen, layer_of, observing

_BLOCK = 256  # tokens whose logits are in memory at once


class _Gradients(Watcher):
    """Sums g · g^T over tokens, per layer and query head."""

    def __init__(self, num_layers: int) -> None:
        self.sums: list[Tensor | None] = [None] * num_layers

    def see(self, module: Any, *rows: Tensor) -> None:
        index = layer_of(module, len(self.sums))
        for name, x in zip(("queries", "keys", "values"), rows, strict=True):
            check_finite(index, name, x)

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
    over tokens. Raises: ObservationError for attention that cannot be seen or holds NaN,
    CalibrationError where logits or gradients are not finite.
    """
    seen, dice = _Gradients(num_layers), torch.Generator().manual_seed(seed)
    with observing(model, seen), _recomputing(model):
        for done, ids in enumerate(segments):
            _backward(model, ids[None].to(model.device), dice)
            step(done + 1, len(segments))
    sums = [total for total in seen.sums if total is not None]
    check_seen([layer for layer, total in enumerate(seen.sums) if total is not None], num_layers)
    for layer, total in enumerate(sums):
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"layer {layer}: the gradients of its attention are not finite, so what its errors "
                "cost is not known. Run the model in float32 or bfloat16."
            )
    return [total / segments.numel() for total in sums]


def _backward(model: Any, ids: Tensor, dice: torch.Generator) -> None:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        read = model.get_decoder()(inputs_embeds=embedded, use_cache=False)
    top = read.last_hidden_state.detach().requires_grad_()
    for rows in torch.split(torch.arange(ids.shape[1], device=ids.device), _BLOCK):
        with torch.enable_grad():
            likely = _logits(model, read, top[:, rows]).float().log_softmax(-1)
            chances = likely.detach().exp().cpu()
            if not torch.isfinite(chances).all():
                raise CalibrationError(
                    "the logits of the model hold NaN or infinity on this text. Run it in float32 "
                    "or bfloat16, or check its weights."
                )
            drawn = torch.multinomial(chances, 1, generator=dice)
            likely.gather(-1, drawn.to(likely.device)).sum().backward()
    read.last_hidden_state.backward(top.grad)


def _logits(model: Any, read: Any, hidden: Tensor) -> Tensor:
    """Logits [n, vocab] of last hidden states [1, n, hidden_size].

    By the model's own code, because heads scale, cap and shift logits in ways no configuration
    tells. Args: read, what the decoder gave for the whole segment.
    """
    asked = []

    def told(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return type(read)(**(dict(read) | {"last_hidden_state": hidden}))

    with _forward_of(model.get_decoder(), told):
        found = getattr(model(inputs_embeds=hidden, use_cache=False), "logits", None)
    if not asked or found is None or found.shape[:2] != hidden.shape[:2]:
        raise CalibrationError(
            f"{type(model).__name__} does not compute its logits from what get_decoder() gives, so "
            "what errors cost it is not known. Use a causal language model of transformers 5."
        )
    logits: Tensor = found[0]
    return logits


@contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, `module` computes something else; a forward of its own comes back."""
    before = vars(module).get("forward")  # device maps and adapters put one there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """While inside, decoder layers keep their input only and compute again for the gradients."""

    def wrapped(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A GPU computes gradients in a thread of its own, which must see the same observer.
        here = copy_context()
        return checkpoint(partial(here.run, forward), *args, use_reentrant=False, **kwargs)

    with ExitStack() as replaced:
        for layer in getattr(model.get_decoder(), "layers", []):
            replaced.enter_context(_forward_of(layer, partial(wrapped, layer.forward)))
        yield
