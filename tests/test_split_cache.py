"""A layer whose heads have formats of their own: every head as if it were alone, files, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hf_models import ReferenceCache, make_model, make_tokens
from layer_oracle import starts
from torch import Tensor
from transformers import DynamicCache

from skvq_ext import ops
from skvq_ext.cache import SkvqCache
from skvq_ext.calibrate.formats import join_heads
from skvq_ext.door import Door, token_share
from skvq_ext.geometry import Geometry
from skvq_ext.hf import SkvqHFCache
from skvq_ext.layer_cache import LayerCache
from skvq_ext.plan import LayerPlan, Part, Plan, SplitPlan, TensorPlan
from skvq_ext.reference import ReferenceSequence
from skvq_ext.scheme import Scheme
from skvq_ext.split_cache import SplitLayerCache, make_layer_cache

HEADS, GROUP, DIM = 3, 2, 64
SCHEME = Scheme.parse("bits3-g32-w16-sink3")
FORMATS = {(2, 0): ("2", "1.5"), (1,): ("3:1/2+2", "4")}
ROTATIONS = ("hadamard", "none", "dense")


def head_plan(head: int, code: tuple[str, str]) -> LayerPlan:
    """One head's plan with every step in use."""
    record = Scheme(*code, 32).record_format(DIM)
    dice, made = torch.Generator().manual_seed(head), []
    for side in ("k", "v"):
        bands = record.k_bands if side == "k" else record.v_bands
        groups = record.k_groups if side == "k" else record.v_groups
        kind = ROTATIONS[head]
        made.append(
            TensorPlan(
                permutation=torch.randperm(DIM, generator=dice, dtype=torch.int32)[None],
                shift=0.3 * torch.randn(1, DIM, generator=dice),
                scale=torch.rand(1, DIM, generator=dice) + 0.5,
                rotation=kind,
                dense=torch.linalg.qr(torch.randn(1, DIM, DIM, generator=dice)).Q
                if kind == "dense"
                else None,
                clip=torch.rand(1, len(groups), generator=dice) / 4 + 0.75,
                exponents=torch.tensor([[-3, 0]], dtype=torch.int32),
                band_edges=(0, *(stop for _, stop in bands)),
            )
        )
    return LayerPlan(*made)


def split_plan() -> SplitPlan:
    """Heads 2 and 0, in this order, and head 1."""
    parts = []
    for heads, code in FORMATS.items():
        alone = [head_plan(head, code) for head in heads]
        plan = LayerPlan(join_heads([x.k for x in alone]), join_heads([x.v for x in alone]))
        parts.append(Part(heads, *code, plan))
    return SplitPlan(tuple(parts))


def make_split(**options: Any) -> SplitLayerCache:
    made = make_layer_cache(
        split_plan(), SCHEME, num_q_heads=HEADS * GROUP, **({"exact": True} | options)
    )
    assert isinstance(made, SplitLayerCache)
    return made


def make_alone(**options: Any) -> list[LayerCache]:
    """A cache of one KV head each, in the order of the model's heads."""
    codes = {head: code for heads, code in FORMATS.items() for head in heads}
    options = {"exact": True} | options
    return [
        LayerCache(
            head_plan(head, codes[head]),
            replace(SCHEME, k=codes[head][0], v=codes[head][1], bits=None),
            num_q_heads=GROUP,
            **options,
        )
        for head in range(HEADS)
    ]


def rows(tokens: int, heads: int = HEADS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, heads, DIM, generator=torch.Generator().manual_seed(seed))


def attend_alone(alone: list[LayerCache], q: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    sinks = options.pop("learned_sinks", None)
    found = []
    for head, cache in enumerate(alone):
        mine = slice(head * GROUP, (head + 1) * GROUP)
        own = None if sinks is None else sinks[mine].contiguous()
        found.append(cache.attend(q[:, mine].contiguous(), learned_sinks=own, **options))
    outs, sums = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(sums, 1)


def assert_alike(split: SplitLayerCache, alone: list[LayerCache], q_len: int = 1) -> None:
    q = rows(split.batch_size * q_len, HEADS * GROUP, seed=9)
    assert split.lengths == alone[0].lengths
    for found, expected in zip(split.attend(q), attend_alone(alone, q), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def append(split: SplitLayerCache, alone: list[LayerCache], counts: list[int], seed: int) -> None:
    k, v = (rows(sum(counts), seed=seed + n) for n in (0, 100))
    split.append(k, v, starts(counts))
    for head, cache in enumerate(alone):
        mine = slice(head, head + 1)
        cache.append(k[:, mine].contiguous(), v[:, mine].contiguous(), starts(counts))


def caches(**options: Any) -> tuple[SplitLayerCache, list[LayerCache]]:
    return make_split(**options), make_alone(**options)


@pytest.mark.parametrize("max_len", [None, 400])
@pytest.mark.parametrize("sliding_window", [0, 60])
def test_every_head_is_as_if_it_were_alone(max_len: int | None, sliding_window: int) -> None:
    split, alone = caches(batch_size=2, max_len=max_len, sliding_window=sliding_window)
    for step, counts in enumerate([[200, 1], [1, 130], [3, 2], [1, 1]]):
        append(split, alone, counts, seed=step)
        assert_alike(split, alone)
    assert_alike(split, alone, q_len=5)
    assert min(part.format.k for part in split.parts) == "2", "several formats are in use"


def test_options_of_attention_reach_the_right_heads() -> None:
    split, alone = caches()
    append(split, alone, [250], seed=0)
    q, sinks = rows(1, HEADS * GROUP, seed=9), torch.linspace(-2, 3, HEADS * GROUP)
    for options in (
        {"softmax_scale": 0.3, "softcap": 2.0},
        {"learned_sinks": sinks},
        {"queries_in_cache": False, "learned_sinks": sinks},
    ):
        found, expected = split.attend(q, **options), attend_alone(alone, q, **options)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_heads_agree_with_the_reference() -> None:
    split, sinks = make_split(), torch.linspace(-2, 3, HEADS * GROUP)
    k, v, q = rows(220), rows(220, seed=1), rows(2, HEADS * GROUP, seed=2)
    split.append(k, v)
    out, lse = split.attend(q, learned_sinks=sinks)
    for heads, code in FORMATS.items():
        for head in heads:
            plan, mine = head_plan(head, code), slice(head * GROUP, (head + 1) * GROUP)
            door, own = Door(plan, GROUP), slice(head, head + 1)
            exponents = torch.cat([plan.k.exponents, plan.v.exponents], -1)
            reference = ReferenceSequence.make(
                *(door.map_k(k[:, own]), door.map_v(v[:, own])),
                Scheme(*code, 32).record_format(DIM),
                *(SCHEME.sinks, SCHEME.window, 16 + 64 + 64),
                (plan.k.clip, plan.v.clip),
                exponents,
            )
            expected, expected_lse = reference.attend(
                door.map_q(q[:, mine]),
                218,
                softmax_scale=DIM**-0.5,
                learned_sinks=sinks[mine],
                logit_shift=door.logit_shift(q[:, mine], DIM**-0.5),
            )
            share = token_share(expected_lse.float(), sinks[mine])
            expected = door.unmap_o(expected.float(), expected_lse.float(), share)
            torch.testing.assert_close(out[:, mine], expected, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(lse[:, mine].double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("max_len", [None, 400])
def test_sequences_are_cut_moved_and_emptied(max_len: int | None) -> None:
    split, alone = caches(batch_size=2, max_len=max_len)
    append(split, alone, [200, 150], seed=0)
    for cache in (split, *alone):
        cache.crop([180, 150])
    append(split, alone, [1, 9], seed=1)
    assert_alike(split, alone)
    for cache in (split, *alone):
        cache.take([1, 0])
    append(split, alone, [2, 3], seed=2)
    assert split.lengths == [161, 184]
    assert_alike(split, alone)
    if max_len is None:
        for cache in (split, *alone):
            cache.take([1, 1, 0])
        append(split, alone, [1, 2, 1], seed=3)
        assert_alike(split, alone)
    for cache in (split, *alone):
        cache.reset()
    assert set(split.lengths) == {0}
    append(split, alone, [70] * split.batch_size, seed=4)
    assert_alike(split, alone)


def test_crop_is_all_or_nothing() -> None:
    split, alone = caches(batch_size=2)
    append(split, alone, [200, 300], seed=0)
    with pytest.raises(ValueError, match="cannot crop sequence 1 to 100 tokens"):
        split.crop([190, 100])
    assert split.lengths == [200, 300]
    assert_alike(split, alone)


def state(split: SplitLayerCache) -> list[Tensor]:
    return [x.clone() for part in split.parts for x in part.tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k, v.double()), "v is torch.float64 on cpu"),
        (lambda k, v: (k[:, :2], v), r"k has shape \[64, 2, 64\].* = \[64, 3, 64\]"),
        (lambda k, v: (k, v[..., :32]), r"v has shape \[64, 3, 32\]"),
        (lambda k, v: (k, v, starts([3])), "rise from 0 to the number of tokens"),
        (lambda k, v: (k.repeat(2, 1, 1), v.repeat(2, 1, 1)), "do not fit into max_len=300"),
    ],
)
def test_a_failed_append_changes_nothing(change: Any, message: str) -> None:
    for max_len in (300,) if "max_len" in message else (300, None):
        split, alone = caches(max_len=max_len)
        append(split, alone, [200], seed=0)
        before = state(split)
        with pytest.raises(ValueError, match=message):
            split.append(*change(rows(64), rows(64, seed=1)))
        assert all(torch.equal(x, y) for x, y in zip(state(split), before, strict=True))
        append(split, alone, [1], seed=1)
        assert_alike(split, alone)


def test_it_moves_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SkvqCache(1, HEADS * GROUP, HEADS, DIM, plan=model_plan(1), exact=True)
    (split,) = cache.layers
    assert isinstance(split, SplitLayerCache)
    _, alone = caches()
    append(split, alone, [200], seed=0)
    assert split.to("cpu") is split and cache.to("cpu") is cache
    assert_alike(split, alone)
    check, before = ops.check_decode_format, [part.tensors for part in split.parts]

    def narrow_only(args: Any, *rest: Any) -> None:
        if args.k_format != "2":
            raise ValueError("no kernel for this")
        check(args, *rest)

    monkeypatch.setattr(ops, "check_decode_format", narrow_only)
    for moved in (split, cache):
        with pytest.raises(ValueError, match=r"k3:1/2\+2-v4.* cannot be read on cpu: no kernel"):
            moved.to("cpu")
    assert all(part.tensors is old for part, old in zip(split.parts, before, strict=True))


def model_plan(num_layers: int = 2) -> Plan:
    windows = (0,) * num_layers
    geometry = Geometry(num_layers, HEADS * GROUP, HEADS, DIM, sliding_windows=windows)
    return Plan(SCHEME, geometry, [split_plan() for _ in range(num_layers)])


def test_memory_counts_every_part() -> None:
    cache = SkvqCache(2, HEADS * GROUP, HEADS, DIM, plan=model_plan())
    for layer in range(2):
        cache.append(layer, rows(2000), rows(2000, seed=1))
    found = cache.memory()
    parts = list(chain.from_iterable(layer.parts for layer in cache.layers))
    tiles = (2000 - 19) // 64
    for part in parts:
        assert part.tensors.pages.shape[0] >= tiles
    assert found["pages"] == sum(part.tensors.pages.nbytes for part in parts)
    assert found["sinks"] == 2 * HEADS * 2 * 3 * DIM * 4
    assert found["full_precision"] == 2 * HEADS * 2 * 2000 * DIM * 4
    tables = {x.data_ptr(): x.nbytes for part in parts for x in part.door.tensors()}
    for part in parts:
        t = part.tensors
        tables |= {x.data_ptr(): x.nbytes for x in (t.k_clip, t.v_clip, t.exponents)}
    assert found["plan"] == sum(tables.values())
    used = sum(tiles * part.format.record_bytes * len(part.tensors.k_clip) for part in parts)
    bits = used * 8 / (2 * HEADS * 2 * tiles * 64 * DIM)
    assert bits == pytest.approx(model_plan().bits_per_value)


def test_what_doors_share_is_counted_once() -> None:
    """Layers with scales of their own still rotate by one matrix and clip by one table."""
    geometry = Geometry(3, 4, 2, DIM, sliding_windows=(0,) * 3)
    plan = Plan.default(geometry, Scheme.parse("k2-v2-g32"), torch.rand(3, DIM) + 0.5)
    cache = SkvqCache(3, 4, 2, DIM, plan=plan)
    shared = DIM * DIM * 4 + 2 * 2 * 2 * 4
    own = 2 * 2 * DIM * 4 + 2 * 4 * 4  # scales and their inverses, exponents
    assert cache.memory()["plan"] == shared + 3 * own


def test_a_cache_needs_the_plan_that_knows_the_formats() -> None:
    with pytest.raises(ValueError, match="leaves the formats of every head to a plan"):
        SkvqCache(2, HEADS * GROUP, HEADS, DIM, scheme="bits3-g32")
    with pytest.raises(ValueError, match=r"bits: 2\.5 here, 3\.0 in the plan"):
        SkvqCache(2, HEADS * GROUP, HEADS, DIM, scheme="bits2.5-g32", plan=model_plan())
    with pytest.raises(ValueError, match="leaves the formats of every head to a plan"):
        SkvqHFCache(make_model("llama"), "bits3-g32")


def hf_plan(model: Any) -> Plan:
    """KV heads 1 and 0 of a small model in formats of their own."""
    codes = {1: ("2", "1.5"), 0: ("3", "2")}
    parts = tuple(Part((head,), *code, head_plan(head, code)) for head, code in codes.items())
    geometry = Geometry.from_config(model.config)
    return Plan(SCHEME, geometry, [SplitPlan(parts)] * geometry.num_layers)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_a_model_generates_as_the_reference_says(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(150)
    plan, found = hf_plan(model), []
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for make in (
            lambda: DynamicCache(config=model.config),
            lambda: ReferenceCache(model, str(SCHEME), plan),
            lambda: SkvqHFCache(model, plan=plan, exact=True),
        ):
            cache = make()
            logits = [model(ids[:, :100], past_key_values=cache).logits]
            logits += [model(x, past_key_values=cache).logits for x in ids[:, 100:].split(1, 1)]
            found.append(torch.cat(logits, 1))
    full, expected, packed = found
    torch.testing.assert_close(packed, expected, atol=2e-3, rtol=0)
    assert (packed - full).abs().max() > 0.02, "something was packed"
