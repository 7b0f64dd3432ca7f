"""What the weights of normalised queries and keys tell of their channels, without any calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skvq_ext.balance import balanced_scale
from skvq_ext.geometry import Geometry

_FLOOR = 1e-3  # of the mean: a weight near 0 says little about what a channel holds


def key_scales(model: Any, geometry: Geometry) -> Tensor | None:
    """The divisor of each key channel in a model that normalises q and k, None in others.

    Such a model multiplies every channel by a learned weight after the norm, some by a hundred times
    the others' power; a rotation would spread them over all. The weights are the channels' root mean
    squares, up to a common factor, so scaling can be balanced from them alone. RoPE turns channel i
    into i + head_dim / 2, so both get the mean of their powers.
    Returns: f32 [num_layers, head_dim].
    """
    layers = list(getattr(model.get_decoder(), "layers", []))
    if len(layers) != geometry.num_layers:
        return None
    scales = []
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        powers = [_power(getattr(attention, f"{x}_norm", None), geometry) for x in ("k", "q")]
        if powers[0] is None or powers[1] is None:
            return None
        scales.append(balanced_scale(powers[0][None], powers[1][None], _FLOOR)[0])
    return torch.stack(scales).float()


def _power(norm: Any, geometry: Geometry) -> Tensor | None:
    """Mean square of each channel behind a norm over a head, f64 [head_dim]."""
    weight = getattr(norm, "weight", None)
    dim = geometry.head_dim
    if weight is None or weight.shape != (dim,) or dim % 2:
        return None
    ones = torch.ones(1, dim, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():  # some norms multiply by the weight, some by 1 + weight: ask this one
        power = norm(ones)[0].double().square().cpu()
    halves = (power[: dim // 2] + power[dim // 2 :]) / 2
    return torch.cat([halves, halves])
