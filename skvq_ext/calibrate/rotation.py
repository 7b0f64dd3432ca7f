"""Rotations from data: principal axes spread evenly, and one learned by descent."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq_ext.hadamard import block_hadamard
from skvq_ext.plan import TensorShape

_STEPS = 96
_RATE = 0.01  # of Adam at first, on the entries of a skew-symmetric matrix; falls to 0
_ROWS = 512  # of a step; few are enough for a gradient


def principal_rotation(rows: Tensor, band_edges: tuple[int, ...]) -> Tensor:
    """Principal axes of the rows, largest first, spread evenly over each band by Hadamard.

    Every channel of a band then has the same power, and a wide first band gets the directions in
    which the rows vary most.
    Args: rows f32 [n, D]; band_edges (0, .., D). Returns: f32 [D, D], orthogonal, y = R x.
    """
    wide = rows.double()
    _, axes = torch.linalg.eigh(wide.mT @ wide)
    axes = axes.flip(-1)
    # Signs of eigenvectors are arbitrary; equal runs must give equal plans.
    largest = axes.abs().argmax(0, keepdim=True)
    axes = axes * axes.gather(0, largest).sign()
    rotation: Tensor = block_hadamard(band_edges) @ axes.mT
    return rotation.float()


def learn_rotation(rows: Tensor, start: Tensor, shape: TensorShape, seed: int) -> Tensor:
    """A rotation after which quantization errs least, found by descent from `start`.

    R = start · (I - A)^-1 (I + A), A skew-symmetric (the Cayley transform); gradients pass the
    rounding unchanged (SpinQuant, arXiv 2405.16406, learns rotations of weights and activations
    so). The range of a token's group is shrunk by a fixed ratio here; the clip is chosen later.
    Args: rows f32 [n, D]; start f32 [D, D]; shape of bands, groups and levels; seed of the rows
    drawn for each step. Returns: f32 [D, D], orthogonal; `start` where descent found no better one.
    """
    dim = rows.shape[1]
    dice = torch.Generator().manual_seed(seed)
    free = torch.zeros(dim, dim, requires_grad=True)
    adam = torch.optim.Adam([free], lr=_RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            some = rows[torch.randint(len(rows), (_ROWS,), generator=dice)]
            loss: Tensor = _loss(some @ (start @ _cayley(free)).mT, shape)
            adam.zero_grad()
            loss.backward()
            adam.step()
            falling.step()
    found: Tensor = (start.double() @ _cayley(free.detach().double())).float()
    better = _loss(rows @ found.mT, shape) < _loss(rows @ start.mT, shape)
    return found if better else start


def _cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix from any square one [D, D]."""
    skew, one = free - free.mT, torch.eye(len(free), dtype=free.dtype)
    turned: Tensor = torch.linalg.solve(one - skew, one + skew)
    return turned


def _loss(y: Tensor, shape: TensorShape) -> Tensor:
    """Mean squared error of rounding y f32 [n, D] in its groups."""
    total = y.new_zeros(())
    for (start, stop), levels in zip(shape.groups, shape.levels, strict=True):
        x = y[:, start:stop]
        low, high = x.aminmax(dim=-1, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2
        ratio = 1 - 0.9 / levels
        step = (2 * ratio / (levels - 1)) * half.clamp(min=1e-12)
        inside = (x - middle) / step + (levels - 1) / 2
        codes = inside.clamp(0, levels - 1)
        codes = codes + (codes.round() - codes).detach()
        total = total + ((codes - inside) * step).square().sum()
    return total / y.numel()
