"""KVQuant: uneven levels made offline, keys per channel before RoPE, outliers kept apart.

Source: arXiv 2401.18079 and its repository (quant/kvquant/simquant_module_quantizer.py). Keys: each channel
has a range from calibration (quantiles), numbers outside are outliers. Values: each token has its
range, with as many of its largest and smallest numbers kept apart. Levels ("nuq"): K-Means of one
dimension over all numbers of a layer after their range is divided out, weighted by the square of
the loss's gradient; at 2 bits their mean and deviation are corrected (Q-Norm). KVQuant keeps the
first token exact; here the sinks and the window are those of all methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from skvq_ext.baselines.coding import (
    INDEX_BITS,
    VALUE_BITS,
    BaselineError,
    Coded,
    Pair,
    across_heads,
    ends_of,
    extremes,
    kept,
    per_head,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, widths, words
from skvq_ext.baselines.samples import LayerRows
from skvq_ext.evaluate.method import Method

_COUNT_BITS = 16  # how many outliers of K a token has
_SAMPLES = 20_000  # numbers of a layer that the levels are fitted to
_FLAT = 1e-6  # a range below is a constant


@dataclass(frozen=True)
class KvQuantOptions(Options):
    """outliers: percent of the numbers kept apart; fisher or plain: whether levels are weighted by
    gradients; pre or post: keys before or after RoPE."""

    k: str = widths("4", "3", "2", default="3")
    v: str = widths("4", "3", "2", default="")
    outliers: float = 1.0
    weights: str = words("fisher", "plain")
    rope: str = words("pre", "post")


@dataclass(frozen=True)
class Levels:
    """Uneven levels in -1 .. 1: numbers go to the nearest of `edges`, and are read as `values`,
    which differ from them after Q-Norm; f32 [levels], ascending."""

    edges: Tensor
    values: Tensor

    def round(self, x: Tensor) -> Tensor:
        """Args: x f32, any shape. Returns: like x."""
        middles = ((self.edges[1:] + self.edges[:-1]) / 2).to(x.device)
        return self.values.to(x.device)[torch.bucketize(x.contiguous(), middles)]


@dataclass(frozen=True)
class KeyCoder:
    """Per channel, all made offline: lows, highs f32 [num_kv_heads, 1, head_dim] per layer."""

    width: int
    lows: tuple[Tensor, ...]
    highs: tuple[Tensor, ...]
    levels: tuple[Levels, ...]

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        low, high = self.lows[layer].to(x.device), self.highs[layer].to(x.device)
        apart = (x < low) | (x > high)
        values = torch.where(apart, kept(x), _between(x, low, high, self.levels[layer]))
        bits = x.numel() * self.width + float(apart.sum()) * (VALUE_BITS + INDEX_BITS)
        return Coded(values, bits + x.shape[1] * _COUNT_BITS)


@dataclass(frozen=True)
class ValueCoder:
    """Per token over all heads; ends: numbers kept apart at each end."""

    width: int
    ends: int
    levels: tuple[Levels, ...]

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        tokens = across_heads(x)
        apart = extremes(tokens, self.ends)
        low, high = (kept(end) for end in ends_without(tokens, apart))
        values = _between(tokens.clamp(low, high), low, high, self.levels[layer])
        values = torch.where(apart, kept(tokens), values)
        bits = tokens.numel() * self.width + float(apart.sum()) * (VALUE_BITS + INDEX_BITS)
        bits += (low.numel() + high.numel()) * VALUE_BITS
        return Coded(per_head(values, len(x)), bits)


def _between(x: Tensor, low: Tensor, high: Tensor, levels: Levels) -> Tensor:
    centre, half = (high + low) / 2, ((high - low) / 2).clamp(min=_FLAT)
    return levels.round((x - centre) / half) * half + centre


def ends_without(vectors: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest member of each vector that is not kept apart, [..., 1] each."""
    low = torch.where(apart, torch.inf, vectors).amin(-1, keepdim=True)
    return low, torch.where(apart, -torch.inf, vectors).amax(-1, keepdim=True)


def fit_levels(x: Tensor, weights: Tensor | None, width: int, seed: int) -> Levels:
    """K-Means of one dimension. Args: x f32 [n] in -1 .. 1; weights f32 [n]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[:_SAMPLES]
    some = x[chosen].double()
    sample = None if weights is None else weights[chosen].double()
    if sample is not None:  # K-Means wants weights that are not all tiny
        sample = sample / sample.mean().clamp(min=1e-30)
    means = KMeans(n_clusters=2**width, n_init=1, max_iter=50, random_state=seed).fit(
        some[:, None].numpy(), sample_weight=None if sample is None else sample.numpy()
    )
    edges = torch.from_numpy(means.cluster_centers_[:, 0]).sort().values.float()
    if width > 2:
        return Levels(edges, edges)
    rounded = Levels(edges, edges).round(some.float()).double()
    stretch = some.std() / rounded.std()
    return Levels(edges, ((edges - rounded.mean()) * stretch + some.mean()).float())


@dataclass(frozen=True)
class _Fitted:
    """What calibration finds for one layer; share: of numbers outside ranges that were made without
    them, which is what unseen text will have."""

    low: Tensor
    high: Tensor
    k_levels: Levels
    v_levels: Levels
    share: float


def build(options: KvQuantOptions, source: Source) -> Method:
    """Calibrates ranges and levels."""
    if not 0.0 <= options.outliers < 100.0:
        raise BaselineError(f"outliers{options.outliers:g}: give a percentage below 100.")
    hidden = source.geometry.num_kv_heads * source.geometry.head_dim
    ends = ends_of(hidden, options.outliers)
    rows = source.rows(options.sink, options.weights == "fisher")
    fitted = [_fit(some, layer, ends, options, source) for layer, some in enumerate(rows)]
    k = KeyCoder(
        int(options.k),
        tuple(layer.low for layer in fitted),
        tuple(layer.high for layer in fitted),
        tuple(layer.k_levels for layer in fitted),
    )
    v = ValueCoder(int(options.v), ends, tuple(layer.v_levels for layer in fitted))
    pair = Pair(source.key_coder(k, options.rope), v)
    apart = VALUE_BITS + INDEX_BITS
    share = sum(layer.share for layer in fitted) / len(fitted)
    k_bits = k.width + share * apart + _COUNT_BITS / hidden
    v_bits = v.width + 2 * ends / hidden * apart + 2 * VALUE_BITS / hidden
    deviations = (
        f"keys {options.rope}-RoPE, levels {options.weights}; {100 * share:.1f} % of K kept apart on "
        f"text unseen by calibration, {2 * ends} of {hidden} of V; tables, once per model, are not "
        "counted"
    )
    return Simulated.of("kvquant", options, average(k_bits, v_bits), lambda: pair, deviations)


def _fit(
    rows: LayerRows, layer: int, ends: int, options: KvQuantOptions, source: Source
) -> _Fitted:
    keys = source.keys(rows, layer, options.rope)
    low, high = ranges(keys, options.outliers)
    k_weights, v_weights = _weights(rows, layer, options, source)
    k_levels = _levels(keys, low, high, k_weights, int(options.k), source.seed)
    tokens = across_heads(rows.v)
    inner = ends_without(tokens, extremes(tokens, ends))
    v_levels = _levels(tokens, *inner, v_weights, int(options.v), source.seed)
    first, second = keys.tensor_split(2, dim=1)
    least, most = ranges(first, options.outliers)
    share = ((second < least) | (second > most)).double().mean()
    return _Fitted(low, high, k_levels, v_levels, float(share))


def ranges(keys: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """Ends of each channel's range, outside of which `percent` of its numbers lie, half each side.

    Args: keys f32 [H, n, D]. Returns: f32 [H, 1, D] each.
    """
    share = percent / 200
    return keys.quantile(share, 1, keepdim=True), keys.quantile(1 - share, 1, keepdim=True)


def _weights(
    rows: LayerRows, layer: int, options: KvQuantOptions, source: Source
) -> tuple[Tensor | None, Tensor | None]:
    """Squared gradients like the keys and like the values of tokens, or None for both."""
    if rows.k_gradient is None or rows.v_gradient is None:
        return None, None
    gradient = rows.k_gradient
    if options.rope == "pre":  # a rotation turns gradients as it turns keys
        gradient = source.rope.unrotate(gradient, rows.positions, layer)
    return gradient.square(), across_heads(rows.v_gradient).square()


def _levels(
    x: Tensor, low: Tensor, high: Tensor, weights: Tensor | None, width: int, seed: int
) -> Levels:
    inside = (x >= low) & (x <= high)
    scaled = (x - (high + low) / 2) / ((high - low) / 2).clamp(min=_FLAT)
    return fit_levels(scaled[inside], None if weights is None else weights[inside], width, seed)
