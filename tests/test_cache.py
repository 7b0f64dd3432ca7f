"""The packed cache against the plain reference: append, attend, both ways of paging, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from devices import Device
from layer_oracle import (
    DIM,
    HEADS,
    QUERY_HEADS,
    Sequence,
    assert_agrees,
    assert_close,
    assert_same_state,
    feed,
    make_cache,
    make_layer,
    rows,
    starts,
    state_of,
)
from torch import Tensor

from skvq_ext import build_info
from skvq_ext.ragged import Ragged

PAGING = pytest.mark.parametrize("max_len", [None, 600], ids=["growing", "max_len"])


@PAGING
@pytest.mark.parametrize("sliding_window", [0, 40, 200])
def test_ragged_batches_agree_with_the_reference(
    max_len: int | None, sliding_window: int, device: Device
) -> None:
    layer = make_layer(batch_size=3, device=device, max_len=max_len, sliding_window=sliding_window)
    sequences = [Sequence() for _ in range(3)]
    for step, counts in enumerate([[300, 1, 0], [1, 90, 0], [65, 2, 150], [1, 1, 1]]):
        feed(layer, sequences, counts, seed=step)
        assert layer.lengths == [len(s.k) for s in sequences]
        if min(layer.lengths):
            assert_agrees(layer, sequences)
    for step in range(70):
        feed(layer, sequences, [1, 1, 1], seed=100 + step)
    assert_agrees(layer, sequences)
    assert_agrees(layer, sequences, q_len=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["k8-v8-g32-w16-sink3-fp16", "k4-v4-g32-w16-sink3-fp16"])
def test_half_precision_rows(scheme: str, dtype: torch.dtype, device: Device) -> None:
    layer = make_layer(scheme, device=device, dtype=dtype, centre=0.0)
    sequences = [Sequence()]
    k, _ = feed(layer, sequences, [200], seed=0)
    assert layer.tensors.sink_k.dtype == k.dtype == dtype
    assert_agrees(layer, sequences)


def test_any_cut_into_calls_gives_the_same_bytes(device: Device) -> None:
    k, v = (rows(400, HEADS, seed=seed, device=device) for seed in (0, 1))
    states = []
    for cut in ([400], [1] * 400, [67, 3, 130, 200], [399, 1]):
        layer = make_layer(device=device)
        for own_k, own_v in zip(k.split(cut), v.split(cut), strict=True):
            layer.append(own_k, own_v)
        states.append(state_of(layer))
    for state in states[1:]:
        assert_same_state(states[0], state)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "integer"])
def test_a_batch_equals_single_runs(exact: bool, device: Device) -> None:
    """Bitwise on the CPU; a GPU's blocks share the work of the whole batch."""
    counts = [300, 5, 131]
    batch = make_layer(batch_size=3, device=device, exact=exact)
    singles = [make_layer(device=device, exact=exact) for _ in counts]
    k, v = feed(batch, [Sequence() for _ in counts], counts, seed=0)
    q = rows(3, QUERY_HEADS, seed=3, device=device)
    out, lse = batch.attend(q)
    parts = zip(singles, k.split(counts), v.split(counts), strict=True)
    for b, (single, own_k, own_v) in enumerate(parts):
        single.append(own_k, own_v)
        own, own_lse = single.attend(q[b : b + 1])
        if device.tensor_cores:
            assert_close(own[0], own_lse[0], out[b].float().cpu(), lse[b].double().cpu())
        else:
            assert torch.equal(own[0], out[b]) and torch.equal(own_lse[0], lse[b])


@pytest.mark.parametrize("sliding_window", [0, 50])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_large_centre_cancels_everywhere(
    sliding_window: int, softcap: float, device: Device
) -> None:
    """Softcap, learned sinks and merging by lse all see the logits that were never shifted."""
    # Half precision rounds what is left of a row after the shift: more shift, more error.
    centre, atol, rtol = (2.0, 4e-3, 4e-3) if device.tensor_cores else (20.0, 2e-3, 1e-3)
    layer = make_layer(device=device, centre=centre, sliding_window=sliding_window)
    sequence = Sequence()
    feed(layer, [sequence], [230], seed=0)
    sinks = torch.tensor([-1.0, 0.5, 3.0, 30.0], device=device.name)
    q = rows(1, QUERY_HEADS, seed=5, device=device) * 0.1
    for learned_sinks in (None, sinks):
        options = {"softcap": softcap, "learned_sinks": learned_sinks}
        out, lse = layer.attend(q, **options)
        expected, expected_lse = sequence.attend(layer, q, **options)
        torch.testing.assert_close(out.float().cpu(), expected, atol=atol, rtol=rtol)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sliding_window", [0, 90, 500])
def test_queries_after_the_cache(sliding_window: int, device: Device) -> None:
    layer = make_layer(device=device, sliding_window=sliding_window)
    sequence = Sequence()
    feed(layer, [sequence], [300], seed=0)
    q = rows(200, QUERY_HEADS, seed=5, device=device)
    out, lse = layer.attend(q, queries_in_cache=False)
    assert_close(out, lse, *sequence.attend(layer, q, first_position=300))
    blind = slice(sliding_window, None) if sliding_window else slice(0, 0)
    assert (out[blind] == 0).all() and lse[blind].isneginf().all()


def test_an_empty_cache_gives_zero(device: Device) -> None:
    layer = make_layer(batch_size=2, device=device)
    out, lse = layer.attend(rows(2, QUERY_HEADS, device=device), queries_in_cache=False)
    assert (out == 0).all() and lse.isneginf().all()


def test_with_max_len_nothing_moves(device: Device) -> None:
    growing, fixed = (make_layer(batch_size=2, device=device, max_len=n) for n in (None, 500))
    places = [x.data_ptr() for x in fixed.tensors]
    for seed, counts in enumerate([[300, 20], [3, 100], [1, 1]]):
        for layer in (growing, fixed):
            feed(layer, [Sequence(), Sequence()], counts, seed=seed)
    assert_same_state(state_of(growing), state_of(fixed))
    assert [x.data_ptr() for x in fixed.tensors] == places


@pytest.mark.parametrize("sliding_window", [0, 40])
def test_with_max_len_a_step_is_one_graph(sliding_window: int, device: Device) -> None:
    """fullgraph fails where a step reads a tensor on the host."""
    options = {"batch_size": 2, "max_len": 600, "sliding_window": sliding_window, "device": device}
    plain, compiled = make_layer(**options), make_layer(**options)
    k = rows(400, HEADS, seed=1, device=device)
    for layer in (plain, compiled):
        layer.append(k, k)

    def step(k: Tensor, q: Tensor) -> Tensor:
        compiled.append(k, k)
        return compiled.attend(q)[0]

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in range(70):
            k, q = (rows(2, n, seed=seed, device=device) for n in (HEADS, QUERY_HEADS))
            plain.append(k, k)
            torch.testing.assert_close(graph(k, q), plain.attend(q)[0])
    assert compiled.lengths == [270, 270]


def test_a_cache_attends_as_it_was_told(device: Device) -> None:
    k, q = rows(300, HEADS, device=device), rows(1, QUERY_HEADS, seed=1, device=device)
    caches = [make_cache(device, **options) for options in ({}, {"exact": False}, {"exact": True})]
    for cache in caches:
        cache.append(0, k, k)
    default, integer, exact = (cache.attend(0, q)[0] for cache in caches)
    assert torch.equal(default, integer)
    one_way = device.tensor_cores or build_info()["cpu_isa"] == "portable"
    assert torch.equal(default, exact) == one_way


def test_memory_is_what_is_allocated() -> None:
    cache = make_cache(scheme="k2-v1.5-g128-w128-sink5-fp8", dtype=torch.float16)
    for layer in range(2):
        cache.append(layer, *(rows(20_000, HEADS, seed=s, dtype=torch.float16) for s in (0, 1)))
    found = cache.memory()
    layer = cache.layers[0]
    pages = layer._tiles(20_000)
    assert found["pages"] == 2 * pages * HEADS * layer.format.record_bytes
    assert found["full_precision"] == 2 * 20_000 * 2 * HEADS * DIM * 2
    everything = {x.untyped_storage().data_ptr(): x for t in cache.layers for x in t.tensors}
    assert found["total"] == layer.door.nbytes() + sum(
        x.untyped_storage().nbytes() for x in everything.values()
    )
    for _ in range(700):
        cache.append(0, *(rows(1, HEADS, seed=s, dtype=torch.float16) for s in (0, 1)))
    used = layer._tiles(20_700)
    assert used <= layer.tensors.pages.shape[0] <= 1.02 * used + 8


def test_a_sliding_layer_stays_small(device: Device) -> None:
    layer, sequence = make_layer(device=device, sliding_window=100), Sequence()
    feed(layer, [sequence], [5000], seed=0)
    for step in range(300):
        feed(layer, [sequence], [1], seed=step)
    assert layer.tensors.pages.shape[0] <= 16
    assert_agrees(layer, [sequence])
    fixed = make_layer(device=device, sliding_window=100, max_len=100_000)
    assert fixed.tensors.pages.shape[0] <= 16


def test_the_prompt_is_not_kept_alive() -> None:
    cache = make_cache()
    k, v = rows(300, HEADS, seed=0), rows(300, HEADS, seed=1)
    dead = [weakref.ref(x) for x in (k, v)]
    spans = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in (k, v)]
    cache.append(0, k, v)
    for held in cache.layers[0].tensors:
        assert not any(a <= held.untyped_storage().data_ptr() < b for a, b in spans)
    del k, v
    gc.collect()
    assert not any(ref() is not None for ref in dead)


def test_a_cache_made_in_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        cache = make_cache()
        cache.append(0, rows(100, HEADS), rows(100, HEADS))
    cache.append(1, rows(100, HEADS), rows(100, HEADS))
    cache.append(0, rows(100, HEADS), rows(100, HEADS))
    cache.append(1, rows(100, HEADS), rows(100, HEADS))
    cache.crop(-3)
    cache.repeat_interleave(2)
    assert cache.lengths == [197, 197]


def test_nan_stays_in_its_own_sequence(device: Device) -> None:
    clean, dirty = (make_layer(batch_size=2, device=device) for _ in range(2))
    k, v = (rows(400, HEADS, seed=seed, device=device) for seed in (0, 1))
    clean.append(k, v)
    k[50, 0, 3] = torch.nan
    dirty.append(k, v)
    q = rows(2, QUERY_HEADS, device=device)
    expected, found = clean.attend(q)[0], dirty.attend(q)[0]
    assert torch.equal(found[1], expected[1]) and found[0].isnan().any()
    assert torch.equal(found[0, 2:], expected[0, 2:]), "the other KV head is clean too"


def test_ragged_reads_counts_once_and_checks_them() -> None:
    ragged = Ragged.of(starts([2, 0, 5]), 7, 3)
    assert ragged.counts == [2, 0, 5] and ragged.longer_than(4) and not ragged.longer_than(5)
    pieces = [(index.tolist(), piece.counts) for index, piece in ragged.pieces(3)]
    assert pieces == [([0, 1, 2, 3, 4], [2, 0, 3]), ([5, 6], [0, 0, 2])]
    with pytest.raises(ValueError, match="5 tokens cannot be shared out equally among 2"):
        Ragged.of(None, 5, 2)
    with pytest.raises(ValueError, match=r"rise from 0 to the number of tokens \(7\)"):
        _ = Ragged.of(starts([2, 6]), 7, 2).counts
    with pytest.raises(TypeError, match=r"give torch\.int32"):
        Ragged.of(starts([7]).long(), 7, 1)
    with pytest.raises(ValueError, match=r"shape \[2\]; the cache holds 3"):
        Ragged.of(starts([7]), 7, 3)
    with pytest.raises(ValueError, match="this layout is for 7 tokens of 3 sequences"):
        Ragged.of(ragged, 8, 3)
