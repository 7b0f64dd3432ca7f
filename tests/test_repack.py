"""Pages in another arrangement, and caches on another device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_cases import Case
from devices import CUDA, EMULATED, Device
from layer_oracle import (
    DIM,
    HEADS,
    QUERY_HEADS,
    SCHEME,
    Sequence,
    assert_agrees,
    assert_same_state,
    feed,
    make_cache,
    make_layer,
    make_plan,
    rows,
    state_of,
)

from skvq_ext import RecordFormat, format_table, ops
from skvq_ext.cache import SkvqCache

CODES = [c["name"] for c in format_table()["codes"]]
ARRANGEMENTS = format_table()["arrangements"]


@pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")
@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("k", [*CODES, "3:1/2+2", "4:1/4+2"])
def test_repacked_pages_are_those_that_append_would_have_made(k: str, head_dim: int, meta: str):
    if ":" in k and head_dim == 80:
        pytest.skip("half of the head is not a multiple of 16 channels")
    v = CODES[(CODES.index(k) + 1) % len(CODES)] if k in CODES else "1.5"
    pages = {}
    for arrangement in ARRANGEMENTS:
        case = Case(RecordFormat(k, v, 32, meta, head_dim, arrangement))
        case.append(case.rows(200), case.rows(200))
        pages[arrangement] = case.cache.pages[case.cache.page_table[0, :2].long()]
    for source in ARRANGEMENTS:
        fmt = RecordFormat(k, v, 32, meta, head_dim, source)
        for target in ARRANGEMENTS:
            got = ops.repack_pages(pages[source], fmt.args, head_dim, target)
            assert torch.equal(got, pages[target]), (source, target)


@pytest.mark.parametrize(("k", "v"), [("2", "1.5"), ("8", "4"), ("3:1/2+2", "1.5")])
def test_codes_survive_a_round_trip(k: str, v: str, device: Device):
    case = Case(RecordFormat(k, v, 64, "fp8", 64), device)
    case.append(case.rows(300), case.rows(300))
    pages = case.cache.pages[case.cache.page_table[0, :4].long()]
    for target in ARRANGEMENTS:
        there = ops.repack_pages(pages, case.fmt.args, 64, target)
        assert there.device == pages.device
        assert torch.equal(there, pages) == (target == case.fmt.arrangement)
        fmt = replace(case.fmt, arrangement=target)
        assert torch.equal(ops.repack_pages(there, fmt.args, 64, case.fmt.arrangement), pages)


def test_what_repack_refuses():
    fmt = RecordFormat("2", "2", 64, "fp8", 64)
    pages = torch.zeros(3, 2, fmt.record_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match='"columns" is unknown; possible are "rows", "lanes", "m'):
        ops.repack_pages(pages, fmt.args, 64, "columns")
    with pytest.raises(ValueError, match=r"pages has shape \[3, 2, 7\]; expected \[any, any, 230"):
        ops.repack_pages(pages[..., :7].clone(), fmt.args, 64, "rows")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_the_operator_itself_repacks_on_the_cpu():
    fmt = RecordFormat("2", "2", 64, "fp8", 64)
    pages = torch.zeros(3, 2, fmt.record_bytes, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"pages is on a GPU; .* call \.cpu\(\) on it"):
        options = {**fmt.args._asdict(), "target": "rows", "head_dim": 64}
        torch.ops.skvq.repack_pages(pages, **options)


@pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")
@pytest.mark.parametrize("max_len", [None, 700])
def test_a_cache_in_another_arrangement_arrives_in_that_of_the_device(max_len: int | None):
    moved, plain = (make_layer(batch_size=2, max_len=max_len) for _ in range(2))
    moved.format = replace(moved.format, arrangement="mma")
    sequences = [Sequence(), Sequence()]
    for layer in (moved, plain):
        feed(layer, [Sequence(), Sequence()], [300, 90], seed=0)
    assert not torch.equal(state_of(moved)[0], state_of(plain)[0])
    assert moved.to("cpu") is moved
    assert_same_state(state_of(moved), state_of(plain))
    feed(plain, sequences, [100, 3], seed=1)
    feed(moved, sequences, [100, 3], seed=1)
    assert_same_state(state_of(moved), state_of(plain))


@pytest.mark.parametrize("max_len", [None, 700])
def test_a_cache_moves_there_and_back(max_len: int | None, device: Device):
    options = {"batch_size": 2, "dtype": torch.float16, "max_len": max_len}
    layer, stayed = (make_layer(device=device, **options) for _ in range(2))
    sequences = [Sequence(), Sequence()]
    feed(layer, sequences, [300, 90], seed=0)
    feed(stayed, [Sequence(), Sequence()], [300, 90], seed=0)
    before = state_of(layer)
    for place in ("cpu", device.name, "cpu"):
        assert layer.to(place).tensors.pages.device.type == place
        assert all(x.device.type == place for x in (*layer.tensors, *layer.door.tensors()))
        assert_agrees(layer, sequences)
    layer.to(device.name)
    assert_same_state(state_of(layer), before)
    feed(layer, sequences, [70, 5], seed=1)
    feed(stayed, [Sequence(), Sequence()], [70, 5], seed=1)
    assert_same_state(state_of(layer), state_of(stayed))


def test_a_whole_cache_moves_and_shares_what_it_shared(device: Device):
    cache = make_cache(device)
    for layer in range(2):
        cache.append(layer, *(rows(200, HEADS, seed=s, device=device) for s in (0, 1)))
    q = rows(1, QUERY_HEADS, seed=2, device=device)
    before, memory = cache.attend(1, q), cache.memory()
    assert cache.to("cpu").to(device.name) is cache
    assert cache.memory() == memory and cache.layers[0].door is cache.layers[1].door
    assert all(torch.equal(a, b) for a, b in zip(before, cache.attend(1, q), strict=True))
    plan = make_plan(SCHEME, 0.3)
    plan.layers.append(make_plan(SCHEME, 0.1).layers[0])
    plan.geometry = replace(plan.geometry, num_layers=2, sliding_windows=None)
    planned = SkvqCache(
        2, QUERY_HEADS, HEADS, DIM, scheme=SCHEME, plan=plan, dtype=device.dtype, device=device.name
    )
    rotations = {id(layer.door._k.rotation) for layer in planned.to("cpu").layers}
    assert len(rotations) == 1, "the Hadamard matrix is there once for all layers"


@pytest.mark.skipif(CUDA is None, reason="no CUDA kernels in this build")
def test_what_a_gpu_cannot_read_is_refused_before_it_is_filled():
    name = "cpu" if EMULATED else "cuda"
    with pytest.raises(
        ValueError, match=rf"of torch.float32 cannot be read on {name}: q is float32"
    ):
        SkvqCache(1, QUERY_HEADS, HEADS, DIM, dtype=torch.float32, device=name)
    options = {"scheme": "k8-v1.5-g32", "dtype": torch.float16, "device": name}
    with pytest.raises(ValueError, match=r"kernel was built for k8-v1\.5-g32 at head_dim"):
        SkvqCache(1, QUERY_HEADS, HEADS, DIM, **options)
