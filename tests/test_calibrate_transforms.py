"""What a head may go through before quantization: every transform keeps attention as it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from skvq_ext.balance import balanced_scale
from skvq_ext.calibrate.rotation import learn_rotation, principal_rotation
from skvq_ext.calibrate.transforms import CANDIDATES, HeadRows, candidates
from skvq_ext.door import Door
from skvq_ext.plan import DEFAULT_EXPONENTS, LayerPlan, TensorPlan, TensorShape, check_tensor
from skvq_ext.scheme import Scheme

DIM = 64
ONE, BANDS = "2", "3:1/2+2"


def shape_of(code: str, group: int = 32) -> TensorShape:
    return TensorShape.of(Scheme(code, "2", group).record_format(DIM), "k")


def channels(seed: int = 0, rows: int = 600) -> Tensor:
    """Rows with a mean, channels of very different size that depend on each other, and tails."""
    dice = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, DIM, generator=dice) @ torch.randn(DIM, DIM, generator=dice) / 8
    sizes = (1.5 * torch.randn(DIM, generator=dice)).exp2()
    spikes = 1 + 3 * (torch.rand(rows, 1, generator=dice) > 0.95)
    return (mixed * sizes) * spikes + 3 * torch.randn(DIM, generator=dice)


def head_of(code: str = ONE, group: int = 32) -> HeadRows:
    shape = shape_of(code, group)
    energy = torch.rand(DIM, generator=torch.Generator().manual_seed(1)).double() ** 4
    neutral = TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS["k"])
    return HeadRows(channels(), energy, shape, neutral, seed=0)


@pytest.mark.parametrize("code", [ONE, BANDS])
@pytest.mark.parametrize("name", CANDIDATES)
def test_attention_stays_what_it_is(name: str, code: str) -> None:
    """y · q' = q · (x - m), and what goes in comes out."""
    head = head_of(code)
    plan = CANDIDATES[name](head)
    check_tensor(name, plan, 1, head.shape)
    door, q = Door(LayerPlan(plan, plan), 1), channels(seed=3, rows=50)
    inside = door.map_v(head.rows[:, None])[:, 0].double()
    dots = door.map_q(q[:, None])[:, 0].double() @ inside.mT
    expected = q.double() @ (head.rows.double() - plan.shift.double()).mT
    torch.testing.assert_close(dots, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    out = door.unmap_o(inside.float()[:, None])[:, 0]
    torch.testing.assert_close(out, head.rows, rtol=1e-3, atol=1e-3)
    again = CANDIDATES[name](head)
    assert all(torch.equal(x, again.tensors()[part]) for part, x in plan.tensors().items())


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_name_says_what_is_in_it(name: str) -> None:
    head = head_of()
    plan = CANDIDATES[name](head)
    mean = head.rows.mean(0) if "centre" in name else torch.zeros(DIM)
    assert torch.allclose(plan.shift[0], mean, atol=1e-5)
    kinds = {"hadamard": "hadamard", "principal": "dense", "learned": "dense"}
    assert plan.rotation == kinds.get(name.split("-")[-1], "none")
    power = (head.rows.double() - plan.shift.double()).square().mean(0)
    scale = balanced_scale(power[None], head.energy[None]) if "balance" in name else torch.ones(1)
    assert torch.allclose(plan.scale.double(), scale.double(), rtol=1e-5)


def test_reordered_channels_of_equal_range_are_neighbours() -> None:
    head = head_of()
    for name, shift in (("reorder", 0.0), ("centre-reorder", head.rows.mean(0))):
        order = CANDIDATES[name](head).permutation[0].long()
        reach = (head.rows - shift).abs().amax(0)[order]
        assert bool((reach.diff() >= -1e-5 * reach[1:]).all())


@pytest.mark.parametrize("name", ["reorder", "hadamard", "centre-balance-hadamard"])
def test_the_wide_band_gets_the_channels_whose_error_weighs_most(name: str) -> None:
    head = head_of(BANDS)
    plan = CANDIDATES[name](head)
    power = (head.rows.double() - plan.shift.double()).square().mean(0)
    weight = (power * head.energy)[plan.permutation[0].long()]
    assert bool((weight.diff() <= 1e-12).all())


@pytest.mark.parametrize("edges", [(0, 64), (0, 32, 64), (0, 16, 64)])
def test_principal_axes_spread_power_evenly_over_each_band(edges: tuple[int, ...]) -> None:
    rows = channels() - channels().mean(0)
    rotation = principal_rotation(rows, edges)
    assert torch.allclose(
        rotation.double() @ rotation.double().mT, torch.eye(64).double(), atol=1e-5
    )
    assert torch.equal(rotation, principal_rotation(rows.clone(), edges))
    power = (rows.double() @ rotation.double().mT).square().mean(0)
    values = torch.linalg.svdvals(rows.double()).square() / len(rows)  # largest first
    for start, stop in pairwise(edges):
        share = values[start:stop].mean()
        assert torch.allclose(power[start:stop], share.expand(stop - start), rtol=1e-4)


def rounding_error(y: Tensor, shape: TensorShape) -> float:
    """Mean square of rounding rows to the levels of each group, over a range that is clipped a bit."""
    total, y = 0.0, y.double()
    for (start, stop), levels in zip(shape.groups, shape.levels, strict=True):
        x = y[:, start:stop]
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        cut = (high - low) / 2 * 0.9 / levels
        step = (high - low - 2 * cut) / (levels - 1)
        codes = ((x - low - cut) / step).round().clamp(0, levels - 1)
        total += float((low + cut + codes * step - x).square().sum())
    return total / y.numel()


@pytest.mark.parametrize("code", [ONE, BANDS])
def test_a_learned_rotation_errs_less_than_what_it_started_from(code: str) -> None:
    shape = shape_of(code)
    rows = channels() - channels().mean(0)
    rows = rows / rows.std(0).sqrt()  # balanced, as it gets them
    start = principal_rotation(rows, shape.band_edges)
    learned = learn_rotation(rows, start, shape, seed=0)
    assert torch.equal(learned, learn_rotation(rows, start, shape, seed=0))
    assert not torch.equal(learned, learn_rotation(rows, start, shape, seed=1))
    assert torch.allclose(learned.double() @ learned.double().mT, torch.eye(64).double(), atol=1e-5)
    before, after = (rounding_error(rows @ r.mT, shape) for r in (start, learned))
    assert after < 0.97 * before


def test_where_nothing_can_be_gained_the_start_is_kept() -> None:
    """Rows of two values are rounded without error; every turn away from that errs."""
    rows = torch.randint(0, 2, (600, DIM), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    shape = shape_of("8")
    start = torch.eye(DIM)
    assert torch.equal(learn_rotation(rows, start, shape, seed=0), start)


def test_bands_keep_their_principal_axes() -> None:
    head = head_of(BANDS)
    learned, principal = (CANDIDATES[f"balance-{name}"](head) for name in ("learned", "principal"))
    assert learned.dense is not None and principal.dense is not None
    assert torch.equal(learned.dense, principal.dense)


@pytest.mark.parametrize(
    ("named", "shifted", "scaled", "rotation"),
    [
        ("centre", True, False, "none"),
        ("balance", False, True, "none"),
        ("hadamard", False, False, "hadamard"),
        ("centre-balance-hadamard", True, True, "hadamard"),
    ],
)
def test_a_scheme_may_name_the_composition(
    named: str, shifted: bool, scaled: bool, rotation: str
) -> None:
    (made,) = candidates(frozenset(named.split("-"))).values()
    plan = made(head_of())
    assert (bool(plan.shift.any()), bool((plan.scale != 1).any())) == (shifted, scaled)
    assert plan.rotation == rotation


def test_what_a_scheme_leaves_open() -> None:
    assert candidates(None) == CANDIDATES
    assert list(candidates(frozenset())) == ["identity"]


def test_balanced_scale_makes_both_sides_equal() -> None:
    power, energy = (torch.rand(3, 64, generator=torch.Generator()).double() for _ in range(2))
    scale = balanced_scale(power, energy)
    ratio = (power / scale**2) / (energy * scale**2)
    assert torch.allclose(ratio, ratio.mean(-1, keepdim=True).expand_as(ratio))
    assert torch.allclose(scale.log().mean(-1), torch.zeros(3).double())


def test_balanced_scale_survives_dead_channels() -> None:
    power = torch.ones(3, 64, dtype=torch.float64)
    energy = torch.ones(3, 64, dtype=torch.float64)
    power[0, 0], energy[0, 1], power[1], energy[2] = 0, 0, 0, 0
    scale = balanced_scale(power, energy)
    assert torch.isfinite(scale).all() and scale.min() >= 0.0099 and scale.max() <= 101
    assert scale[0, 0] < 0.1 and scale[0, 1] > 10
    assert torch.equal(scale[1:], torch.ones(2, 64, dtype=torch.float64))
