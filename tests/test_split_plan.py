"""Plans whose heads have formats of their own: files, averages, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import edited
from test_split_cache import DIM, GROUP, HEADS, SCHEME, model_plan, split_plan
from torch import Tensor

from skvq_ext.geometry import Geometry
from skvq_ext.plan import LayerPlan, Plan, PlanError, SplitPlan
from skvq_ext.scheme import Scheme


def test_file_round_trips_and_is_deterministic(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    plan = replace(model_plan(), origin="made in a test", tokenizer="0123")
    plan.save(paths[0])
    replace(model_plan(), origin="made in a test", tokenizer="0123").save(paths[1])
    loaded = Plan.load(paths[0], plan.geometry, SCHEME, "0123")
    loaded.save(paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()
    assert (loaded.scheme, loaded.geometry, loaded.origin) == (SCHEME, plan.geometry, plan.origin)
    for mine, theirs in zip(plan.layers, loaded.layers, strict=True):
        assert isinstance(mine, SplitPlan) and isinstance(theirs, SplitPlan)
        for part, other in zip(mine.parts, theirs.parts, strict=True):
            assert (part.heads, part.k_format, part.v_format) == (
                *(other.heads, other.k_format),
                other.v_format,
            )
            for side in ("k", "v"):
                a, b = getattr(part.plan, side), getattr(other.plan, side)
                assert (a.rotation, a.band_edges) == (b.rotation, b.band_edges)
                there = b.tensors()
                assert all(torch.equal(x, there[name]) for name, x in a.tensors().items())


def test_bits_are_averaged_over_heads() -> None:
    plan = model_plan()
    two, one = (
        Scheme(*code, 32).record_format(DIM).bits_per_value
        for code in (("2", "1.5"), ("3:1/2+2", "4"))
    )
    assert plan.bits_per_value == pytest.approx((2 * two + one) / 3)
    assert plan.shapes == {}


def cut(heads: Any) -> SplitPlan:
    """The parts of a layer with other numbers of heads."""
    first, second = split_plan().parts
    return SplitPlan((replace(first, heads=heads), second))


@pytest.mark.parametrize("heads", [(2, 1), (2, 3), (2, 2), (-1, 0)])
def test_each_head_is_there_once(heads: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="not each head once"):
        cut(heads)


def test_a_layer_without_parts_is_none() -> None:
    with pytest.raises(PlanError, match=r"hold heads \[\], not each head once"):
        SplitPlan(())


def test_broken_plans_are_not_written(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.safetensors", model_plan()
    smaller = replace(plan, geometry=replace(plan.geometry, num_kv_heads=2, num_q_heads=4))
    with pytest.raises(PlanError, match="layer 0: its parts hold 3 heads, the model has 2"):
        smaller.save(path)
    named = replace(plan, scheme=Scheme.parse("k2-v1.5-g32-w16-sink3"))
    with pytest.raises(PlanError, match="layer 0 has formats per head"):
        named.save(path)
    default = Plan.default(plan.geometry, named.scheme)
    with pytest.raises(PlanError, match="layer 0 has formats of the scheme"):
        replace(default, scheme=SCHEME).save(path)
    layer = plan.layers[1]
    assert isinstance(layer, SplitPlan)
    layer.parts[1].plan.v.shift[0, 3] = torch.nan
    with pytest.raises(PlanError, match=r"layers\.001\.1 v\.shift holds NaN"):
        plan.save(path)
    assert not list(tmp_path.iterdir())


def described(change: dict[str, Any]) -> list[dict[str, Any]]:
    """What the header says of the layers, its very first part changed."""
    kinds = {(2, 0): ["dense", "dense"], (1,): ["none", "none"]}
    layers = [
        {
            "parts": [
                {
                    "heads": list(part.heads),
                    "formats": [part.k_format, part.v_format],
                    "rotations": kinds[part.heads],
                }
                for part in split_plan().parts
            ]
        }
        for _ in range(2)
    ]
    layers[0]["parts"][0] |= change
    return layers


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"layers": described({"heads": [2, 1]})}, "not each head once"),
        ({"layers": described({"heads": [2, 0, 3]})}, "hold 4 heads, the model has 3"),
        ({"layers": described({"heads": ["2", 0]})}, "is damaged"),
        ({"layers": described({"formats": ["2"]})}, "is damaged"),
        ({"layers": described({"formats": ["5", "2"]})}, "is damaged: k5: not a tensor format"),
        ({"layers": described({"formats": ["3", "4:1/4+2"]})}, "clip is"),
        ({"layers": described({"rotations": ["dense"]})}, "is damaged"),
        ({"layers": described({})[:1]}, "has 1 layers for a model of 2"),
        ({"layers": [{"rotations": ["none", "none"]}] * 2}, "is damaged: 'parts'"),
        ({"scheme": "k2-v1.5-g32"}, "is damaged: 'rotations'"),
        ({"scheme": None}, "is damaged"),
    ],
)
def test_damaged_headers_are_refused(
    tmp_path: Path, header: dict[str, object], message: str
) -> None:
    path = tmp_path / "plan.safetensors"
    model_plan().save(path)
    assert Plan.load(edited(path, {}, {"layers": described({})})).layers
    with pytest.raises(PlanError, match=message):
        Plan.load(edited(path, {}, header))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.001.0.k.clip", None, r"is damaged: 'layers\.001\.0\.k\.clip'"),
        ("layers.001.0.k.shift", torch.zeros(1, 64), r"need torch.float32 \[2, 64\]"),
        ("layers.001.1.k.clip", torch.ones(1, 3), r"\[1, 3\]; .* need torch.float32 \[1, 2\]"),
        ("layers.001.2.k.clip", torch.ones(1, 2), "holds tensors no plan has"),
    ],
)
def test_damaged_tensors_are_refused(
    tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    path = tmp_path / "plan.safetensors"
    model_plan().save(path)
    with pytest.raises(PlanError, match=message):
        Plan.load(edited(path, {name: value}, {}))


def test_a_plan_fits_its_own_budget_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    model_plan().save(path)
    for text in ("bits3-g32-w128-sink5-rollback9", "bits3.0-g32"):
        assert Plan.load(path, scheme=Scheme.parse(text)).layers
    with pytest.raises(PlanError, match=r"bits: 2\.5 here, 3\.0 in the plan"):
        Plan.load(path, scheme=Scheme.parse("bits2.5-g32"))
    with pytest.raises(PlanError, match=r"k: '2' here, 'mix' in the plan"):
        Plan.load(path, scheme=Scheme.parse("k2-v1.5-g32"))
    with pytest.raises(PlanError, match=r"num_kv_heads: 6 here, 3 in the plan"):
        Plan.load(path, Geometry(2, HEADS * GROUP, 6, DIM))


def test_layers_of_one_format_are_no_split(tmp_path: Path) -> None:
    plan = Plan.default(model_plan().geometry, Scheme.parse("k2-v1.5-g32"))
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert all(isinstance(layer, LayerPlan) for layer in loaded.layers)
    ((where, part), *_) = loaded.named_parts()
    assert (where, part.heads, part.k_format) == ("layers.000", (0, 1, 2), "2")
