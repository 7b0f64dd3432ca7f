"""What fitting the published method looks at: ranges of channels, and some rows of attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skvq_ext.geometry import Geometry
from skvq_ext.observe import Watcher, frozen, observing, output_projection
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.rope import Rope

CHUNK = 1024  # tokens of a forward, from position 0 on
SAMPLED_CHUNKS = 3  # whose rows are kept for the clip search
SAMPLED_QUERIES = 64  # of each of them


class FitError(ValueError):
    """A text or a model that the published method cannot be fitted to."""


@dataclass(frozen=True)
class Sample:
    """One stretch of text in one layer. k, v f32 [num_tokens, channels], k as it is quantized;
    queries f32 [num_q_heads, n, head_dim], after RoPE; at, int64 [n], their positions."""

    k: Tensor
    v: Tensor
    queries: Tensor
    at: Tensor


@dataclass
class LayerStatistics:
    """One layer. low, high: f32 [channels] of K and of V, over all tokens of the text.

    output f32 [hidden_size, num_q_heads * head_dim], W_o; scale, softcap (0 = none), learned_sinks
    f32 [num_q_heads] or None: what the layer's softmax is made of.
    """

    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    output: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    learned_sinks: Tensor | None = None


class _Collector(Watcher):
    """Fills `found` while a model runs; `sample_from`: whether the current chunk's rows are kept,
    and the first query position that counts."""

    def __init__(self, num_layers: int, rope: Rope | None) -> None:
        self.found = [LayerStatistics() for _ in range(num_layers)]
        self.sample_from: int | None = None
        self._rope = rope

    def see(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Args: query [1, Hq, T, D], key and value [1, H, T, D], after RoPE."""
        index, tokens = module.layer_idx, key.shape[2]
        k, v, layer = key[0].float(), value[0].float(), self.found[index]
        if self._rope is not None:
            k = self._rope.unrotate(k, torch.arange(tokens), index)
        rows = {"k": channels_of(k), "v": channels_of(v)}
        for name, x in rows.items():
            if not x.isfinite().all():
                raise FitError(
                    f"the {name.upper()} of layer {index} hold NaN or infinity on this text. Run "
                    "the model in float32 or bfloat16, or check its weights."
                )
            low, high = x.aminmax(dim=0)
            layer.low[name] = low.minimum(layer.low.get(name, low))
            layer.high[name] = high.maximum(layer.high.get(name, high))
        if self.sample_from is not None:
            at = torch.linspace(self.sample_from, tokens - 1, SAMPLED_QUERIES).long().unique()
            layer.samples.append(Sample(rows["k"], rows["v"], query[0, :, at].float(), at))
            _describe(layer, module, query.shape[1] * query.shape[3])


def channels_of(x: Tensor) -> Tensor:
    """[heads, tokens, head_dim] to [tokens, heads * head_dim]."""
    return x.transpose(0, 1).flatten(1)


def collect(
    model: Any, token_ids: Tensor, scheme: PublishedScheme, rope: Rope | None
) -> list[LayerStatistics]:
    """Runs a model over a text, CHUNK tokens at a time, each from position 0 on.

    As the original does, all tokens count, the first ones of a chunk included.

    Args: token_ids int64 [n] or [1, n]; rope, None where keys are quantized after RoPE.
    Raises: FitError where the text is too short, ObservationError for a model that cannot be seen.
    """
    ids = token_ids.reshape(-1)
    exact = scheme.sinks + scheme.window
    searched = scheme.clip is None
    least = exact + SAMPLED_QUERIES if searched else 1
    if token_ids.numel() != token_ids.shape[-1] or len(ids) < least:
        raise FitError(
            f"token_ids is {list(token_ids.shape)}: fitting reads one text of {least} tokens at "
            f"least{', of which many lie behind the window' if searched else ''}; a few thousand "
            "are better."
        )
    chunks = list(torch.split(ids, max(CHUNK, 2 * exact)))
    collector = _Collector(Geometry.from_config(model.config).num_layers, rope)
    # Spread over the text; the last chunk may be too short.
    usable = [index for index, chunk in enumerate(chunks) if len(chunk) >= least]
    step = max(1, len(usable) // SAMPLED_CHUNKS)
    sampled = set(usable[::step][:SAMPLED_CHUNKS]) if searched else set()
    with frozen(model), torch.no_grad(), observing(model, collector):
        for index, chunk in enumerate(chunks):
            collector.sample_from = exact if index in sampled else None
            model.base_model(input_ids=chunk[None].to(model.device), use_cache=False)
    missing = [index for index, layer in enumerate(collector.found) if not layer.low]
    if missing:
        raise FitError(
            f"layers {missing[:4]} never called the attention interface of transformers, so their "
            "keys cannot be seen. Use a decoder that attends through it."
        )
    return collector.found


def _describe(layer: LayerStatistics, module: Any, width: int) -> None:
    weight = output_projection(module, width, "Give one clip ratio, as in 'clip0.92'.")
    sinks = getattr(module, "sinks", None)
    layer.output = weight.float()
    layer.scale = float(getattr(module, "scaling", module.head_dim**-0.5))
    layer.softcap = float(getattr(module, "attn_logit_softcapping", None) or 0.0)
    layer.learned_sinks = None if sinks is None else sinks.detach().float()
