"""Spending a budget: choices against all there are, formats that may be chosen, parts they make."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from skvq_ext import ops
from skvq_ext.calibrate import CalibrationError
from skvq_ext.calibrate.allocate import Choice, allocate
from skvq_ext.calibrate.formats import join_heads, open_pairs, read_pairs, shapes_of, split_layer
from skvq_ext.door import Door
from skvq_ext.geometry import Geometry
from skvq_ext.plan import LayerPlan, Plan, PlanError, TensorPlan
from skvq_ext.scheme import Scheme, SchemeError

BUDGET = Scheme.parse("bits2.25-g32-w16-sink3")


def random_units(seed: int, count: int = 4, choices: int = 5) -> list[list[Choice]]:
    """Errors that fall with bits, roughly: some choices are no use, some lie off every hull."""
    dice = torch.Generator().manual_seed(seed)
    units = []
    for _ in range(count):
        bits = (torch.randint(8, 40, (choices,), generator=dice) / 8).tolist()
        worth = float(torch.rand(1, generator=dice)) * 3
        noise = (0.4 * torch.randn(choices, generator=dice)).exp().tolist()
        pairs = zip(bits, noise, strict=True)
        units.append([Choice("k", str(b), b, worth * 4**-b * n) for b, n in pairs])
    return units


def total(chosen: Any) -> tuple[float, float]:
    return sum(c.bits for c in chosen), sum(c.error for c in chosen)


def hull_steps(unit: list[Choice]) -> list[float]:
    """What the error falls by in each step along the lower hull, by looking at every pair."""
    corners = [
        c
        for c in unit
        if not any(o.error <= c.error and o.bits <= c.bits and o != c for o in unit)
        and not any(
            a.bits < c.bits < b.bits
            and a.error + (b.error - a.error) * (c.bits - a.bits) / (b.bits - a.bits) < c.error
            for a, b in product(unit, unit)
        )
    ]
    errors = sorted((c.error for c in corners), reverse=True)
    return [a - b for a, b in pairwise(errors)]


def test_choices_are_within_one_step_of_the_best_there_are() -> None:
    off = []
    for seed in range(60):
        units = random_units(seed)
        least = sum(min(c.bits for c in unit) for unit in units) / 4
        budget = least + 0.3 + seed / 40
        spent, error = total(allocate(units, budget))
        assert spent <= 4 * budget + 1e-6
        best = min(total(way)[1] for way in product(*units) if total(way)[0] <= 4 * budget)
        largest = max(step for unit in units for step in hull_steps(unit) or [0.0])
        assert best - 1e-12 <= error <= best + largest + 1e-12
        off.append(error / best - 1)
    assert sum(x < 1e-9 for x in off) > 30 and sum(off) / len(off) < 0.1


def test_all_bits_are_spent_where_they_are_worth_most() -> None:
    cheap = [Choice("2", "2", 2.0, 1.0), Choice("4", "4", 4.0, 0.9)]
    dear = [Choice("2", "2", 2.0, 9.0), Choice("4", "4", 4.0, 0.5)]
    assert [c.k for c in allocate([cheap, dear, cheap], 2.7)] == ["2", "4", "2"]
    assert [c.k for c in allocate([cheap, dear, cheap], 4.0)] == ["4", "4", "4"]


def test_what_errs_more_with_more_bits_is_never_chosen() -> None:
    unit = [Choice("2", "2", 2.0, 1.0), Choice("3", "3", 3.0, 2.0), Choice("4", "4", 4.0, 1.0)]
    assert [c.k for c in allocate([unit] * 3, 9.0)] == ["2"] * 3


def test_what_is_left_over_is_spent_off_the_hull() -> None:
    """4 bits do not fit, and 3 bits, which no mixture needs, are better than 2."""
    unit = [Choice("2", "2", 2.0, 1.0), Choice("3", "3", 3.0, 0.9), Choice("4", "4", 4.0, 0.0)]
    assert [c.k for c in allocate([unit], 3.5)] == ["3"]


def test_a_budget_that_cannot_be_kept() -> None:
    with pytest.raises(
        CalibrationError, match=r"budget of 1\.2 bits .* narrowest formats take 1\."
    ):
        allocate([[Choice("1.5", "1.5", 1.625, 1.0)]] * 2, 1.2)
    (one,) = allocate([[Choice("1.5", "1.5", 1.625, 1.0)]], 1.625)
    assert one.bits == 1.625


def test_formats_that_are_open() -> None:
    narrow, wide = open_pairs(BUDGET, 64, None), open_pairs(BUDGET, 128, None)
    assert narrow[0] == ("2", "1.5") and len(set(narrow)) == 16
    assert set(wide) - set(narrow) == set(product(("3:1/2+2", "4:1/4+2"), ("1.5", "2", "3", "4")))
    assert open_pairs(Scheme.parse("k3-v2"), 64, None) == [("3", "2")]
    assert open_pairs(BUDGET, 64, [("4", "2")]) == [("4", "2")]
    with pytest.raises(CalibrationError, match="have no use with the scheme k3-v2-"):
        open_pairs(Scheme.parse("k3-v2"), 64, [("4", "2")])
    with pytest.raises(CalibrationError, match="formats is empty"):
        open_pairs(BUDGET, 64, [])


def test_formats_in_words() -> None:
    assert read_pairs("", BUDGET, 64) is None
    found = read_pairs("k2-v1.5, K3:1/2+2-v2 k4-v4", BUDGET, 64)
    assert found == [("2", "1.5"), ("3:1/2+2", "2"), ("4", "4")]
    for word in ("k2", "v2", "k2-w5", "g64-w3", "k2-v2-g64", "bits2.25-g32", "k2v2"):
        with pytest.raises(CalibrationError, match=f"'{word}' is not a pair such as"):
            read_pairs(f"k2-v2,{word}", BUDGET, 64)
    with pytest.raises(SchemeError, match="not a tensor format"):
        read_pairs("k5-v2", BUDGET, 64)


def test_formats_that_this_build_reads_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    built = [f"{name} at head_dim 64" for name in ("k3:32/64+2-v1.5-g32", "k2-v2-g32", "k4-v4-g64")]
    built += ["k8-v8-g32 at head_dim 128", "k2-v2-g128 at head_dim 256"]
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": {"instances": built}})
    assert read_pairs("cuda", BUDGET, 64) == [("3:1/2+2", "1.5"), ("2", "2")]
    assert read_pairs("cuda", Scheme.parse("bits3-ghead"), 64) == [("4", "4")]
    assert read_pairs("cuda", BUDGET, 128) == [("8", "8")]
    assert read_pairs("cuda", Scheme.parse("bits3-g128"), 256) == [("2", "2")]
    with pytest.raises(CalibrationError, match="no CUDA kernels for groups of 256 channels"):
        read_pairs("cuda", Scheme.parse("bits3-ghead"), 256)
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": None})
    with pytest.raises(CalibrationError, match="no CUDA kernels for groups of 32 channels"):
        read_pairs("cuda", BUDGET, 64)


def plan_of(scheme: Scheme = BUDGET) -> Plan:
    return Plan(scheme, Geometry(1, 4, 4, 64, sliding_windows=(0,)), [])


def test_shapes_keep_the_order_of_the_pairs() -> None:
    found = shapes_of(plan_of(), [("3", "2"), ("2", "2"), ("3", "1.5")])
    assert {side: list(codes) for side, codes in found.items()} == {
        "k": ["3", "2"],
        "v": ["2", "1.5"],
    }
    assert found["k"]["3"].levels == (8, 8) and found["v"]["1.5"].levels == (3, 3)


def random_tensors(code: str = "2") -> list[TensorPlan]:
    """One per kind of rotation, everything else random."""
    shape = plan_of().shapes_of(Scheme(code, "2", 32))["k"]
    dice, made = torch.Generator().manual_seed(0), []
    for kind in ("none", "hadamard", "dense"):
        plan = TensorPlan.neutral(1, shape, (-2, 0))
        plan.permutation = torch.randperm(64, generator=dice, dtype=torch.int32)[None]
        plan.shift = torch.randn(1, 64, generator=dice)
        plan.scale = torch.rand(1, 64, generator=dice) + 0.5
        plan.rotation = kind
        if kind == "dense":
            plan.dense = torch.linalg.qr(torch.randn(1, 64, 64, generator=dice)).Q
        made.append(plan)
    return made


@pytest.mark.parametrize("code", ["2", "3:1/2+2"])
@pytest.mark.parametrize("kinds", [(0, 1, 2), (1, 1), (0, 0), (2, 2), (0, 1)])
def test_joined_heads_do_what_each_does_alone(kinds: tuple[int, ...], code: str) -> None:
    alone = [random_tensors(code)[kind] for kind in kinds]
    joined = join_heads(alone)
    assert (joined.dense is None) == (kinds in [(1, 1), (0, 0)])
    x = torch.randn(9, len(kinds), 64)
    together = Door(LayerPlan(joined, joined), len(kinds))
    for head, tensor in enumerate(alone):
        door = Door(LayerPlan(tensor, tensor), 1)
        for name in ("map_k", "map_q", "unmap_o"):
            mine = getattr(door, name)(x[:, head : head + 1])[:, 0]
            torch.testing.assert_close(getattr(together, name)(x)[:, head], mine)


def test_heads_of_equal_formats_share_a_part() -> None:
    tensors = random_tensors()
    kinds = [("2", "2"), ("2", "1.5"), ("2", "2"), ("3", "2")]
    plan = split_layer(
        [(k, v, tensors[i % 3], tensors[1]) for i, (k, v) in enumerate(kinds)],
    )
    assert [(p.heads, p.k_format, p.v_format) for p in plan.parts] == [
        ((1,), "2", "1.5"),
        ((0, 2), "2", "2"),
        ((3,), "3", "2"),
    ]
    both = plan.parts[1].plan.k
    assert torch.equal(both.shift, torch.cat([tensors[0].shift, tensors[2].shift]))
    assert plan.parts[1].plan.v.rotation == "hadamard"


def test_heads_with_fewer_clip_ratios_repeat_their_first() -> None:
    one, other, third = random_tensors()
    other = replace(other, clip=torch.tensor([[[0.5, 0.7, 0.9]] * 2]))
    joined = join_heads([one, other, third]).clip
    assert joined.shape == (3, 2, 3)
    assert torch.equal(joined[0], torch.ones(2, 3)) and torch.equal(joined[1], other.clip[0])
    assert join_heads([one, third]).clip.shape == (2, 2)


def test_no_default_plan_without_formats() -> None:
    with pytest.raises(PlanError, match=r"leaves the formats of every head to a plan.*none"):
        Plan.default(Geometry(1, 4, 4, 64), BUDGET)
