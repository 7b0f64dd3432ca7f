"""Transforms that may suit a head: what each does before quantization, from statistics of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skvq_ext.balance import balanced_scale
from skvq_ext.calibrate.rotation import learn_rotation, principal_rotation
from skvq_ext.plan import TensorPlan, TensorShape


@dataclass(frozen=True)
class HeadRows:
    """Rows of K or of V of one head on calibration data.

    rows: f32 [n, D], such as get quantized. energy: f64 [D], what a squared error in a channel is
    worth: the power of the queries for K, of the gradients for V. shape: of the format it is for.
    neutral: the plan that changes nothing. seed: of what a rotation is learned on.
    """

    rows: Tensor
    energy: Tensor
    shape: TensorShape
    neutral: TensorPlan
    seed: int

    @property
    def mean(self) -> Tensor:
        """f64 [D]."""
        return self.rows.double().mean(0)

    def power(self, centred: bool) -> Tensor:
        """Mean square per channel, f64 [D], about the mean or about zero."""
        mean = self.mean if centred else 0.0
        return (self.rows.double() - mean).square().mean(0)


def _compose(head: HeadRows, centre: bool, balance: bool, rotation: str) -> TensorPlan:
    power = head.power(centre)
    scale = (
        balanced_scale(power[None], head.energy[None]) if balance else torch.ones_like(power)[None]
    )
    plan = replace(head.neutral, rotation="none")
    if centre:
        plan = replace(plan, shift=head.mean.float()[None])
    if rotation in ("principal", "learned"):
        plan = replace(plan, scale=scale.float())
        inside = ((head.rows.double() - plan.shift.double()) / plan.scale.double()).float()
        matrix = principal_rotation(inside, head.shape.band_edges)
        # Bands part the principal axes as well as they can be; descent found nothing better there.
        if rotation == "learned" and len(head.shape.band_edges) == 2:
            matrix = learn_rotation(inside, matrix, head.shape, head.seed)
        return replace(plan, rotation="dense", dense=matrix[None])
    if len(head.shape.band_edges) > 2:
        # The first band is the wider one: the channels whose error would weigh most go there.
        order = (power * head.energy)[None].argsort(stable=True, dim=-1, descending=True)
        plan = replace(plan, permutation=order.int())
        scale = scale.gather(-1, order)
    elif rotation == "none":
        # Channels of equal range next to each other, so that they share a group.
        reach = (head.rows - plan.shift).abs().amax(0)
        order = reach[None].argsort(stable=True, dim=-1)
        plan = replace(plan, permutation=order.int())
        scale = scale.gather(-1, order)
    return replace(plan, scale=scale.float(), rotation=rotation)


Make = Callable[[HeadRows], TensorPlan]

CANDIDATES: dict[str, Make] = {
    "identity": lambda head: head.neutral,
    "reorder": lambda head: _compose(head, False, False, "none"),
    "centre-reorder": lambda head: _compose(head, True, False, "none"),
    "hadamard": lambda head: _compose(head, False, False, "hadamard"),
    "balance-hadamard": lambda head: _compose(head, False, True, "hadamard"),
    "centre-hadamard": lambda head: _compose(head, True, False, "hadamard"),
    "centre-balance-hadamard": lambda head: _compose(head, True, True, "hadamard"),
    "balance-principal": lambda head: _compose(head, False, True, "principal"),
    "centre-balance-principal": lambda head: _compose(head, True, True, "principal"),
    "balance-learned": lambda head: _compose(head, False, True, "learned"),
    "centre-balance-learned": lambda head: _compose(head, True, True, "learned"),
}
"""By name, in the order in which ties are settled."""

LEARNED = {
    "balance-learned": "balance-principal",
    "centre-balance-learned": "centre-balance-principal",
}
"""Candidates that are learned, and what each starts from."""


def candidates(transform: frozenset[str] | None) -> dict[str, Make]:
    """The transforms a scheme leaves open: all of them, or the very composition it names."""
    if transform is None:
        return CANDIDATES
    centre, balance = "centre" in transform, "balance" in transform
    rotation = "hadamard" if "hadamard" in transform else "none"
    if not transform:
        return {"identity": CANDIDATES["identity"]}
    return {"named": lambda head: _compose(head, centre, balance, rotation)}
