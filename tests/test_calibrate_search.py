"""The search of one head: it reads back what the cache would, and what wins is what errs least."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from skvq_ext.calibrate import rotation, transforms
from skvq_ext.calibrate.objective import Error, HeadErrors, Softmax
from skvq_ext.calibrate.quantizer import CLIPS, HeadQuantizer
from skvq_ext.calibrate.search import LayerRows, Option, Shapes, search_head
from skvq_ext.calibrate.transforms import CANDIDATES
from skvq_ext.door import Door
from skvq_ext.plan import DEFAULT_EXPONENTS, LayerPlan, TensorPlan, TensorShape
from skvq_ext.reference import fake_quantize_side, quantize_group
from skvq_ext.scheme import Scheme

DIM = 64
SCHEME = Scheme.parse("bits2.3-g32-w16-sink3")


def shape_of(code: str, side: str = "k", scheme: Scheme = SCHEME) -> TensorShape:
    formats = {"k": code, "v": "2"} if side == "k" else {"k": "2", "v": code}
    return TensorShape.of(replace(scheme, bits=None, **formats).record_format(DIM), side)


def channels(*shape: int, seed: int) -> Tensor:
    """Rows with a mean and channels of very different size, as keys of real models have."""
    dice = torch.Generator().manual_seed(seed)
    sizes = (1.5 * torch.randn(DIM, generator=dice)).exp2()
    middle = 2 * torch.randn(DIM, generator=dice)
    return torch.randn(*shape, DIM, generator=dice) * sizes + middle


def random_tensor(shape: TensorShape, kind: str) -> TensorPlan:
    dice = torch.Generator().manual_seed(0)
    plan = TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS["k"])
    plan.permutation = torch.randperm(DIM, generator=dice, dtype=torch.int32)[None]
    plan.shift = torch.randn(1, DIM, generator=dice)
    plan.scale = torch.rand(1, DIM, generator=dice) + 0.5
    plan.clip = torch.rand(plan.clip.shape, generator=dice) / 2 + 0.5
    plan.rotation = kind
    if kind == "dense":
        plan.dense = torch.linalg.qr(torch.randn(1, DIM, DIM, generator=dice)).Q
    return plan


@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("kind", ["none", "hadamard", "dense"])
@pytest.mark.parametrize("code", ["2", "1.5", "4", "3:1/2+2", "4:1/4+2"])
def test_rows_come_back_as_the_reference_says(code: str, kind: str, meta: str) -> None:
    scheme = replace(SCHEME, meta=meta)
    shape = shape_of(code, scheme=scheme)
    plan, x = random_tensor(shape, kind), channels(90, seed=1)
    door = Door(LayerPlan(plan, plan), 1)
    record = replace(scheme, bits=None, k=code, v="2").record_format(DIM)
    inside = fake_quantize_side(
        door.map_k(x[:, None]), record, "k", plan.clip, plan.exponents.repeat(1, 2)
    )
    back = HeadQuantizer(plan, shape, meta).read_back(x)
    torch.testing.assert_close(back, door.unmap_o(inside)[:, 0], rtol=1e-6, atol=1e-6)
    assert (back - x).abs().max() > 0.01


@pytest.mark.parametrize("code", ["2", "3:1/2+2"])
def test_the_first_clip_is_the_best_of_the_grid(code: str) -> None:
    shape, x = shape_of(code), channels(700, seed=2)
    found = HeadQuantizer(random_tensor(shape, "hadamard"), shape, "fp8").fitted(x).tensor
    door = Door(LayerPlan(found, found), 1)
    rows = door.map_k(x[:, None])[:, 0]
    scale, zero = (int(n) for n in found.exponents[0])
    for index, ((start, stop), name) in enumerate(zip(shape.groups, shape.codes, strict=True)):
        errors = []
        for ratio in CLIPS:
            group = quantize_group(rows[:, start:stop], name, "fp8", ratio, scale, zero)
            errors.append(float((group.dequantize() - rows[:, start:stop]).square().sum()))
        chosen = errors[CLIPS.index(pytest.approx(float(found.clip[0, index])))]
        assert chosen <= min(errors) * (1 + 1e-6)
        assert chosen < 0.9 * errors[0], "3 bits and less need it"


def test_of_spread_ratios_every_token_takes_the_best() -> None:
    shape, x = shape_of("2"), channels(300, seed=8)
    start = HeadQuantizer(TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS["k"]), shape, "fp8")
    start = start.fitted(x)
    factors = (1.0, 0.8, 1.25)
    spread = start.spread(factors)
    assert spread.tensor.clip.shape == (1, len(shape.groups), 3)
    assert float(spread.tensor.clip.max()) <= 1

    def errors(one: HeadQuantizer) -> Tensor:
        return torch.stack([part.square().sum(-1) for part in (one.read_back(x) - x).split(32, -1)])

    least = torch.stack([errors(start.scaled(factor)) for factor in factors]).amin(0)
    assert bool((errors(spread) <= 1.01 * least).all())
    assert float(least.sum()) < 0.99 * float(errors(start).sum())


def test_stored_scales_have_room_for_unseen_rows() -> None:
    shape, x = shape_of("2"), channels(300, seed=3)
    found = HeadQuantizer(random_tensor(shape, "hadamard"), shape, "fp8").fitted(x).tensor
    rows = Door(LayerPlan(found, found), 1).map_k(x[:, None])[:, 0].split(32, -1)
    ranges = torch.stack([part.amax(-1) - part.amin(-1) for part in rows]).max() / 3
    reach = torch.stack([part.abs().amax() for part in rows]).max()
    for largest, exponent in zip((ranges, reach), found.exponents[0], strict=True):
        stored = float(largest) * 2.0 ** -int(exponent)
        assert 448 / 16 < stored <= 448 / 8, "eight times as large still fits into E4M3"


def test_a_head_without_any_range_keeps_the_default_exponents() -> None:
    shape = shape_of("2")
    neutral = TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS["k"])
    found = HeadQuantizer(neutral, shape, "fp8").fitted(torch.zeros(100, DIM))
    assert found.tensor.exponents.tolist() == [list(DEFAULT_EXPONENTS["k"])]
    assert torch.equal(found.read_back(torch.zeros(5, DIM)), torch.zeros(5, DIM))


def layer_rows(sliding_window: int = 0, lessons: bool = False) -> LayerRows:
    """One text, two KV heads of two query heads each; q asks for the keys of other tokens."""
    k, v = channels(1, 2, 200, seed=4), channels(1, 2, 200, seed=5)
    positions = torch.arange(20, 200, 3)
    dice = torch.Generator().manual_seed(6)
    asked = torch.randint(0, 200, (4, len(positions)), generator=dice)
    keys = (k - k.mean(2, keepdim=True)) / k.std(2, keepdim=True)
    q = torch.stack([keys[0, head // 2, asked[head]] for head in range(4)])[None]
    q = q / k.std(2).repeat_interleave(2, 1)[:, :, None]
    root = torch.randn(4, DIM, DIM, generator=dice).double()
    how = Softmax(0.5, sliding_window=sliding_window, sink_logits=torch.arange(4.0))
    # Rows of the same heads, of other tokens.
    other = channels(1, 2, 600, seed=4), channels(1, 2, 600, seed=5)
    taught = tuple(x[:, :, 200:] for x in other) if lessons else None
    return LayerRows(q.contiguous(), k, v, positions, how, root @ root.mT, taught)


def errors_of(layer: LayerRows, head: int) -> HeadErrors:
    mine = slice(2 * head, 2 * head + 2)
    sinks = layer.how.sink_logits
    assert sinks is not None
    return HeadErrors(
        (layer.q[:, mine], layer.k[:, head], layer.v[:, head]),
        layer.positions,
        replace(layer.how, sink_logits=sinks[mine]),
        layer.fisher[mine],
        window=SCHEME.window,
        sinks=SCHEME.sinks,
    )


def measure(layer: LayerRows, head: int, side: str, tensor: TensorPlan, code: str) -> Error:
    """The error of a head with K or V stored so."""
    errors = errors_of(layer, head)
    whole = errors.k if side == "k" else errors.v
    quantizer = HeadQuantizer(tensor, shape_of(code, side), "fp8")
    back = quantizer.read_back(whole.flatten(0, 1)).view_as(whole)
    return errors.of_keys(back) if side == "k" else errors.of_values(back)


def pooled(error: Error) -> float:
    return 3 * error.fit + error.held  # three of four queries are in the first


def shapes(k: tuple[str, ...], v: tuple[str, ...]) -> Shapes:
    sides = {"k": k, "v": v}
    return {side: {x: shape_of(x, side) for x in codes} for side, codes in sides.items()}


@pytest.fixture
def _short_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_STEPS", 6)


def identity_of(layer: LayerRows, head: int, side: str, code: str) -> Error:
    """The error of a head that is stored as it is, without transform and clip."""
    shape, rows = shape_of(code, side), layer.k if side == "k" else layer.v
    neutral = TensorPlan.neutral(1, shape, DEFAULT_EXPONENTS[side])
    fitted = HeadQuantizer(neutral, shape, "fp8").fitted(rows[0, head, SCHEME.sinks :]).tensor
    return measure(layer, head, side, replace(neutral, exponents=fitted.exponents), code)


@pytest.mark.usefixtures("_short_descent")
@pytest.mark.parametrize("head", [0, 1])
def test_what_wins_is_never_worse_than_doing_nothing(head: int) -> None:
    layer, open_formats = layer_rows(), shapes(("2", "3:1/2+2"), ("1.5",))
    found = search_head(layer, head, open_formats, SCHEME, 0)
    assert {side: list(codes) for side, codes in found.items()} == {
        side: list(codes) for side, codes in open_formats.items()
    }
    for side, code in (("k", "2"), ("k", "3:1/2+2"), ("v", "1.5")):
        option = found[side][code]
        assert option.name in CANDIDATES
        assert option.error == measure(layer, head, side, option.tensor, code)
        identity = identity_of(layer, head, side, code)
        assert pooled(option.error) <= pooled(identity)
        if side == "k":  # channels of very different size: there is a lot to win
            assert option.error.fit < 0.5 * identity.fit


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The rows that every rotation was learned from."""
    rows: list[Tensor] = []

    def learn(given: Tensor, start: Tensor, *args: Any) -> Tensor:
        rows.append(given)
        return start

    monkeypatch.setattr(transforms, "learn_rotation", learn)
    return rows


def test_rotations_are_learned_from_lessons_only(taught: list[Tensor]) -> None:
    scheme = replace(SCHEME, clip=1.0)
    for lessons in (False, True):
        layer = layer_rows(lessons=lessons)
        search_head(layer, 0, shapes(("2", "3"), ("1.5",)), scheme, 0)
    # Two ways, at most, to be learned for K and for V; other formats of the same groups share them.
    assert 1 <= len(taught) <= 4
    assert {len(rows) for rows in taught} == {400 - SCHEME.sinks}


@pytest.mark.usefixtures("_short_descent")
def test_more_bits_err_less_and_equal_seeds_find_the_same() -> None:
    layer = layer_rows()
    open_formats = shapes(("2", "4"), ("1.5", "3"))
    one, same = (search_head(layer, 1, open_formats, SCHEME, 0) for _ in range(2))
    for side, (few, many) in (("k", ("2", "4")), ("v", ("1.5", "3"))):
        assert one[side][many].error.nats < 0.3 * one[side][few].error.nats
        for code in (few, many):
            a, b = one[side][code], same[side][code]
            assert (a.name, a.error) == (b.name, b.error)
            others = b.tensor.tensors()
            assert all(torch.equal(x, others[part]) for part, x in a.tensor.tensors().items())


@pytest.mark.parametrize(
    ("named", "names", "clip"),
    [
        ("centre-hadamard-clip0.8", {"named"}, 0.8),
        ("balance", {"named"}, 1.0),
        ("identity-clip", {"identity"}, None),
        ("clip0.1", set(CANDIDATES), 0.1),
    ],
)
@pytest.mark.usefixtures("_short_descent")
def test_what_the_scheme_names_is_kept(named: str, names: set[str], clip: float | None) -> None:
    scheme = Scheme.parse(f"k2-v1.5-g32-w16-sink3-{named}")
    found = search_head(layer_rows(), 0, shapes(("2",), ("1.5",)), scheme, 0)
    for option in (found["k"]["2"], found["v"]["1.5"]):
        assert option.name in names
        if clip is not None:
            assert torch.equal(option.tensor.clip, torch.full_like(option.tensor.clip, clip))
        elif option is found["k"]["2"]:
            assert bool((option.tensor.clip < 1).any())
        if named.startswith("centre"):
            assert option.tensor.rotation == "hadamard" and bool(option.tensor.shift.any())


def test_a_layer_whose_window_hides_all_old_tokens_costs_nothing() -> None:
    scheme = replace(SCHEME, transform=frozenset({"hadamard"}), clip=1.0)
    found = search_head(layer_rows(sliding_window=16), 0, shapes(("2",), ("2",)), scheme, 0)
    for option in (found["k"]["2"], found["v"]["2"]):
        assert isinstance(option, Option) and option.error == Error(0.0, 0.0, 0.0)
