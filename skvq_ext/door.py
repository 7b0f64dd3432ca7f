"""The transform at the door: what k, v and q go through on their way in, and o on its way out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from skvq_ext.hadamard import block_hadamard
from skvq_ext.plan import LayerPlan, TensorPlan


@lru_cache(maxsize=16)
def _hadamard(band_edges: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Shared by all layers and heads: a plan has one or two different ones."""
    return block_hadamard(band_edges).to(device, dtype)


@dataclass(frozen=True)
class _Map:
    """The map of K or of V for `num_heads` heads; None stands for a step that changes nothing.

    gather, scatter: int32 [num_heads * D], into the heads' channels laid end to end.
    shift, scale: [num_heads, D]; scale in permuted order. rotation: [D, D] or [num_heads, D, D].
    """

    gather: Tensor | None
    scatter: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    rotation: Tensor | None

    @classmethod
    def build(cls, plan: TensorPlan, repeat: int, device: torch.device, dtype: torch.dtype) -> _Map:
        """The map with every KV head repeated for its `repeat` query heads."""
        permutation = plan.permutation.long().repeat_interleave(repeat, 0)
        heads, dim = permutation.shape
        gather = scatter = None
        if not torch.equal(permutation, torch.arange(dim).expand_as(permutation)):
            first = torch.arange(heads)[:, None] * dim
            gather = (permutation + first).flatten().int().to(device)
            scatter = (permutation.argsort(-1) + first).flatten().int().to(device)

        def table(values: Tensor, neutral: float) -> Tensor | None:
            if bool((values == neutral).all()):
                return None
            return values.repeat_interleave(repeat, 0).to(device, dtype)

        rotation = None
        if plan.rotation == "hadamard":
            rotation = _hadamard(plan.band_edges, device, dtype)
        elif plan.dense is not None:
            rotation = plan.dense.repeat_interleave(repeat, 0).to(device, dtype)
        return cls(gather, scatter, table(plan.shift, 0.0), table(plan.scale, 1.0), rotation)

    @property
    def is_identity(self) -> bool:
        """Whether nothing but a shift is left of the map."""
        return self.gather is None and self.scale is None and self.rotation is None

    @property
    def shared_rotation(self) -> Tensor | None:
        """The matrix that all maps of these bands have in common."""
        return self.rotation if self.rotation is not None and self.rotation.dim() == 2 else None

    def tensors(self) -> list[Tensor]:
        """What this map keeps in memory."""
        parts = (self.gather, self.scatter, self.shift, self.scale, self.rotation)
        return [part for part in parts if part is not None]


def _permute(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.flatten(1).index_select(1, index).view_as(x)


def _rotate(x: Tensor, rotation: Tensor | None, *, back: bool = False) -> Tensor:
    """R x for the rows of x [n, H, D], or R^T x with `back`."""
    if rotation is None:
        return x
    matrix = rotation if back else rotation.mT
    if matrix.dim() == 2:
        return x @ matrix
    return torch.bmm(x.transpose(0, 1), matrix).transpose(0, 1)


class Door:
    """Maps between a model's heads and the space of the cache, for one layer.

    y = R · diag(1/s) · P · (x − m) for K and V; q' = R · diag(s) · P · q, so that
    q'·y = q·(x − m); o = P^T · diag(s) · R^T · o' + m · share. It computes in fp32 (or
    compute_dtype) and returns the dtype it was given; steps that change nothing are skipped.
    """

    def __init__(
        self,
        plan: LayerPlan,
        num_q_heads: int,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args: plan of one layer; num_q_heads, a multiple of its KV heads."""
        num_kv_heads = plan.k.permutation.shape[0]
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads {num_q_heads} is not a multiple of the {num_kv_heads} KV heads of "
                "the plan; every KV head serves equally many query heads."
            )
        device, self._dtype = torch.device(device), compute_dtype
        repeat = num_q_heads // num_kv_heads
        self._k = _Map.build(plan.k, 1, device, compute_dtype)
        self._v = _Map.build(plan.v, 1, device, compute_dtype)
        self._q = self._k if repeat == 1 else _Map.build(plan.k, repeat, device, compute_dtype)
        self._o = self._v if repeat == 1 else _Map.build(plan.v, repeat, device, compute_dtype)

    def map_k(self, k: Tensor) -> Tensor:
        """k [num_tokens, num_kv_heads, head_dim] into the cache's space."""
        return self._enter(k, self._k)

    def map_v(self, v: Tensor) -> Tensor:
        """v [num_tokens, num_kv_heads, head_dim] into the cache's space."""
        return self._enter(v, self._v)

    def map_q(self, q: Tensor) -> Tensor:
        """q [num_tokens, num_q_heads, head_dim] into the space of the cached keys."""
        m = self._q
        if m.is_identity:
            return q
        x = _permute(q.to(self._dtype), m.gather)
        x = x if m.scale is None else x * m.scale
        return _rotate(x, m.rotation).to(q.dtype)

    def unmap_o(self, o: Tensor, lse: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """The output of attention back in the model's space.

        Args: o [n, num_q_heads, head_dim] of attention over mapped values.
        lse f32 [n, num_q_heads]: where it is -inf the row saw nothing and stays 0.
        share f32 [n, num_q_heads]: the part of the row's probability that fell on tokens, for
        learned sink logits (`token_share`); None = 1.
        """
        m = self._o
        if m.is_identity and m.shift is None:
            return o
        x = _rotate(o.to(self._dtype), m.rotation, back=True)
        x = x if m.scale is None else x * m.scale
        x = _permute(x, m.scatter)
        if m.shift is not None:
            if share is None and lse is not None:
                share = lse > -torch.inf
            x = x + (m.shift if share is None else m.shift * share.to(self._dtype)[..., None])
        return x.to(o.dtype)

    def logit_shift(self, q: Tensor, softmax_scale: float) -> Tensor | None:
        """softmax_scale · q·m, the part of every logit that shifted keys lack.

        Args: q [n, num_q_heads, head_dim] of the model, not mapped.
        Returns: f32 [n, num_q_heads]; None where keys are not shifted. Plain softmax does not need
        it; softcap, learned sink logits and merging by lse do.
        """
        if self._q.shift is None:
            return None
        return (q.to(self._dtype) * self._q.shift).sum(-1).mul(softmax_scale).float()

    def tensors(self) -> list[Tensor]:
        """The tables this door keeps, each once; doors share their Hadamard matrices."""
        maps = (self._k, self._v, self._q, self._o)
        return list({id(part): part for m in maps for part in m.tensors()}.values())

    def nbytes(self) -> int:
        """Bytes of the tables this door keeps."""
        return sum(part.nbytes for part in self.tensors())

    def shared_nbytes(self) -> int:
        """The part of them that all doors of a plan have in common: the Hadamard matrices."""
        shared = (m.shared_rotation for m in (self._k, self._v))
        return sum({id(part): part.nbytes for part in shared if part is not None}.values())

    def _enter(self, x: Tensor, m: _Map) -> Tensor:
        if m.is_identity and m.shift is None:
            return x
        y = x.to(self._dtype)
        y = y if m.shift is None else y - m.shift
        y = _permute(y, m.gather)
        y = y if m.scale is None else y / m.scale
        return _rotate(y, m.rotation).to(x.dtype)


def token_share(lse: Tensor, learned_sinks: Tensor) -> Tensor:
    """The part of the softmax that falls on tokens when each head has a learned sink logit.

    Args: lse f32 [n, num_q_heads], natural logarithm, with the sink logit in it;
    learned_sinks f32 [num_q_heads]. Returns: f32 [n, num_q_heads] in [0, 1].
    """
    return -torch.expm1((learned_sinks - lse).clamp(max=0.0))
