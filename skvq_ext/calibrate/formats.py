"""Formats a plan may choose from, and the parts of a layer that its choices make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from skvq_ext import ops
from skvq_ext.calibrate.texts import CalibrationError
from skvq_ext.hadamard import block_hadamard
from skvq_ext.plan import LayerPlan, Part, Plan, SplitPlan, TensorPlan, TensorShape
from skvq_ext.scheme import Scheme

# The first of each side is where transforms are compared.
K_FORMATS = ("2", "1.5", "3", "4")
K_BANDS = ("3:1/2+2", "4:1/4+2")
V_FORMATS = ("1.5", "2", "3", "4")
_BANDS_FROM = 128  # channels: in smaller heads a second scale and zero cost what a band saves


def open_pairs(
    scheme: Scheme, head_dim: int, formats: Sequence[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    """Pairs (k, v) of formats a head may get.

    Args: formats, what the user restricts them to, None = all. Without a budget of bits it is the
    scheme's own pair. Raises: CalibrationError where there is nothing to restrict.
    """
    if scheme.bits is None:
        if formats is not None:
            raise CalibrationError(
                f"formats {list(formats)} have no use with the scheme {scheme}, which names a pair "
                "already. Give a budget instead ('bits2.25')."
            )
        return [(scheme.k, scheme.v)]
    keys = K_FORMATS + (K_BANDS if head_dim >= _BANDS_FROM else ())
    if formats is None:
        return [(k, v) for k in keys for v in V_FORMATS]
    if not formats:
        raise CalibrationError("formats is empty; name at least one pair, or give None for all.")
    return list(formats)


def read_pairs(text: str, scheme: Scheme, head_dim: int) -> list[tuple[str, str]] | None:
    """Pairs of formats from the words of a user: '' = None, 'cuda', or 'k2-v1.5,k3-v2'.

    Raises: CalibrationError, SchemeError.
    """
    if not text:
        return None
    if text == "cuda":
        return _cuda_pairs(scheme, head_dim)
    pairs = []
    for word in text.replace(",", " ").split():
        parsed = Scheme.parse(word)
        if word.lower() != f"k{parsed.k}-v{parsed.v}":
            raise CalibrationError(f"--formats: {word!r} is not a pair such as 'k2-v1.5'.")
        pairs.append((parsed.k, parsed.v))
    return pairs


def _cuda_pairs(scheme: Scheme, head_dim: int) -> list[tuple[str, str]]:
    """The pairs that this build reads on a GPU for a head size and group."""
    cuda = ops.build_info()["cuda"] or {"instances": []}
    group = scheme.group if 0 < scheme.group < head_dim else head_dim
    end = f"-g{group} at head_dim {head_dim}"
    names = [name.removesuffix(end) for name in cuda["instances"] if name.endswith(end)]
    pairs = []
    for name in names:
        k, v = re.sub(r"\d+/\d+", lambda part: str(Fraction(part[0])), name)[1:].split("-v")
        pairs.append((k, v))
    if not pairs:
        raise CalibrationError(
            f"this build has no CUDA kernels for groups of {group} channels at head_dim {head_dim} "
            "('skvq info' lists them). Name formats, or build with SKVQ_CUDA=1."
        )
    return pairs


def shapes_of(plan: Plan, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, TensorShape]]:
    """Side ("k", "v") -> format -> shape, in the order of the pairs."""
    found: dict[str, dict[str, TensorShape]] = {"k": {}, "v": {}}
    for k, v in pairs:
        shapes = plan.shapes_of(replace(plan.scheme, k=k, v=v, bits=None))
        found["k"].setdefault(k, shapes["k"])
        found["v"].setdefault(v, shapes["v"])
    return found


def join_heads(tensors: Sequence[TensorPlan]) -> TensorPlan:
    """One tensor plan of several heads; rotations that differ become matrices."""
    first = tensors[0]
    kinds = {tensor.rotation for tensor in tensors}
    rotation = kinds.pop() if len(kinds) == 1 else "dense"
    dense = torch.cat([_matrix(tensor) for tensor in tensors]) if rotation == "dense" else None
    names = ("permutation", "shift", "scale", "exponents")
    joined: dict[str, Any] = {
        name: torch.cat([getattr(t, name) for t in tensors]) for name in names
    }
    return replace(first, rotation=rotation, dense=dense, clip=_join_clips(tensors), **joined)


def _join_clips(tensors: Sequence[TensorPlan]) -> torch.Tensor:
    """Clip ratios f32 [H, groups] or [H, groups, choices]; heads with fewer repeat their first."""
    clips = [t.clip if t.clip.dim() == 3 else t.clip[..., None] for t in tensors]
    most = max(clip.shape[2] for clip in clips)
    joined = torch.cat(
        [torch.cat([c, c[..., :1].expand(-1, -1, most - c.shape[2])], -1) for c in clips]
    )
    return joined if most > 1 else joined[..., 0]


def _matrix(tensor: TensorPlan) -> torch.Tensor:
    """The rotation as f32 [1, D, D]."""
    if tensor.dense is not None:
        return tensor.dense
    if tensor.rotation == "hadamard":
        return block_hadamard(tensor.band_edges).float()[None]
    return torch.eye(tensor.band_edges[-1])[None]


def split_layer(heads: Sequence[tuple[str, str, TensorPlan, TensorPlan]]) -> SplitPlan:
    """The plan of a layer from (k format, v format, plan of K, plan of V) of each of its heads."""
    members: dict[tuple[str, str], list[int]] = {}
    for index, (k, v, *_) in enumerate(heads):
        members.setdefault((k, v), []).append(index)
    return SplitPlan(
        tuple(
            Part(tuple(indices), k, v, layer_of_heads([heads[i] for i in indices]))
            for (k, v), indices in sorted(members.items())
        )
    )


def layer_of_heads(heads: Sequence[tuple[str, str, TensorPlan, TensorPlan]]) -> LayerPlan:
    """The plan of heads that share their formats."""
    return LayerPlan(join_heads([h[2] for h in heads]), join_heads([h[3] for h in heads]))
