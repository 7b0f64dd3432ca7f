"""Taking tokens back, moving sequences, and what goes wrong without a trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import EMULATED, Device
from layer_oracle import (
    DIM,
    HEADS,
    QUERY_HEADS,
    Sequence,
    assert_agrees,
    assert_same_state,
    feed,
    make_cache,
    make_layer,
    make_plan,
    rows,
    starts,
    state_of,
)

from skvq_ext.cache import SkvqCache
from skvq_ext.geometry import Geometry
from skvq_ext.plan import Plan, PlanError
from skvq_ext.scheme import Scheme, SchemeError

PAGING = pytest.mark.parametrize("max_len", [None, 700], ids=["growing", "max_len"])
K, V = rows(600, HEADS, seed=0), rows(600, HEADS, seed=1)
Q = rows(1, QUERY_HEADS, seed=2)


def on(device: Device) -> list[torch.Tensor]:
    """K, V and Q there."""
    return [x.to(device.name) for x in (K, V, Q)]


@PAGING
@pytest.mark.parametrize("sliding_window", [0, 70])
def test_taken_back_tokens_leave_no_trace(
    max_len: int | None, sliding_window: int, device: Device
) -> None:
    """Speculative decoding: drafts go in, some are taken back, the right tokens follow."""
    options = {"max_len": max_len, "sliding_window": sliding_window, "device": device}
    plain, drafted = make_layer(**options), make_layer(**options)
    K, V, Q = on(device)
    wrong = rows(600, HEADS, seed=9, device=device)
    for layer in (plain, drafted):
        layer.append(K[:200], V[:200])
    done = 200
    for drafts, kept in [(64, 0), (5, 3), (40, 1), (64, 63), (20, 20), (1, 0), (64, 2), (30, 11)]:
        right = slice(done, done + kept)
        drafted.append(K[right], V[right])
        rest = wrong[: drafts - kept]
        drafted.append(rest, rest)
        drafted.crop([done + kept])
        plain.append(K[right], V[right])
        done += kept
        assert drafted.lengths == [done]
        assert all(
            torch.equal(a, b) for a, b in zip(plain.attend(Q), drafted.attend(Q), strict=True)
        )
    pages = [state_of(layer)[0] for layer in (plain, drafted)]
    first = plain._tiles_out_of_sight()[0]
    assert torch.equal(pages[0][first:], pages[1][first:])


@PAGING
def test_crop_reaches_back_as_far_as_promised_and_no_further(
    max_len: int | None, device: Device
) -> None:
    cache = make_cache(device, max_len=max_len)
    K, V, _ = on(device)
    for layer in range(2):
        cache.append(layer, K[:400], V[:400])
    cache.crop(-40)
    assert cache.lengths == [360]
    before = state_of(cache.layers[0])
    with pytest.raises(ValueError, match=r"to 335 tokens: it held up to 400.*Crop to 336 or more"):
        cache.crop(335)
    assert_same_state(before, state_of(cache.layers[0]))
    cache.crop(336)
    cache.crop(1000)
    assert cache.lengths == [336]
    cache.crop(0)
    assert cache.lengths == [0]
    for layer in range(2):
        cache.append(layer, K[:90], V[:90])
    assert cache.layers[0]._tiles(90) == 1
    cache.crop(30)
    with pytest.raises(ValueError, match="cannot crop sequence 0 to 10"):
        cache.crop(10)
    cache.reset()
    for layer in range(2):
        cache.append(layer, K[:80], V[:80])
    cache.crop(2)
    assert cache.lengths == [2], "while nothing is packed every length is possible"


def test_crop_is_all_or_nothing_over_layers_and_sequences() -> None:
    cache = make_cache(batch_size=2)
    cache.append(0, K[:420], V[:420], starts([20, 400]))
    cache.append(1, K[:420], V[:420], starts([20, 400]))
    with pytest.raises(ValueError, match="cannot crop sequence 1 to 300"):
        cache.crop(-100)
    assert [x.lengths for x in cache.layers] == [[20, 400]] * 2
    cache.crop(-30)
    assert [x.lengths for x in cache.layers] == [[0, 370]] * 2


@PAGING
def test_sequences_move_and_then_live_their_own_lives(max_len: int | None, device: Device) -> None:
    layer = make_layer(batch_size=3, device=device, max_len=max_len)
    sequences = [Sequence() for _ in range(3)]
    feed(layer, sequences, [300, 5, 131], seed=0)
    for step, order in enumerate([[2, 0, 0], [1, 1, 1, 0], [3, 2], [1]]):
        layer.take(order)
        sequences = [Sequence(sequences[i].k, sequences[i].v) for i in order]
        feed(layer, sequences, [70 + i for i in range(len(order))], seed=10 + step)
        assert layer.lengths == [len(s.k) for s in sequences]
        assert_agrees(layer, sequences)


def test_sequences_move_in_a_cache_too_short_to_pack() -> None:
    cache = make_cache(batch_size=2, max_len=20)
    for layer in range(2):
        cache.append(layer, K[:12], V[:12], starts([10, 2]))
    cache.reorder([1, 1])
    cache.repeat_interleave(2)
    assert cache.lengths == [2] * 4


def test_packed_pages_are_shared_not_copied() -> None:
    cache = make_cache()
    for layer in range(2):
        cache.append(layer, K, V)
    pages = cache.memory()["pages"]
    cache.repeat_interleave(4)
    cache.reorder(torch.tensor([3, 3, 0, 1]))
    assert cache.memory()["pages"] == pages and cache.lengths == [600] * 4
    before = cache.layers[0].tensors.page_table.clone()
    cache.select([2, 0])
    assert torch.equal(cache.layers[0].tensors.page_table, before[[2, 0]])


def test_a_shared_tile_is_packed_again_on_a_fresh_page(device: Device) -> None:
    layer = make_layer(device=device)
    sequence = Sequence()
    feed(layer, [sequence], [150], seed=0)
    layer.take([0, 0])
    layer.crop([110, 150])
    sequences = [Sequence(sequence.k[:110], sequence.v[:110]), Sequence(sequence.k, sequence.v)]
    feed(layer, sequences, [90, 1], seed=4)
    assert_agrees(layer, sequences)


@pytest.mark.parametrize("max_len", [None, 500])
def test_a_failed_append_changes_nothing(max_len: int | None) -> None:
    layer = make_layer(batch_size=2, max_len=max_len)
    feed(layer, [Sequence(), Sequence()], [300, 100], seed=0)
    before, lengths = state_of(layer), layer.lengths
    k = K[:200]
    bad: list[tuple[str, tuple]] = [
        ("v has shape", (k, k[:7])),
        ("k has shape", (k[:, :1], k[:, :1])),
        ("k has shape", (k[:, :, :32], k[:, :, :32])),
        (r"k is torch\.float64 on cpu; this cache was made for torch\.float", (k.double(), k)),
        (r"k is torch\.float\d+ on meta", (k.to("meta"), k)),
        ("shape .* the cache holds 2 sequences", (k, k, starts([100, 50, 50]))),
        ("must rise from 0", (k, k, torch.tensor([0, 150, 100], dtype=torch.int32))),
        ("201 tokens cannot be shared out equally", (K[:201], V[:201])),
    ]
    if max_len:
        bad.append((r"sequence 0 holds 300 tokens and 201 more do not fit", (K[:402], V[:402])))
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            layer.append(*arguments)
    clip = layer.tensors.k_clip.clone()
    layer.tensors.k_clip.zero_()  # the operator refuses only after pages were set aside
    with pytest.raises(ValueError, match="clip"):
        layer.append(K[:400], V[:400])
    layer.tensors.k_clip.copy_(clip)
    assert layer.lengths == lengths
    assert_same_state(before, state_of(layer))
    if layer._pool is not None:
        assert [len(row) for row in layer._pool.rows] == [layer._tiles(n) for n in lengths]


def test_a_sliding_layer_refuses_queries_whose_keys_are_gone() -> None:
    layer = make_layer(sliding_window=40)
    layer.append(K[:100], V[:100])
    with pytest.raises(
        ValueError, match=r"66 queries of one sequence.*newest 65 \(rollback \+ 1\)"
    ):
        layer.attend(rows(66, QUERY_HEADS))


def test_bad_arguments_say_what_to_do() -> None:
    cache = make_cache(batch_size=2)
    for indices in ([0, 2], [-1, 0], torch.tensor([5, 5])):
        with pytest.raises(ValueError, match=r"this cache holds 0 \.\. 1"):
            cache.reorder(indices)
    with pytest.raises(ValueError, match="use select to change the batch"):
        cache.reorder([0])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        cache.repeat_interleave(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_cache(batch_size=0)
    with pytest.raises(ValueError, match=r"torch\.int32 is not supported"):
        make_cache(dtype=torch.int32)
    with pytest.raises(SchemeError, match="nearest"):
        make_cache(scheme="k2-v2-gg64")
    with pytest.raises(ValueError, match="72"):
        SkvqCache(1, 4, 2, 72)
    with pytest.raises(ValueError, match="not a multiple"):
        SkvqCache(1, 5, 2, 64)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = make_plan()
    with pytest.raises(PlanError, match="num_layers: 2 here, 1 in the plan"):
        make_cache(plan=plan)
    with pytest.raises(PlanError, match="group: 64 here, 32 in the plan"):
        SkvqCache(1, QUERY_HEADS, HEADS, DIM, plan=plan, scheme="k2-v1.5-g64-w16-sink3-fp8")
    other = Scheme.parse("k2-v1.5-g32-fp8-hadamard-clip")
    plan = Plan.default(Geometry(1, QUERY_HEADS, HEADS, DIM), other)
    with pytest.raises(PlanError, match="transform: centre here, hadamard in the plan"):
        SkvqCache(1, QUERY_HEADS, HEADS, DIM, plan=plan, scheme="k2-v1.5-g32-fp8-centre")


@pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")
def test_the_custom_model_example_runs() -> None:
    example = Path(__file__).parent.parent / "examples" / "custom_model.py"
    text = example.read_text()
    assert text.count("\n") < 60 and "transformers" not in text
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bytes" in done.stdout
