"""The proof: attention over transformed k, v and q, undone on o, is plain attention."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from skvq_ext.door import Door, token_share
from skvq_ext.plan import LayerPlan, TensorPlan, TensorShape

SCALE = 0.125


def tensor_plan(
    heads: int, dim: int, edges: tuple[int, ...], rotation: str, size: float
) -> TensorPlan:
    groups = tuple(pairwise(edges))
    plan = TensorPlan.neutral(heads, TensorShape(dim, edges, groups, (), ()), (0, 0))
    plan.permutation = torch.stack([torch.randperm(dim, dtype=torch.int32) for _ in range(heads)])
    plan.shift = size * torch.randn(heads, dim)
    plan.scale = 2 ** torch.randn(heads, dim)
    plan.rotation = rotation
    if rotation == "dense":
        plan.dense = torch.linalg.qr(torch.randn(heads, dim, dim)).Q
    return plan


def make_door(heads: int, ratio: int, dim: int, rotation: str, size: float = 1.0) -> Door:
    edges = (0, dim // 2, dim) if dim % 32 == 0 else (0, dim)
    layer = LayerPlan(
        tensor_plan(heads, dim, edges, rotation, size),
        tensor_plan(heads, dim, edges, rotation, size),
    )
    return Door(layer, heads * ratio)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All queries over all tokens in float64: out f32 [n, Hq, D], lse f64 [n, Hq], sink logit in it."""
    ratio = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    logits = SCALE * torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(ratio, 1))
    if shift is not None:
        logits = logits + shift[..., None].to(logits)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse))
    out = torch.einsum(
        "qhk,khd->qhd", (logits - lse[..., None]).exp(), v.repeat_interleave(ratio, 1)
    )
    return out.float(), lse


def rows(n: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, heads, dim).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rotation", ["none", "hadamard", "dense"])
@pytest.mark.parametrize(("heads", "ratio"), [(1, 1), (4, 1), (2, 7), (1, 71)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_attention_is_unchanged(rotation: str, heads: int, ratio: int, dim: int) -> None:
    door = make_door(heads, ratio, dim, rotation)
    q = rows(5, heads * ratio, dim)
    k, v = rows(40, heads, dim), rows(40, heads, dim)
    out, lse = attend(q, k, v)
    mapped, mapped_lse = attend(door.map_q(q), door.map_k(k), door.map_v(v))
    # All that is left is float32 rounding on the way in and out.
    assert (door.unmap_o(mapped) - out).abs().max() <= 1e-4
    shift = door.logit_shift(q, SCALE)
    assert shift is not None and shift.dtype == torch.float32
    assert (mapped_lse + shift - lse).abs().max() <= 1e-4


def test_dense_rotation_of_a_hadamard_is_the_hadamard() -> None:
    """Both code paths of the rotation turn the same way round."""
    from skvq_ext.hadamard import block_hadamard

    plan = tensor_plan(2, 64, (0, 16, 64), "hadamard", 1.0)
    dense = TensorPlan(**{**vars(plan), "rotation": "dense"})
    dense.dense = block_hadamard((0, 16, 64)).float().repeat(2, 1, 1)
    a, b = Door(LayerPlan(plan, plan), 6), Door(LayerPlan(dense, dense), 6)
    k, q = rows(9, 2, 64), rows(9, 6, 64)
    for one, other in (
        (a.map_k(k), b.map_k(k)),
        (a.map_q(q), b.map_q(q)),
        (a.unmap_o(q), b.unmap_o(q)),
    ):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_softcap_needs_the_logit_shift(size: float) -> None:
    door = make_door(2, 3, 64, "hadamard", size)
    q, k, v = (
        rows(5, 6, 64),
        rows(40, 2, 64),
        rows(40, 2, 64),
    )
    k = k + size
    out, _ = attend(q, k, v, softcap=20.0)
    inside = (door.map_q(q), door.map_k(k), door.map_v(v))
    mapped, _ = attend(*inside, shift=door.logit_shift(q, SCALE), softcap=20.0)
    assert (door.unmap_o(mapped) - out).abs().max() <= 1e-4  # logit_shift is float32
    wrong, _ = attend(*inside, softcap=20.0)
    assert (door.unmap_o(wrong) - out).abs().max() > 1e-2


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_learned_sinks_need_shift_and_share(size: float) -> None:
    door = make_door(2, 3, 64, "hadamard", size)
    q, k, v = (
        rows(5, 6, 64),
        rows(40, 2, 64),
        rows(40, 2, 64),
    )
    sinks = torch.randn(6) + 4
    out, lse = attend(q, k, v, sinks=sinks)
    mapped, mapped_lse = attend(
        door.map_q(q), door.map_k(k), door.map_v(v), door.logit_shift(q, SCALE), sinks=sinks
    )
    assert (mapped_lse - lse).abs().max() <= 1e-4
    share = token_share(mapped_lse.float(), sinks)
    assert share.min() >= 0 and share.max() < 1
    assert (door.unmap_o(mapped, mapped_lse, share) - out).abs().max() <= 1e-4 * size
    assert (door.unmap_o(mapped) - out).abs().max() > 1e-2


def test_merging_by_lse_needs_the_shift() -> None:
    door = make_door(2, 3, 64, "hadamard", 30.0)
    q, k, v = (
        rows(5, 6, 64),
        rows(40, 2, 64),
        rows(40, 2, 64),
    )
    out, lse = attend(q, k, v)
    cached, cached_lse = attend(
        door.map_q(q), door.map_k(k[:25]), door.map_v(v[:25]), door.logit_shift(q, SCALE)
    )
    outside, outside_lse = attend(q, k[25:], v[25:])
    merged_lse = torch.logaddexp(cached_lse, outside_lse)
    merged = (cached_lse - merged_lse).exp()[..., None] * door.unmap_o(cached, cached_lse)
    merged += (outside_lse - merged_lse).exp()[..., None] * outside
    assert (merged - out).abs().max() <= 1e-3
    assert (merged_lse - lse).abs().max() <= 1e-3


def test_a_row_that_saw_nothing_stays_zero() -> None:
    door = make_door(2, 1, 64, "hadamard")
    lse = torch.tensor([[-torch.inf, 0.0], [1.0, -torch.inf]])
    out = door.unmap_o(torch.zeros(2, 2, 64), lse)
    assert not out[lse == -torch.inf].any()
    assert out[lse > -torch.inf].any(-1).all()
    sinks = torch.tensor([2.0, 3.0])
    assert torch.equal(token_share(sinks.expand(2, 2), sinks), torch.zeros(2, 2))


def test_a_door_that_changes_nothing_costs_nothing() -> None:
    plan = TensorPlan.neutral(2, TensorShape(64, (0, 64), ((0, 64),), (), ()), (0, 0))
    door = Door(LayerPlan(plan, plan), 6)
    k, q = rows(3, 2, 64, torch.float16), rows(3, 6, 64, torch.float16)
    assert door.map_k(k) is k and door.map_v(k) is k
    assert door.map_q(q) is q and door.unmap_o(q) is q
    assert door.logit_shift(q, SCALE) is None
    assert door.nbytes() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_shape_are_kept_for_strided_input(dtype: torch.dtype) -> None:
    door = make_door(2, 3, 64, "dense")
    k = torch.randn(2, 7, 64).transpose(0, 1).to(dtype)
    q = torch.randn(6, 7, 64).transpose(0, 1).to(dtype)
    for x, mapped in (
        (k, door.map_k(k)),
        (k, door.map_v(k)),
        (q, door.map_q(q)),
        (q, door.unmap_o(q)),
    ):
        assert mapped.dtype == dtype and mapped.shape == x.shape
    assert torch.equal(door.map_k(k), door.map_k(k.contiguous()))
    assert door.map_k(k[:0]).shape == (0, 2, 64)


def test_doors_of_one_plan_share_the_hadamard() -> None:
    plan = TensorPlan.neutral(2, TensorShape(64, (0, 64), ((0, 64),), (), ()), (0, 0))
    plan.rotation = "hadamard"
    assert Door(LayerPlan(plan, plan), 6).nbytes() == 64 * 64 * 4


@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
def test_a_row_does_not_depend_on_its_company(rotation: str) -> None:
    door = make_door(2, 3, 128, rotation)
    k, q = rows(200, 2, 128), rows(200, 6, 128)
    for x, mapping in ((k, door.map_k), (k, door.map_v), (q, door.map_q), (q, door.unmap_o)):
        together = mapping(x)
        assert torch.equal(together, torch.cat([mapping(x[i : i + 1]) for i in range(200)]))
        assert torch.equal(together[:77], mapping(x[:77]))


def test_query_heads_must_divide() -> None:
    plan = TensorPlan.neutral(2, TensorShape(64, (0, 64), ((0, 64),), (), ()), (0, 0))
    with pytest.raises(ValueError, match="5 is not a multiple of the 2 KV heads"):
        Door(LayerPlan(plan, plan), 5)
