"""The state machine: sinks, packed tiles and ring as a pure function of the length."""

from __future__ import annotations

import random

import pytest
import torch
from cache_cases import Case
from devices import CPU, Device

from skvq_ext import RecordFormat

FORMAT = RecordFormat("2", "1.5", 128, "fp8", 64)
TWO_BANDS = RecordFormat("3:1/2+2", "1.5", 32, "fp16", 64)


def live_bytes(case: Case) -> list[torch.Tensor]:
    """What a cache holds, without what was never written: per sequence sinks, packed pages and live ring rows."""
    parts = []
    for b, length in enumerate(case.cache.kv_len.tolist()):
        packed = max(0, length - case.sinks - case.window) // 64
        parts.append(case.cache.pages[case.cache.page_table[b, :packed].long()])
        ring = [p % case.slots for p in range(max(case.sinks, length - case.slots), length)]
        sinks = min(case.sinks, length)
        for rows, index in (
            (case.cache.sink_k, range(sinks)),
            (case.cache.sink_v, range(sinks)),
            (case.cache.ring_k, ring),
            (case.cache.ring_v, ring),
        ):
            parts.append(rows[b, list(index)])
    return parts


def same_bytes(a: Case, b: Case) -> bool:
    pairs = zip(live_bytes(a), live_bytes(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def chunks_of(total: int, seed: int) -> list[int]:
    rng, cut = random.Random(seed), []
    while sum(cut) < total:
        cut.append(min(rng.choice([0, 1, 2, 17, 63, 64, 65, 130]), total - sum(cut)))
    return cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [FORMAT, TWO_BANDS])
def test_one_prefill_equals_any_chunking_equals_single_appends(fmt, dtype, device: Device):
    total = 600
    cases = [Case(fmt, device, sinks=5, window=128, dtype=dtype) for _ in range(4)]
    k, v = cases[0].rows(total), cases[0].rows(total)
    for case, cut in zip(
        cases, ([total], [1] * total, chunks_of(total, 1), chunks_of(total, 2)), strict=True
    ):
        first = 0
        for n in cut:
            case.append(k[first : first + n], v[first : first + n])
            first += n
    assert all(same_bytes(cases[0], other) for other in cases[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [FORMAT, TWO_BANDS])
def test_every_token_takes_the_clip_ratio_that_errs_least(fmt, dtype, device: Device):
    case = Case(fmt, device, dtype=dtype, choices=3, num_kv_heads=2)
    length = case.sinks + case.window + 2 * 64
    k, v = case.rows(length), case.rows(length)
    case.append(k, v)
    expected = case.reference(k, v)
    for read, rows in zip(
        case.unpack(case.cache.page_table[0, :2]),
        (expected.packed_k, expected.packed_v),
        strict=True,
    ):
        tiles = read.transpose(1, 2).reshape(2 * 64, 2, -1)  # pages hold [head, token, channel]
        assert torch.equal(tiles, rows[case.sinks : case.sinks + 128])
    # The middle ratio alone gives other values: the search matters.
    middle = Case(fmt, device, dtype=dtype, clip=0.95 * 0.8)
    middle.append(k, v)
    assert not torch.equal(middle.unpack(middle.cache.page_table[0, :2])[0], read)


@pytest.mark.parametrize(
    "length", [0, 1, 4, 5, 6, 36, 37, 38, 100, 101, 102, 164, 165, 166, 257, 258, 259, 600]
)
def test_every_edge_of_the_length(length, device: Device):
    whole, single = Case(FORMAT, device), Case(FORMAT, device)
    k, v = whole.rows(length), whole.rows(length)
    whole.append(k, v)
    for t in range(length):
        single.append(k[t : t + 1], v[t : t + 1])
    assert whole.cache.kv_len.item() == length
    assert same_bytes(whole, single)
    # The pool holds exactly the packed tiles: everything else still carries the poison.
    used = set(whole.cache.page_table[0, : max(0, length - 5 - 32) // 64].tolist())
    untouched = [p for p in range(whole.cache.pages.shape[0]) if p not in used]
    assert (whole.cache.pages[untouched] == 0xFF).all()


def test_packed_bytes_never_change(device: Device):
    case = Case(FORMAT, device, max_pages=40)
    seen: list[torch.Tensor] = []
    for _ in range(60):
        case.append(case.rows(33), case.rows(33))
        packed = case.cache.pages[case.cache.page_table[0, : len(seen)].long()]
        assert all(torch.equal(a, b) for a, b in zip(packed, seen, strict=True))
        tiles = (case.cache.kv_len.item() - 5 - 32) // 64
        seen = list(case.cache.pages[case.cache.page_table[0, :tiles].long()].clone())


def test_sequences_of_a_ragged_batch_do_not_touch_each_other(device: Device):
    lengths = [[0, 300, 7], [150, 1, 64], [64, 0, 200]]
    batch = Case(FORMAT, device, batch=3)
    singles = [Case(FORMAT, device) for _ in range(3)]
    for step in lengths:
        k, v = batch.rows(sum(step)), batch.rows(sum(step))
        batch.append(k, v, step)
        for single, rows_k, rows_v in zip(singles, k.split(step), v.split(step), strict=True):
            single.append(rows_k, rows_v)
    parts, expected = live_bytes(batch), [p for single in singles for p in live_bytes(single)]
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


def test_rows_that_are_not_contiguous(device: Device):
    a, b = Case(FORMAT, device), Case(FORMAT, device)
    k, v = a.rows(200), a.rows(200)
    a.append(k, v)
    b.append(k.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([v, v], dim=2)[:, :, :64])
    assert same_bytes(a, b)


@pytest.mark.parametrize("taken_back", [1, 17, 63, 64])
def test_tokens_taken_back_leave_no_trace(taken_back, device: Device):
    drafted, plain = Case(FORMAT, device), Case(FORMAT, device)
    k, v = plain.rows(500), plain.rows(500)
    drafts = drafted.rows(taken_back)
    for start in range(0, 500, 20):
        for case in (drafted, plain):
            case.append(k[start : start + 20], v[start : start + 20])
        drafted.append(drafts, drafts)
        drafted.cache.kv_len.sub_(taken_back)
    needed = 64 + 32  # a tile and the window: what attention can still read
    for name in ("ring_k", "ring_v"):
        slots = [p % plain.slots for p in range(500 - needed, 500)]
        assert torch.equal(
            getattr(drafted.cache, name)[0, slots], getattr(plain.cache, name)[0, slots]
        )
    tiles = drafted.cache.page_table[0, : (500 - 37) // 64].long()
    assert torch.equal(drafted.cache.pages[tiles], plain.cache.pages[tiles])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_spoils_itself_only(bad, device: Device):
    clean, spoiled = Case(TWO_BANDS, device), Case(TWO_BANDS, device)
    k, v = clean.rows(300), clean.rows(300)
    clean.append(k, v)
    k[70, 1, 40] = bad
    v[90, 0, 3] = bad
    spoiled.append(k, v)
    ids = clean.cache.page_table[0, :4].contiguous()
    read = [c.unpack(ids) for c in (clean, spoiled)]
    expected_k, expected_v = read[0]
    expected_k[1, 1, 1, 32:64] = float(
        "nan"
    )  # token 70 = sinks + 64 + 1, second group of 32 channels
    expected_v[1, 0, 21, 0:32] = float("nan")
    for got, want in zip(read[1], (expected_k, expected_v), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def snapshot(case: Case) -> list[torch.Tensor]:
    return [t.clone().view(torch.uint8) for t in case.cache]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            5 + 32 + 64 * 17,
            r"sequence 0 would grow to 1125 tokens and need 17 pages, but page_table has room for 16",
        ),
        (
            5 + 32 + 64 * 4,
            r"page_table\[0, 3\] is -1; tokens 197 to 260 of sequence 0 need a page in 0 to 18",
        ),
    ],
)
def test_without_pages_nothing_is_written(tokens, message):
    case = Case(FORMAT)
    case.append(case.rows(100), case.rows(100))
    case.cache.page_table[0, 3] = -1
    before = snapshot(case)
    with pytest.raises(ValueError, match=message):
        case.append(case.rows(tokens - 100), case.rows(tokens - 100))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(case), strict=True))


def refuses(device: Device, change: dict[str, object], message: str) -> None:
    """An append into an empty float32 cache, with something changed, fails and writes nothing."""
    case = Case(FORMAT, device, batch=change.pop("batch", 1), dtype=torch.float32)
    arguments = {
        "k": torch.zeros(3, 2, 64),
        "v": torch.zeros(3, 2, 64),
        "lengths": None,
        "window": 32,
    }
    change = {n: on(device, x) if isinstance(x, torch.Tensor) else x for n, x in change.items()}
    arguments.update({n: change.pop(n) for n in list(change) if n in arguments})
    case.cache = case.cache._replace(**change)
    case.window = arguments["window"]
    before = snapshot(case)
    k, v = (on(device, arguments[n]) for n in ("k", "v"))
    with pytest.raises(ValueError, match=message):
        case.append(k, v, arguments["lengths"])
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(case), strict=True))


def on(device: Device, x: torch.Tensor) -> torch.Tensor:
    return x if x.device.type == "meta" else x.to(device.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 80)}, r"k has shape \[3, 2, 80\]; expected \[any, 2, 64\]"),
        ({"v": torch.zeros(2, 2, 64)}, r"v has shape \[2, 2, 64\]; expected \[3, 2, 64\]"),
        (
            {"k": torch.zeros(3, 2, 64).half()},
            "k and v have dtypes Half and Float; the cache holds Float",
        ),
        ({"k": torch.zeros(3, 64, 2).transpose(1, 2)}, "k has stride 2 in its last dimension"),
        (
            {"k": torch.zeros(3, 2, 64, device="meta")},
            "on different devices .* move all of them to one device",
        ),
        ({"lengths": [1, 1]}, r"cu_seqlens has shape \[3\]; expected \[2\]"),
        ({"batch": 2}, "without cu_seqlens all 2 sequences have equal lengths, but 3 tokens"),
        (
            {"pages": torch.zeros(4, 2, 64, dtype=torch.uint8)},
            r"pages has shape \[4, 2, 64\]; expected \[any, 2, 2112\]",
        ),
        ({"page_table": torch.zeros(1, 4)}, "page_table has dtype Float; expected Int"),
        ({"kv_len": torch.zeros(1, dtype=torch.int64)}, "kv_len has dtype Long; expected Int"),
        (
            {"ring_k": torch.zeros(1, 95, 2, 64)},
            "ring_k has 95 slots; a window of 32 tokens needs at least 96",
        ),
        ({"ring_v": torch.zeros(1, 160, 2, 64).half()}, "ring_v has dtype Half; expected Float"),
        (
            {"sink_v": torch.zeros(1, 4, 2, 64)},
            r"sink_v has shape \[1, 4, 2, 64\]; expected \[1, 5, 2, 64\]",
        ),
        ({"k_clip": torch.ones(2, 2)}, r"k_clip has shape \[2, 2\]; expected \[2, 1\]"),
        ({"window": 0}, "window is 0; at least 1 token"),
    ],
)
def test_what_append_refuses(change, message, device: Device):
    refuses(device, dict(change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2]}, "cu_seqlens runs from 0 to 2; expected 0 to 3"),
        ({"lengths": [5, -2], "batch": 2}, "cu_seqlens decreases from 5 to 3 at sequence 1"),
        ({"kv_len": torch.full((1,), -3, dtype=torch.int32)}, "sequence 0 has kv_len -3"),
        ({"v_clip": torch.zeros(2, 1)}, "v_clip holds 0; a clip ratio is above 0 and at most 1"),
        (
            {"exponents": torch.full((2, 4), 40, dtype=torch.int32)},
            "exponents of head 0 hold 40; allowed is -32 to 32",
        ),
    ],
)
def test_contents_that_append_refuses_on_the_cpu(change, message):
    refuses(CPU, dict(change), message)
