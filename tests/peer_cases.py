"""Shared by the tests of the comparison on a CPU, whose modules must be found in bench/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from cpu_problem import CpuProblem, Data


def tokens(p: CpuProblem) -> tuple[Tensor, Tensor]:
    """All of K and V of a problem, [batch, context, num_kv_heads, head_dim]."""
    _, ks, vs = zip(*Data(p).chunks(), strict=True)
    return torch.cat(ks, 1), torch.cat(vs, 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, from tensors as in `Data`."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bhd,bnhd->bhn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), v)


def relative(out: Tensor, wanted: Tensor) -> float:
    return float((out.double().view(wanted.shape) - wanted).norm() / wanted.norm())
