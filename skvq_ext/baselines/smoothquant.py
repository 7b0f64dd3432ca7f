"""SmoothQuant applied to keys and values: channels are divided by a factor before they are rounded.

Source: arXiv 2211.10438, section 4, equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with
alpha = 0.5. What meets a channel of K is the query, what meets a channel of V is a column of W_o,
which take s_j in; the quantizer sees X_j / s_j. SKVQ's tables use this baseline with keys before
RoPE (its repository's "smoothquant" implies pre_rope); there the query cannot take the factor in,
and dequantization multiplies it back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.baselines.coding import Coded, Coder, Pair, PerToken, check_divides, group_bits
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.baselines.samples import LayerRows
from skvq_ext.evaluate.method import Method
from skvq_ext.plan import DEFAULT_EXPONENTS

_SMALLEST = 1e-5  # of what a factor is made of: dead channels are not blown up


@dataclass(frozen=True)
class SmoothOptions(Options):
    """g: channels that share a scale and a zero; alpha: share of the difficulty moved away from K
    and V; pre or post: keys before or after RoPE."""

    g: int = 64
    alpha: float = 0.5
    meta: str = words("fp8", "fp16")
    rope: str = words("pre", "post")


@dataclass(frozen=True)
class _Smoothed:
    """Codes x / s; factors: f32 [num_kv_heads, 1, head_dim] per layer."""

    coder: Coder
    factors: tuple[Tensor, ...]

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        factor = self.factors[layer].to(x.device)
        values, bits = self.coder(layer, x / factor, start)
        return Coded(values * factor, bits)


def smoothing(rows: Tensor, other: Tensor, alpha: float) -> Tensor:
    """The factors s of one tensor in one layer.

    Args: rows f32 [H, n, D]; other f32 [H, D], the largest absolute value that meets a channel.
    Returns: f32 [H, 1, D].
    """
    own = rows.abs().amax(1).clamp(min=_SMALLEST)
    return (own**alpha / other.clamp(min=_SMALLEST) ** (1 - alpha))[:, None]


def build(options: SmoothOptions, source: Source) -> Method:
    """Calibrates the factors."""
    dim = source.geometry.head_dim
    check_divides("g", options.g, dim, "head_dim")
    k_factors, v_factors = [], []
    for layer, rows in enumerate(source.rows(options.sink)):
        keys = source.keys(rows, layer, options.rope)
        k_factors.append(
            smoothing(keys, _largest_query(rows, layer, options, source), options.alpha)
        )
        v_factors.append(smoothing(rows.v, rows.output, options.alpha))
    k_coder, v_coder = (
        PerToken(width, options.g, options.meta, DEFAULT_EXPONENTS[side])
        for side, width in options.sides
    )
    k = source.key_coder(_Smoothed(k_coder, tuple(k_factors)), options.rope)
    pair = Pair(k, _Smoothed(v_coder, tuple(v_factors)))
    bits = [group_bits(width, options.g, options.meta) for _, width in options.sides]
    deviations = (
        f"factors from calibration, alpha {options.alpha:g}, keys {options.rope}-RoPE; the table of "
        "factors, once per model, is not counted"
    )
    return Simulated.of("smoothquant", options, average(*bits), lambda: pair, deviations)


def _largest_query(rows: LayerRows, layer: int, options: SmoothOptions, source: Source) -> Tensor:
    """Largest |q| per channel over the query heads of each KV head, f32 [H, D]."""
    queries = rows.q
    if options.rope == "pre":
        queries = source.rope.unrotate(queries, rows.positions, layer)
    heads = rows.k.shape[0]
    return torch.amax(queries.abs().unflatten(0, (heads, -1)), dim=(1, 2))
