"""Attention in full precision: prefill, chunks of it, and what "sdpa" cannot do without a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK_LOGITS = 1 << 21  # logits of one block of queries: 8 MB, which caches of CPUs hold


class Softmax(NamedTuple):
    """What a model asks of its softmax.

    scale: factor of q . k. softcap: c of c * tanh(logit / c), 0 = none. learned_sinks: f32
    [num_q_heads], a logit per head that takes probability and gives no value. sliding_window:
    tokens a query sees, itself included, 0 = all.
    """

    scale: float
    softcap: float = 0.0
    learned_sinks: Tensor | None = None
    sliding_window: int = 0

    def cap(self, logits: Tensor) -> Tensor:
        """The logits after softcap."""
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def leave_room(self, out: Tensor, lse: Tensor) -> Tensor:
        """Gives the learned sinks their share: out [n, num_q_heads, head_dim], lse over tokens."""
        if self.learned_sinks is None:
            return out
        return out * torch.sigmoid(lse - self.learned_sinks)[..., None].to(out.dtype)


def prefill(q: Tensor, k: Tensor, v: Tensor, how: Softmax) -> Tensor:
    """Causal attention of one sequence over itself.

    Args: q [n, num_q_heads, head_dim]; k, v [n, num_kv_heads, head_dim]. Returns: like q.
    """
    whole = not how.sliding_window or how.sliding_window >= q.shape[0]
    if not whole or how.softcap or how.learned_sinks is not None:
        return how.leave_room(*causal(q, k, v, how))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        scale=how.scale,
        is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def causal(q: Tensor, k: Tensor, v: Tensor, how: Softmax) -> tuple[Tensor, Tensor]:
    """Causal attention of one sequence over itself, with the log of its normaliser.

    Computes in fp32, a block of queries at a time and only where the window reaches; learned sinks
    are left to the caller. Beyond its arguments and results it takes k and v in fp32, where they
    are not, and a few times the logits of a block: 8 MB, or those of one query where they are more.

    Args: as `prefill`. Returns: out like q; lse f32 [n, num_q_heads], natural logarithm.
    """
    n, num_q_heads, _ = q.shape
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)  # [H, D, n], [H, n, D]
    out, lse = torch.empty_like(q), q.new_empty(n, num_q_heads, dtype=torch.float32)
    reach = min(n, how.sliding_window or n)
    size = max(1, min(n, max(64, reach), _BLOCK_LOGITS // (num_q_heads * max(1, reach))))
    for first in range(0, n, size):
        last, begin = min(n, first + size), max(0, first - reach + 1)
        # Key c of the block lies at begin + c, query r at begin + offset + r.
        offset = first - begin
        seen = torch.ones(last - first, last - begin, dtype=torch.bool, device=q.device)
        seen = seen.tril_(offset).triu_(offset - reach + 1)
        out[first:last], lse[first:last] = _over_block(
            q[first:last], keys[:, :, begin:last], values[:, begin:last], seen, how
        )
    return out, lse


def _over_block(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, how: Softmax
) -> tuple[Tensor, Tensor]:
    """Attention of q [m, num_q_heads, head_dim] over keys [num_kv_heads, head_dim, n] and values
    [num_kv_heads, n, head_dim] where seen [m, n] says so. Returns: as `causal`, in fp32."""
    rows = (-1, q.shape[0])  # of one KV head: its query heads, queries
    queries = (q.float() * how.scale).unflatten(1, (keys.shape[0], -1))
    queries = queries.permute(1, 2, 0, 3).flatten(1, 2)
    logits = how.cap(torch.bmm(queries, keys)).unflatten(1, rows)
    top = logits.masked_fill_(~seen, -torch.inf).amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()  # in place: memory that is warm, and no more of it
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.flatten(1, 2), values).unflatten(1, rows).div_(total)
    lse = total.log_().add_(top)[..., 0]
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1)


def masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: Softmax, dropout: float
) -> Tensor:
    """Attention with softcap or learned sinks, for a model that runs without a packed cache.

    Args: query [batch, num_q_heads, q_len, head_dim]; key, value [batch, num_kv_heads, kv_len,
    head_dim]; mask, bool (True = seen) or additive, [batch, 1, q_len, kv_len], None = causal from
    the first key on, as in "sdpa"; how, without sliding_window, which the mask shows; dropout,
    probability. Returns: [batch, q_len, num_q_heads, head_dim].
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    logits = how.cap(query.float() @ key.mT * how.scale)
    if mask is None and q_len > 1:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    norm = logits.logsumexp(-1, keepdim=True)
    if how.learned_sinks is not None:
        norm = torch.logaddexp(norm, how.learned_sinks[:, None, None])
    # A row that sees nothing has logits and norm -inf; it gives 0.
    weights = (logits - norm.clamp(min=torch.finfo(norm.dtype).min)).exp()
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous()
