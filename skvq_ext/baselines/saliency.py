"""Salient tokens get more bits: ZipCache, and the idea of "No Token Left Behind".

Sources: arXiv 2405.14256 and its repository: saliency of a token = mean attention it gets from the
queries that could see it ("normalized attention score"), of which a few ("probe tokens") suffice;
K per channel, V "channel-separable" per token after division by sqrt(max|channel|), salient and
other tokens apart. arXiv 2402.18096: less important tokens keep low bits instead of being dropped.
This is the filter rule that SKVQ leaves open (heavy hitters), decided once, when a tile leaves the
window. ZipCache decides over the whole cache again every 100 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skvq_ext.baselines.coding import (
    CODE_BITS,
    META_BITS,
    VALUE_BITS,
    BaselineError,
    Coded,
    Seen,
    across_heads,
    kept,
    per_head,
    uniform,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, widths
from skvq_ext.evaluate.method import Method
from skvq_ext.format import TILE_TOKENS
from skvq_ext.hf.exact import Softmax

_META = "fp16"
_STEP = 0.6180339887498949  # golden ratio: multiples of it, modulo 1, spread evenly
_PAIRS = tuple(f"{high}/{low}" for high in "843" for low in "432" if high > low)


@dataclass(frozen=True)
class SaliencyOptions(Options):
    """k, v: formats of salient and other tokens; high: percent that is salient; probe: percent of
    the queries that are looked at."""

    k: str = widths(*_PAIRS, default="4/2")
    v: str = widths(*_PAIRS, default="")
    high: float = 20.0
    probe: float = 10.0


@dataclass
class _Attended:
    """What tokens of one layer got so far, f64 [kv_len]: attention, and queries that saw them."""

    weight: Tensor
    queries: Tensor


@dataclass
class Saliency:
    """The quantizer of one cache; count: salient tokens of a tile."""

    k: tuple[str, str]
    v: tuple[str, str]
    count: int
    probe: float
    layers: dict[int, _Attended] = field(default_factory=dict)

    def watch(self, layer: int, seen: Seen) -> None:
        """Adds what the probe queries among these attend to."""
        positions = torch.arange(seen.first, seen.first + seen.query.shape[1])
        rows = ((positions * _STEP) % 1.0 < self.probe).to(seen.query.device)
        known = self._attended(layer, seen.keys)
        visible = seen.visible[rows]
        known.weight += (
            attention_weights(seen.query[:, rows], seen, visible).double().mean(0).sum(0)
        )
        known.queries += visible.double().sum(0)

    def code(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Coded, Coded]:
        """See `Quantizer`. One bit per token says which kind it is; it is counted with the keys."""
        salient = self.salient(layer, start, k.shape[1]).to(k.device)
        k_values, v_values = torch.empty_like(k), torch.empty_like(v)
        k_bits, v_bits = float(k.shape[1]), 0.0
        for index, some in enumerate((salient, ~salient)):
            if some.any():
                coded = per_channel(k[:, some], self.k[index])
                k_values[:, some], k_bits = coded.values, k_bits + coded.bits
                coded = separable(v[:, some], self.v[index])
                v_values[:, some], v_bits = coded.values, v_bits + coded.bits
        return Coded(k_values, k_bits), Coded(v_values, v_bits)

    def salient(self, layer: int, start: int, tokens: int) -> Tensor:
        """Which of these tokens are salient, bool [tokens]; ties go to the older."""
        known = self.layers[layer]
        place = slice(start, start + tokens)
        mean = known.weight[place] / known.queries[place].clamp(min=1.0)
        chosen = torch.zeros(tokens, dtype=torch.bool)
        chosen[mean.cpu().argsort(descending=True, stable=True)[: self.count]] = True
        return chosen

    def _attended(self, layer: int, keys: Tensor) -> _Attended:
        known = self.layers.get(layer)
        held = 0 if known is None else len(known.weight)
        fresh = torch.zeros(keys.shape[1] - held, dtype=torch.float64, device=keys.device)
        if known is None:
            known = _Attended(fresh, fresh.clone())
        else:
            known = _Attended(torch.cat([known.weight, fresh]), torch.cat([known.queries, fresh]))
        self.layers[layer] = known
        return known


def attention_weights(query: Tensor, seen: Seen, visible: Tensor) -> Tensor:
    """The probabilities of attention, f32 [num_q_heads, n, kv_len].

    Args: query [num_q_heads, n, head_dim], some of `seen.query`; visible bool [n, kv_len].
    """
    how = Softmax(seen.scale, seen.softcap)
    group = query.shape[0] // seen.keys.shape[0]
    keys = seen.keys.float().repeat_interleave(group, 0)
    logits = how.cap(query.float() @ keys.mT * how.scale).masked_fill(~visible, -torch.inf)
    if seen.learned_sinks is None:
        return logits.softmax(-1)
    sinks = seen.learned_sinks.float()[:, None, None].expand(-1, query.shape[1], 1)
    return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]


def per_channel(x: Tensor, width: str) -> Coded:
    """All tokens of a channel share a scale and a zero. Args: x f32 [H, tokens, D]."""
    values, bits = uniform(x.mT, width, _META)
    return Coded(values.mT, bits)


def separable(x: Tensor, width: str) -> Coded:
    """Channel-separable per token: all channels of a token share a scale and a zero, after each was
    divided by the root of its largest magnitude (arXiv 2405.14256).

    Args: x f32 [H, tokens, D].
    """
    divisor = kept(x.abs().amax(1, keepdim=True).clamp(min=1e-4).sqrt())
    values, bits = uniform(across_heads(x / divisor), width, _META)
    return Coded(per_head(values, len(x)) * divisor, bits + divisor.numel() * VALUE_BITS)


def build(options: SaliencyOptions, source: Source) -> Method:
    """Needs no calibration."""
    for name, value in (("high", options.high), ("probe", options.probe)):
        if not 0.0 < value <= 100.0:
            raise BaselineError(f"{name}{value:g}: give a percentage above 0.")
    count = round(options.high / 100 * TILE_TOKENS)
    k, v = (_pair(text) for text in (options.k, options.v))
    hidden = source.geometry.num_kv_heads * source.geometry.head_dim
    kinds = (count > 0) + (count < TILE_TOKENS)  # of tokens that occur
    deviations = (
        f"{count} of {TILE_TOKENS} tokens at high bits, chosen once by {options.probe:g} % of the "
        "queries; K per channel, V channel-separable per token"
    )
    k_bits = _mean(k, count) + kinds * 2 * META_BITS[_META] / TILE_TOKENS + 1 / hidden
    v_bits = _mean(v, count) + 2 * META_BITS[_META] / hidden + kinds * VALUE_BITS / TILE_TOKENS
    return Simulated.of(
        "saliency",
        options,
        average(k_bits, v_bits),
        lambda: Saliency(k, v, count, options.probe / 100),
        deviations,
    )


def _pair(text: str) -> tuple[str, str]:
    high, low = text.split("/")
    return high, low


def _mean(pair: tuple[str, str], count: int) -> float:
    high, low = (CODE_BITS[width] for width in pair)
    return (high * count + low * (TILE_TOKENS - count)) / TILE_TOKENS
