"""Errors of attention per layer and head, all layers on the hidden states of full precision.

The model runs with a method's own cache and attention. In every layer the exact output is computed
beside it, from exact keys and values kept apart, and it is the exact output that goes on: errors do
not add up over layers, and what is seen is what each layer does by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skvq_ext.evaluate.keys import read_logits, scaled_dots
from skvq_ext.evaluate.method import Method
from skvq_ext.evaluate.result import Grid, LayersResult, MethodLayers
from skvq_ext.evaluate.subject import (
    READING,
    Count,
    EvaluationError,
    Passage,
    Subject,
    chunks,
    opened,
)
from skvq_ext.geometry import Geometry
from skvq_ext.hf import exact

# Every so many tokens the logits of one query are looked at; prime, so that it is done with tiles
# that are as good as empty as often as with tiles that are nearly full.
PROBE = 31


def measure_layers(subject: Subject, passage: Passage, tokens: int) -> LayersResult:
    """Errors of every method's attention on the first tokens of a passage.

    Args: tokens that are read; the queries of the second half are compared.
    Raises: EvaluationError where the passage is too short or an output is not finite.
    """
    check_layers(subject, passage, tokens)
    ids = passage.ids[:, :tokens]
    count = subject.counter("layers", len(subject.methods) * tokens)
    methods = tuple(_measure(subject, method, ids, count) for method in subject.methods)
    protocol = (
        f"{tokens} tokens of {passage.name}; the queries of the second half are compared. In every "
        "layer the method's own cache and attention get the queries, keys and values of full "
        f"precision, whose output goes on to the next layer. {READING} Output: root mean square of "
        "the error over that of the exact output, per query head; cosine: mean over tokens. "
        "Logits: mean absolute error of scaled q . k, before softcap, over all keys that a query "
        f"sees, for one query in {PROBE}."
    )
    return LayersResult(protocol, tokens, methods)


def check_layers(subject: Subject, passage: Passage, tokens: int) -> None:
    """Raises EvaluationError for what `measure_layers` cannot do."""
    if tokens < 2 * PROBE:
        raise EvaluationError(f"{tokens} tokens are too few for layers; take {2 * PROBE} or more.")
    if passage.ids.shape[1] < tokens:
        raise EvaluationError(
            f"{passage.name} has {passage.ids.shape[1]} tokens, fewer than the {tokens} that layers "
            "are compared on. Ask for fewer or give a longer text."
        )
    subject.check_room(tokens, "the comparison of layers")


@torch.inference_mode()
def _measure(subject: Subject, method: Method, ids: Tensor, count: Count) -> MethodLayers:
    tokens = ids.shape[1]
    with subject.timed("layers", method), opened(subject.model, method) as cache:
        twin = _Twin(subject.model, cache, first=tokens // 2)
        with twin.watching():
            for block in chunks(tokens, PROBE):  # so that forwards end where logits are looked at
                for part in chunks(block.stop - block.start, min(method.chunk, PROBE)):
                    inputs = ids[:, block][:, part]
                    subject.model(input_ids=inputs, past_key_values=cache, use_cache=True)
                    count(inputs.shape[1])
    return twin.summary(method.name)


class _Twin:
    """Runs the exact attention of every layer beside a method's and keeps the books."""

    def __init__(self, model: Any, cache: Any, first: int) -> None:
        """Args: first, position from which on queries are compared."""
        geometry = Geometry.from_config(model.config)
        shape = (geometry.num_layers, geometry.num_q_heads)
        self._model, self._cache, self._first = model, cache, first
        self._windows = geometry.sliding_windows or (0,) * geometry.num_layers
        self._rows: list[tuple[Tensor, Tensor] | None] = [None] * geometry.num_layers
        self._error, self._power, self._cosine, self._logits = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(4)
        )
        self._queries = torch.zeros(geometry.num_layers)
        self._pairs = torch.zeros(geometry.num_layers)  # of query and key, of each head
        self._readable = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, keys and values are taken down and every attention call is compared."""
        name = self._model.config.get_text_config(decoder=True)._attn_implementation
        update = self._cache.update
        theirs = ALL_ATTENTION_FUNCTIONS.get(name)  # None: "eager", every model file has its own

        def seen_update(keys: Tensor, values: Tensor, layer: int, *args: Any, **kw: Any) -> Any:
            self._remember(layer, keys, values)
            return update(keys, values, layer, *args, **kw)

        def both(module: Any, query: Tensor, key: Tensor, *args: Any, **kw: Any) -> Any:
            inner = theirs or sys.modules[type(module).__module__].eager_attention_forward
            return self._both(inner, module, query, key, *args, **kw)

        self._cache.update = seen_update
        ALL_ATTENTION_FUNCTIONS[name] = both
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
            del self._cache.update

    def _remember(self, layer: int, keys: Tensor, values: Tensor) -> None:
        old = self._rows[layer]
        new = (
            (keys, values)
            if old is None
            else (
                torch.cat([old[0], keys], 2),
                torch.cat([old[1], values], 2),
            )
        )
        self._rows[layer] = new

    def _both(
        self,
        inner: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The method's attention, compared; returns the exact output [1, columns, Hq, D]."""
        layer = module.layer_idx
        found, *rest = inner(module, query, key, value, attention_mask, **kwargs)
        rows = self._rows[layer]
        if rows is None:
            raise EvaluationError(
                f"layer {layer} attends without giving its keys to a cache; layers of such a model "
                "cannot be compared. Leave 'layers' out."
            )
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = self._exact(layer, query, rows, scale, kwargs)
        total, columns = rows[0].shape[2], query.shape[2]
        if total > self._first:
            new = slice(max(0, columns - (total - self._first)), None)
            self._compare(layer, found[0, new].float(), out[0, new])
            if total % PROBE == 0:
                self._compare_logits(layer, query[0, :, -1], key, rows[0][0], scale)
        return out.to(query.dtype), *rest

    def _exact(
        self,
        layer: int,
        query: Tensor,
        rows: tuple[Tensor, Tensor],
        scale: float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Attention over exact rows in float32, [1, columns, num_q_heads, head_dim]."""
        sinks = kwargs.get("s_aux")
        how = exact.Softmax(
            scale, kwargs.get("softcap") or 0.0, None if sinks is None else sinks.float()
        )
        columns, total = query.shape[2], rows[0].shape[2]
        key_at = torch.arange(total, device=query.device)
        age = key_at[total - columns :, None] - key_at
        seen = (age >= 0) & (age < (self._windows[layer] or total))
        k, v = (x.float() for x in rows)
        return exact.masked(query.float(), k, v, seen[None, None], how, 0.0)

    def _compare(self, layer: int, found: Tensor, out: Tensor) -> None:
        """Args: f32 [n, num_q_heads, head_dim], the method's and the exact one."""
        if not found.isfinite().all():
            raise EvaluationError(
                f"the attention output of layer {layer} holds NaN or infinity. Run the model in "
                "float32 or bfloat16; if full precision is fine, this method overflows."
            )
        found, out = found.double(), out.double()
        self._error[layer] += (found - out).square().sum((0, 2)).cpu()
        self._power[layer] += out.square().sum((0, 2)).cpu()
        self._cosine[layer] += cosine_similarity(found, out, dim=-1).sum(0).cpu()
        self._queries[layer] += found.shape[0]

    def _compare_logits(
        self, layer: int, query: Tensor, returned: Tensor, keys: Tensor, scale: float
    ) -> None:
        """Args: query [num_q_heads, D] of the newest token; keys [num_kv_heads, n, D], exact."""
        total = keys.shape[1]
        seen = min(total, self._windows[layer] or total)
        found = read_logits(self._cache, layer, returned, query, scale, seen)
        if found is None:
            self._readable = False
            return
        error = (found - scaled_dots(query, keys[:, -seen:], scale)).abs()
        self._logits[layer] += error.double().sum(-1).cpu()
        self._pairs[layer] += seen

    def summary(self, method: str) -> MethodLayers:
        """What was found. Raises: EvaluationError where a layer never attended."""
        silent = (self._queries == 0).nonzero()[:, 0].tolist()
        if silent:
            raise EvaluationError(
                f"layers {silent[:4]} never called the attention interface of transformers, so "
                "they cannot be compared. Leave 'layers' out for this model."
            )
        return MethodLayers(
            method,
            _grid(self._logits / self._pairs[:, None]) if self._readable else None,
            _grid((self._error / self._power.clamp(min=1e-300)).sqrt()),
            _grid(self._cosine / self._queries[:, None]),
        )


def _grid(x: Tensor) -> Grid:
    return tuple(tuple(row) for row in x.tolist())
