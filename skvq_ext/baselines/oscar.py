"""OSCAR: a rotation from the covariance that attention consumes, then a clip per token.

Source: arXiv 2605.17757, section 3, and its repository (rotation/compute_kv_rotation.py, objectives
"qqt" and "sst", composition "r_h_pbr"): R = U H P, with U the eigenvectors of the queries'
covariance for K and of the values' covariance weighted by k^T (Q^T Q) k for V, H a Hadamard matrix,
P the bit reversal that spreads eigenvectors over groups. Of each rotated row, magnitudes above a
quantile (0.96 of K, 0.92 of V) are clipped. Rotations are per layer and KV head, as in the
repository's second format; the paper shares one per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.baselines.coding import (
    BaselineError,
    Coded,
    Pair,
    PerToken,
    Rotated,
    check_divides,
    group_bits,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.evaluate.method import Method
from skvq_ext.hadamard import hadamard


@dataclass(frozen=True)
class OscarOptions(Options):
    """g: channels that share a scale and a zero; kclip, vclip: quantile of a row's magnitudes above
    which it is clipped, 1 = not."""

    g: int = 64
    kclip: float = 0.96
    vclip: float = 0.92
    meta: str = words("fp16", "fp8")


@dataclass(frozen=True)
class ClippedRows:
    """Codes rows whose largest magnitudes were clipped."""

    coder: PerToken
    quantile: float

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        place = min(int(self.quantile * x.shape[-1]), x.shape[-1] - 1)
        limit = x.abs().sort(dim=-1).values[..., place : place + 1]
        return self.coder(layer, torch.clamp(x, -limit, limit), start)


def bit_reversal(eigenvalues: Tensor) -> Tensor:
    """The channel each place of a rotated row takes: the largest eigenvalue first, in bit-reversed
    order. Args: eigenvalues [D], D a power of two. Returns: int64 [D]."""
    count = len(eigenvalues)
    digits = count.bit_length() - 1
    places = [int(f"{i:0{digits}b}"[::-1], 2) if digits else 0 for i in range(count)]
    order = torch.empty(count, dtype=torch.int64)
    order[torch.tensor(places)] = eigenvalues.argsort(descending=True)
    return order


def rotation(covariance: Tensor) -> Tensor:
    """U H P of one head. Args: covariance f64 [D, D]. Returns: f32 [D, D], rows go in as x @ R."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    matrix: Tensor = vectors @ hadamard(len(values))
    return matrix[:, bit_reversal(values)].float()


def covariances(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What errors of K and of V are weighed with.

    Args: q f32 [group, n, D], the query heads of one KV head; k, v f32 [n, D].
    Returns: f64 [D, D] for K and for V.
    """
    queries = q.double().flatten(0, 1)
    for_keys = queries.mT @ queries / len(queries)
    weights = ((k.double() @ for_keys) * k.double()).sum(-1)
    weights = weights / weights.mean().clamp(min=1e-12)
    return for_keys, (v.double() * weights[:, None]).mT @ v.double() / len(v)


def build(options: OscarOptions, source: Source) -> Method:
    """Calibrates the rotations."""
    geometry = source.geometry
    dim, heads = geometry.head_dim, geometry.num_kv_heads
    check_divides("g", options.g, dim, "head_dim")
    if dim & (dim - 1):
        raise BaselineError(f"head_dim {dim}: OSCAR's bit reversal needs a power of two.")
    for name, value in (("kclip", options.kclip), ("vclip", options.vclip)):
        if not 0.0 < value <= 1.0:
            raise BaselineError(f"{name}{value:g}: a quantile lies in 0 .. 1.")
    found: dict[str, list[Tensor]] = {"k": [], "v": []}
    for rows in source.rows(options.sink):
        queries = rows.q.unflatten(0, (heads, -1))
        pairs = [covariances(queries[h], rows.k[h], rows.v[h]) for h in range(heads)]
        for side, index in (("k", 0), ("v", 1)):
            found[side].append(torch.stack([rotation(pair[index]) for pair in pairs]))
    k, v = (
        Rotated(ClippedRows(PerToken(width, options.g, options.meta), clip), tuple(found[side]))
        for side, width, clip in (
            ("k", options.k, options.kclip),
            ("v", options.v, options.vclip),
        )
    )
    pair = Pair(k, v)
    bits = [group_bits(width, options.g, options.meta) for _, width in options.sides]
    deviations = "rotations per head, once per model, are not counted; keys post-RoPE"
    return Simulated.of("oscar", options, average(*bits), lambda: pair, deviations)
