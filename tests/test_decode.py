"""Decode attention against float64 on what the cache holds."""

from __future__ import annotations

import pytest
import torch
from cache_cases import Case, attention_bound, torch_error
from devices import EMULATED, Device

from skvq_ext import RecordFormat, format_table, ops

FORMAT = RecordFormat("2", "1.5", 128, "fp8", 64)
SCHEMES = [
    ("2", "1.5"),
    ("2", "2"),
    ("3", "1.5fast"),
    ("4", "4"),
    ("8", "8"),
    ("1.5", "3"),
    ("3:1/2+2", "1.5"),
    ("4:1/2+2", "8:1/2+1.5"),
]
each_math = pytest.mark.parametrize("exact", [True, False], ids=["exact", "integer"])


def check(case: Case, k, v, q, first, **options) -> None:
    """Output and lse of `case` within the bound that PyTorch's own arithmetic in its dtype sets."""
    scale, dtype = case.fmt.head_dim**-0.5, case.dtype
    tensors = {n: x.to(case.device.name) for n, x in options.items() if isinstance(x, torch.Tensor)}
    out, lse = (x.cpu() for x in case.attend(q, **{**options, **tensors}))
    reference, q = case.reference(k, v), q.cpu()
    options.pop("queries_in_cache", None)
    want, want_lse = reference.attend(q, first, softmax_scale=scale, **options)
    bound = attention_bound(want, dtype, torch_error(reference, q, first, scale, dtype))
    assert (out.double() - want).abs().max() <= bound
    assert (out.double() - want).mean().abs() <= bound / 10
    assert (lse.double() - want_lse).abs().max() <= 1e-5 * max(1.0, want_lse.abs().max().item())


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same but for another order of float32 sums, and what that does to the rounding to their dtype."""
    unit = want.abs().max().item() * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 + unit)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize(("k_format", "v_format"), SCHEMES)
def test_every_format_and_head_dim(k_format, v_format, head_dim, device: Device):
    if head_dim in (80, 112):  # half of the head is not a multiple of 16 channels
        k_format, v_format = k_format.split(":")[0], v_format.split(":")[0]
    case = Case(RecordFormat(k_format, v_format, 64, "fp8", head_dim), device)
    k, v = case.rows(300), case.rows(300)
    case.append(k, v)
    check(case, k, v, case.rows(2, 4), 298)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (28, 4), (40, 8), (16, 1), (71, 1)]
)
@pytest.mark.parametrize("q_len", [1, 3])
def test_every_ratio_of_heads(q_heads, kv_heads, q_len, device: Device):
    case = Case(FORMAT, device, num_kv_heads=kv_heads)
    k, v = case.rows(250), case.rows(250)
    case.append(k, v)
    check(case, k, v, case.rows(q_len, q_heads), 250 - q_len)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("meta", ["fp8", "fp16"])
def test_half_precision_groups_and_metadata(dtype, group, meta, device: Device):
    case = Case(RecordFormat("2", "1.5", group, meta, 128), device, dtype=dtype)
    k, v = case.rows(280), case.rows(280)
    case.append(k, v)
    check(case, k, v, case.rows(2, 4), 278)


@pytest.mark.parametrize(
    "length", [1, 4, 5, 6, 36, 37, 38, 63, 64, 65, 100, 101, 102, 128, 164, 165, 166, 259, 700]
)
def test_every_edge_of_the_length(length, device: Device):
    case = Case(FORMAT, device)
    k, v = case.rows(length), case.rows(length)
    case.append(k, v)
    check(case, k, v, case.rows(1, 4), length - 1)


@each_math
@pytest.mark.parametrize("q_len", [2, 8, 33, 65])
def test_several_queries_see_what_single_steps_see(q_len, exact, device: Device):
    case, steps = Case(FORMAT, device), Case(FORMAT, device)
    k, v, q = case.rows(400), case.rows(400), case.rows(q_len, 4)
    steps.append(k[: 400 - q_len], v[: 400 - q_len])
    singles = []
    for t in range(400 - q_len, 400):
        steps.append(k[t : t + 1], v[t : t + 1])
        singles.append(steps.attend(q[t - 400 + q_len :][:1], exact=exact)[0])
    case.append(k, v)
    together, _ = case.attend(q, exact=exact)
    close(together, torch.cat(singles))
    if exact:
        check(case, k, v, q, 400 - q_len)


@pytest.mark.parametrize("q_len", [66, 150, 400])
def test_more_queries_than_the_ring_can_serve_in_full_precision(q_len, device: Device):
    case = Case(FORMAT, device)
    k, v = case.rows(400), case.rows(400)
    case.append(k, v)
    check(case, k, v, case.rows(q_len, 2), 400 - q_len)


def test_queries_after_the_cache_see_all_of_it(device: Device):
    case = Case(FORMAT, device)
    k, v = case.rows(333), case.rows(333)
    case.append(k, v)
    check(case, k, v, case.rows(70, 4), 333, queries_in_cache=False)


def test_softcap_learned_sinks_shift_and_sliding_window(device: Device):
    case = Case(FORMAT, device)
    k, v, q = case.rows(500), case.rows(500), case.rows(3, 4)
    case.append(k, v)
    shift = torch.randn(3, 4) * 5
    for options in (
        {"softcap": 2.0},
        {"learned_sinks": torch.tensor([0.5, -3.0, 8.0, 60.0])},
        {"logit_shift": shift},
        {"softcap": 30.0, "logit_shift": shift, "learned_sinks": torch.randn(4)},
        *({"sliding_window": n} for n in (1, 2, 37, 100, 300, 499, 500, 10_000)),
    ):
        check(case, k, v, q, 497, **options)


def test_sliding_window_does_not_read_pages_it_has_left(device: Device):
    case = Case(FORMAT, device)
    k, v = case.rows(800), case.rows(800)
    case.append(k, v)
    case.cache.page_table[0, : (800 - 100 - 5) // 64] = -1
    check(case, k, v, case.rows(1, 4), 799, sliding_window=100)


def test_nothing_visible_gives_zero_and_minus_infinity(device: Device):
    case = Case(FORMAT, device, batch=2)
    case.append(case.rows(9), case.rows(9), [0, 9])
    out, lse = case.attend(case.rows(2, 4), [1, 1], queries_in_cache=False)
    assert (out[0] == 0).all() and lse[0].isneginf().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_empty_call(device: Device):
    case = Case(FORMAT, device, batch=2)
    case.append(case.rows(0), case.rows(0), [0, 0])
    out, lse = case.attend(case.rows(0, 4), [0, 0])
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_huge_logits_beat_no_mask(device: Device):
    case = Case(FORMAT, device)
    k, v = case.rows(300), case.rows(300)
    case.append(k, v)
    q = case.rows(2, 4) * 5e3
    out, _ = case.attend(q)
    want, _ = case.reference(k, v).attend(q.cpu(), 298, softmax_scale=0.125)
    # The softmax is one-hot here, so the result is a row of V and the order of its tokens is all that counts.
    unit = want.abs().max().item() * torch.finfo(case.dtype).eps
    torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=1e-3 + unit)


@each_math
def test_a_batch_equals_single_sequences(exact, device: Device):
    """In every bit on the CPU; a GPU's blocks share the work of the whole batch, so that sums are cut elsewhere."""
    lengths = [1, 300, 37, 2500]
    batch = Case(FORMAT, device, batch=4, max_pages=40)
    k, v, q = batch.rows(sum(lengths)), batch.rows(sum(lengths)), batch.rows(4, 4)
    batch.append(k, v, lengths)
    together, lse = batch.attend(q, exact=exact)
    for b, (rows_k, rows_v) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        single = Case(FORMAT, device, max_pages=40)
        single.append(rows_k, rows_v)
        out, single_lse = single.attend(q[b : b + 1], exact=exact)
        if device.tensor_cores:
            close(out, together[b : b + 1])
            close(single_lse, lse[b : b + 1])
        else:
            assert torch.equal(out, together[b : b + 1])
            assert torch.equal(single_lse, lse[b : b + 1])


@each_math
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_result_does_not_depend_on_threads_or_repetition(threads, exact, device: Device):
    case = Case(FORMAT, device, max_pages=60)
    case.append(case.rows(3000), case.rows(3000))
    q = case.rows(2, 4)
    first, _ = case.attend(q, exact=exact)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(case.attend(q, exact=exact)[0], first) for _ in range(20))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")
def test_arrangements_agree_in_every_bit():
    outs = []
    for arrangement in format_table()["arrangements"]:
        case = Case(RecordFormat("3:1/2+2", "1.5", 32, "fp8", 128, arrangement))
        k, v, q = case.rows(300), case.rows(300), case.rows(2, 4)
        case.append(k, v)
        outs.append(case.attend(q)[0])
    assert len(outs) == 3 and all(torch.equal(outs[0], other) for other in outs[1:])


def test_queries_that_are_not_contiguous(device: Device):
    case = Case(FORMAT, device)
    case.append(case.rows(300), case.rows(300))
    q = case.rows(4, 6)
    expected, _ = case.attend(q)
    strided, _ = case.attend(
        torch.cat([q, q], dim=2)[:, :, :64].transpose(0, 1).contiguous().transpose(0, 1)
    )
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("where", [70, 395])  # in a packed tile, in the window
def test_a_token_that_is_not_finite_reaches_only_who_sees_it(where, device: Device):
    clean, spoiled = Case(FORMAT, device, batch=2), Case(FORMAT, device, batch=2)
    k, v, q = clean.rows(800), clean.rows(800), clean.rows(20, 4)
    clean.append(k, v)
    v[where, 0, 5] = float("nan")
    spoiled.append(k, v)
    (want, _), (got, _) = clean.attend(q), spoiled.attend(q)
    # Queries of sequence 0 sit at 390 to 399; heads 0 and 1 read KV head 0.
    sees = torch.zeros(20, 4, dtype=torch.bool, device=device.name)
    sees[max(0, where - 390) : 10, :2] = True
    # Tensor cores multiply 16 tokens of the window with all queries of a call, and 0 times NaN is NaN.
    beside = torch.zeros_like(sees)
    beside[:10, :2] = device.tensor_cores and where == 395
    assert torch.equal(got[~sees & ~beside], want[~sees & ~beside])
    assert got[sees].isnan().any(-1).all()


def test_offsets_beyond_two_to_the_31st(device: Device):
    case = Case(FORMAT, device, num_kv_heads=1, max_pages=4)
    shape = 2**31 // FORMAT.record_bytes + 8, 1, FORMAT.record_bytes
    pages = torch.empty(shape, dtype=torch.uint8, device=device.name)
    last = pages.shape[0] - 1
    table = torch.arange(last - 3, last + 1, dtype=torch.int32, device=device.name).reshape(1, 4)
    case.cache = case.cache._replace(pages=pages, page_table=table)
    k, v = case.rows(300), case.rows(300)
    case.append(k, v)
    check(case, k, v, case.rows(1, 2), 299)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("k_format", "v_format"), SCHEMES)
def test_integer_products_add_little_to_the_error_of_the_codes(
    k_format, v_format, head_dim, device: Device
):
    if head_dim == 80:  # half of the head is not a multiple of 16 channels
        k_format, v_format = k_format.split(":")[0], v_format.split(":")[0]
    case = Case(RecordFormat(k_format, v_format, 64, "fp8", head_dim), device, max_pages=40)
    k, v, q = case.rows(2000), case.rows(2000), case.rows(4, 8)
    case.append(k, v)
    reference, scale = case.reference(k, v), head_dim**-0.5
    packed, _ = reference.attend(q.cpu(), 1996, softmax_scale=scale)
    reference.packed_k, reference.packed_v = reference.k, reference.v
    truth, _ = reference.attend(q.cpu(), 1996, softmax_scale=scale)
    out, _ = case.attend(q, exact=False)
    added, codes = (
        (out.cpu() - packed).square().mean().sqrt(),
        (packed - truth).square().mean().sqrt(),
    )
    assert added < codes / 20


def test_integer_products_keep_nan_where_it_is(device: Device):
    clean, spoiled = Case(FORMAT, device), Case(FORMAT, device)
    k, v, q = clean.rows(400), clean.rows(400), clean.rows(1, 4)
    clean.append(k, v)
    v[70, 0, 5] = float("nan")
    spoiled.append(k, v)
    (want, _), (got, _) = clean.attend(q, exact=False), spoiled.attend(q, exact=False)
    assert torch.equal(got[:, 2:], want[:, 2:]) and got[:, :2].isnan().any(-1).all()
    broken = q.clone()
    broken[0, 3, 0] = float("nan")
    got, _ = clean.attend(broken, exact=False)
    assert torch.equal(got[:, :3], want[:, :3]) and got[0, 3].isnan().all()


def test_merge_of_two_parts_is_attention_over_both(device: Device):
    q, k, v = (torch.randn(n, 4, 64, device=device.name) for n in (5, 90, 90))

    def part(rows):
        logits = torch.einsum("qhd,thd->qht", q, k[rows])
        return torch.einsum(
            "qht,thd->qhd", logits.softmax(-1), v[rows]
        ).contiguous(), logits.logsumexp(-1)

    out, lse = ops.merge_states(*part(slice(0, 30)), *part(slice(30, 90)))
    want, want_lse = part(slice(0, 90))
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-6)
    nothing = torch.zeros_like(want), torch.full_like(want_lse, -float("inf"))
    same, same_lse = ops.merge_states(want, want_lse, *nothing)
    assert torch.equal(same, want) and torch.equal(same_lse, want_lse)
    empty, empty_lse = ops.merge_states(*nothing, *nothing)
    assert (empty == 0).all() and empty_lse.isneginf().all()
    with pytest.raises(ValueError, match=r"out_b has shape \[4, 4, 64\]; expected \[5, 4, 64\]"):
        ops.merge_states(want, want_lse, want[:4], want_lse[:4])
