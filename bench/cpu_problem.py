"""A problem of decode attention on a CPU, the tokens that everybody gets, and what must come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peer_backends import Problem
from torch import Tensor

CHUNK = 4096  # tokens, of all sequences together, that are filled in at once


@dataclass(frozen=True)
class CpuProblem(Problem):
    """One query per sequence over `context` tokens, on a number of threads; dtype is that of our rows and queries."""

    threads: int = 1

    @property
    def key(self) -> str:
        """As in the keys of ratios; a batch and threads of 1 go without saying."""
        n = self.context
        size = f"{n // 1024}k" if n % 1024 == 0 else str(n)
        key = f"{size}_{self.num_q_heads}x{self.num_kv_heads}_d{self.head_dim}"
        key += f"_b{self.batch}" if self.batch > 1 else ""
        return key + (f"_t{self.threads}" if self.threads > 1 else "")

    @property
    def values(self) -> int:
        """Numbers of K and V together."""
        return 2 * self.batch * self.context * self.num_kv_heads * self.head_dim


class Data:
    """The same random queries and tokens for everybody, in any process."""

    def __init__(self, p: CpuProblem, seed: int = 0) -> None:
        self.p, self.seed = p, seed
        shape = (p.batch, p.num_q_heads, p.head_dim)
        self.queries = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token, and K and V as float32 [batch, tokens, num_kv_heads, head_dim]."""
        generator = torch.Generator().manual_seed(self.seed)
        step = max(1, CHUNK // self.p.batch)
        for start in range(0, self.p.context, step):
            tokens = min(step, self.p.context - start)
            shape = (2, self.p.batch, tokens, self.p.num_kv_heads, self.p.head_dim)
            k, v = torch.randn(shape, generator=generator)
            yield start, k, v


class Reference:
    """Attention in float32 while the tokens come, chunk by chunk."""

    def __init__(self, data: Data) -> None:
        p = data.p
        self.shape = data.queries.shape
        rows = data.queries.view(p.batch, p.num_kv_heads, p.ratio, p.head_dim)
        self.rows = rows * p.head_dim**-0.5
        self.top = torch.full((*rows.shape[:3], 1), -torch.inf)
        self.total = torch.zeros_like(self.top)
        self.sum = torch.zeros_like(rows)

    def add(self, k: Tensor, v: Tensor) -> None:
        """The next tokens."""
        logits = self.rows @ k.permute(0, 2, 3, 1)
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        weights, shrink = torch.exp(logits - top), torch.exp(self.top - top)
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        self.sum = self.sum * shrink + weights @ v.transpose(1, 2)
        self.top = top

    def error(self, out: Tensor) -> float:
        """Of an output, root of the mean square, relative."""
        wanted = (self.sum / self.total).view(self.shape)
        return float((out.float().view(self.shape) - wanted).norm() / wanted.norm())
