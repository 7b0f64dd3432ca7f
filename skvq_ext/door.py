"""The transform at the door: what k, v and q go through on their way in, and o on its way out."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.hadamard import block_hadamard
from skvq_ext.plan import LayerPlan, TensorPlan


@lru_cache(maxsize=16)
def _hadamard(band_edges: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """R^T and R, shared by all layers and heads: a plan has one or two different ones."""
    matrix = block_hadamard(band_edges).float()
    back = matrix.contiguous().to(device)
    # Sylvester's matrices are symmetric: one copy serves both ways.
    way_in = back if torch.equal(matrix, matrix.mT) else matrix.mT.contiguous().to(device)
    return way_in, back


@dataclass(frozen=True)
class _Map:
    """The tables of K or of V, per KV head; None stands for a step that changes nothing.

    permutation: int32 [H, D]. shift, scale, inverse: float32 [H, D]; the last two in permuted order,
    inverse = 1 / scale. rotation, back: float32 [D, D] or [H, D, D], what rows are multiplied with on
    the way in and on the way out.
    """

    permutation: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    inverse: Tensor | None
    rotation: Tensor | None
    back: Tensor | None

    @classmethod
    def build(cls, plan: TensorPlan, device: torch.device) -> _Map:
        heads, dim = plan.permutation.shape
        plain = torch.equal(plan.permutation.long(), torch.arange(dim).expand(heads, dim))

        def table(values: Tensor, neutral: float) -> Tensor | None:
            return (
                None if bool((values == neutral).all()) else values.float().contiguous().to(device)
            )

        scale = table(plan.scale, 1.0)
        rotation = back = None
        if plan.rotation == "hadamard":
            rotation, back = _hadamard(plan.band_edges, device)
        elif plan.dense is not None:
            rotation = plan.dense.float().mT.contiguous().to(device)
            back = plan.dense.float().contiguous().to(device)
        return cls(
            None if plain else plan.permutation.int().contiguous().to(device),
            table(plan.shift, 0.0),
            scale,
            None if scale is None else 1.0 / scale,
            rotation,
            back,
        )

    @property
    def is_identity(self) -> bool:
        """Whether nothing but a shift is left of the map."""
        return self.permutation is None and self.scale is None and self.rotation is None

    @property
    def shared_rotations(self) -> list[Tensor]:
        """The matrices that all maps of these bands have in common."""
        return [m for m in (self.rotation, self.back) if m is not None and m.dim() == 2]

    def to(self, device: torch.device, moved: dict[int, Tensor]) -> _Map:
        """The same tables on a device; `moved` holds those that are there already, by id."""

        def move(table: Tensor | None) -> Tensor | None:
            return None if table is None else moved.setdefault(id(table), table.to(device))

        return _Map(*(move(table) for table in vars(self).values()))

    def tensors(self) -> list[Tensor]:
        """What this map keeps in memory."""
        parts = (self.permutation, self.shift, self.scale, self.inverse, self.rotation, self.back)
        return [part for part in parts if part is not None]


class Door:
    """Maps between a model's heads and the space of the cache, for one layer.

    y = R · diag(1/s) · P · (x − m) for K and V; q' = R · diag(s) · P · q, so that
    q'·y = q·(x − m); o = P^T · diag(s) · R^T · o' + m · share. Every row is computed by itself in
    fp32 (`ops.enter_heads`), so a token's bytes do not depend on its company; what changes nothing
    is skipped.
    """

    def __init__(
        self, plan: LayerPlan, num_q_heads: int, device: torch.device | str = "cpu"
    ) -> None:
        """Args: plan of one layer; num_q_heads, a multiple of its KV heads."""
        self._heads = plan.k.permutation.shape[0]
        if num_q_heads % self._heads:
            raise ValueError(
                f"num_q_heads {num_q_heads} is not a multiple of the {self._heads} KV heads of "
                "the plan; every KV head serves equally many query heads."
            )
        self._k = _Map.build(plan.k, torch.device(device))
        self._v = _Map.build(plan.v, torch.device(device))

    def to(self, device: torch.device | str, moved: dict[int, Tensor] | None = None) -> Door:
        """The same door on a device; doors moved with one dict go on sharing what they share."""
        moved = {} if moved is None else moved
        there = copy(self)
        there._k = self._k.to(torch.device(device), moved)
        there._v = self._v.to(torch.device(device), moved)
        return there

    def map_k(self, k: Tensor) -> Tensor:
        """k [num_tokens, num_kv_heads, head_dim] into the cache's space."""
        return self._enter(k, self._k)

    def map_v(self, v: Tensor) -> Tensor:
        """v [num_tokens, num_kv_heads, head_dim] into the cache's space."""
        return self._enter(v, self._v)

    def map_q(self, q: Tensor) -> Tensor:
        """q [num_tokens, num_q_heads, head_dim] into the space of the cached keys."""
        m = self._k
        if m.is_identity:
            return q
        return ops.enter_heads(
            q, m.permutation, None, m.scale, m.rotation, num_kv_heads=self._heads
        )

    def unmap_o(self, o: Tensor, lse: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """The output of attention back in the model's space.

        Args: o [n, num_q_heads, head_dim] of attention over mapped values.
        lse f32 [n, num_q_heads]: where it is -inf the row saw nothing and stays 0.
        share f32 [n, num_q_heads]: the part of the row's probability that fell on tokens, for
        learned sink logits (`token_share`); None = 1.
        """
        m = self._v
        if m.is_identity and m.shift is None:
            return o
        if m.shift is not None and share is None and lse is not None:
            share = (lse > -torch.inf).float()
        return ops.leave_heads(
            o, m.permutation, m.shift, m.scale, m.back, share, num_kv_heads=self._heads
        )

    def logit_shift(self, q: Tensor, softmax_scale: float) -> Tensor | None:
        """softmax_scale · q·m, the part of every logit that shifted keys lack.

        Args: q [n, num_q_heads, head_dim] of the model, not mapped.
        Returns: f32 [n, num_q_heads]; None where keys are not shifted. Plain softmax does not need
        it; softcap, learned sink logits and merging by lse do.
        """
        if self._k.shift is None:
            return None
        grouped = q.float().reshape(q.shape[0], self._heads, -1, q.shape[2])
        dots = (grouped * self._k.shift[:, None]).sum(-1)
        return dots.mul(softmax_scale).flatten(1)

    def tensors(self) -> list[Tensor]:
        """The tables this door keeps, each once; doors share their Hadamard matrices."""
        return list({id(part): part for m in (self._k, self._v) for part in m.tensors()}.values())

    def nbytes(self) -> int:
        """Bytes of the tables this door keeps."""
        return sum(part.nbytes for part in self.tensors())

    def shared_nbytes(self) -> int:
        """The part of them that all doors of a plan have in common: the Hadamard matrices."""
        shared = [part for m in (self._k, self._v) for part in m.shared_rotations]
        return sum({id(part): part.nbytes for part in shared}.values())

    def _enter(self, x: Tensor, m: _Map) -> Tensor:
        if m.is_identity and m.shift is None:
            return x
        return ops.enter_heads(
            x, m.permutation, m.shift, m.inverse, m.rotation, num_kv_heads=self._heads
        )


def token_share(lse: Tensor, learned_sinks: Tensor) -> Tensor:
    """The part of the softmax that falls on tokens when each head has a learned sink logit.

    Args: lse f32 [n, num_q_heads], natural logarithm, with the sink logit in it;
    learned_sinks f32 [num_q_heads]. Returns: f32 [n, num_q_heads] in [0, 1].
    """
    return -torch.expm1((learned_sinks - lse).clamp(max=0.0))
