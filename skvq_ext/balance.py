"""Balanced scaling: what each channel is divided by, so that an evenly spread error does least harm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOOR = 1e-8  # of the mean over channels: what is less than this is dead
_LIMIT = 100.0  # of the geometric mean: a dead channel is neither blown up nor lost


def balanced_scale(power: Tensor, energy: Tensor, floor: float = _FLOOR) -> Tensor:
    """The divisor of each channel that makes its power times what it is multiplied with least.

    A channel is stored times s = (energy / power)^(1/4), the other side is divided by s: both then
    have the power sqrt(energy * power), and an evenly spread error does least harm.
    Args: power, energy f64 [H, D]; floor, share of the mean over channels below which a channel
    counts as dead. Returns: f64 [H, D], 1 / s, of geometric mean 1 per head.
    """
    log = (_alive(power, floor).log() - _alive(energy, floor).log()) / 4
    log = log - log.mean(-1, keepdim=True)
    limit = math.log(_LIMIT)
    return log.clamp(-limit, limit).exp()


def _alive(x: Tensor, floor: float) -> Tensor:
    return torch.maximum(x, floor * x.mean(-1, keepdim=True)).clamp(min=1e-30)
