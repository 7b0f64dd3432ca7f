"""What a packed cache promises as a whole: honest bytes, no hidden full precision, an exact window."""

from __future__ import annotations

import pytest
import torch
from cache_cases import Case

from skvq_ext import RecordFormat
from skvq_ext.cache import SkvqCache

HEADLINE = "k2-v1.5-g128-w128-sink5-fp8"


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("k4-v4-g128-fp8", 4.125),
        ("k3-v3-g128-fp8", 3.125),
        ("k2-v2-g128-fp8", 2.125),
        ("k2-v1.5-g128-fp8", 1.9375),
        ("k2-v1.5fast-g128-fp8", 2.125),
        ("k2-v1.5-g32-fp8", 2.3125),
        ("k3:1/2+2-v1.5-g128-fp8", 2.25),
    ],
)
def test_allocated_bits_are_the_stated_bits(scheme: str, bits: float) -> None:
    cache = SkvqCache(1, 8, 8, 128, scheme=scheme, dtype=torch.float16)
    tokens = 8192 + 5 + 128
    rows = torch.randn(tokens, 8, 128, dtype=torch.float16)
    cache.append(0, rows, rows)
    stored = cache.layers[0].tensors.pages.untyped_storage().nbytes()
    assert stored * 8 / (2 * 8192 * 8 * 128) == pytest.approx(bits, rel=0.02)


def test_no_full_precision_hides_in_a_long_cache() -> None:
    heads, dim, tokens = 2, 128, 32768
    cache = SkvqCache(1, 8, heads, dim, scheme=HEADLINE, dtype=torch.float16)
    prompt = torch.randn(tokens, heads, dim, dtype=torch.float16)
    cache.append(0, prompt, prompt)
    cache.append(0, prompt[:1].clone(), prompt[:1].clone())
    packed = (
        (tokens + 1 - 5 - 128)
        // 64
        * heads
        * RecordFormat("2", "1.5", 128, "fp8", dim).record_bytes
    )
    ring = 128 + 64 + 64
    rows = (5 + ring) * heads * dim * 2 * 2
    memory = cache.memory()
    assert memory["total"] - memory["plan"] <= 1.02 * (packed + rows)
    assert memory["full_precision"] / memory["total"] > 7


def test_the_window_is_exact() -> None:
    """A query reads itself, the 127 tokens before it and the 5 sinks in full precision, never packed."""
    fmt = RecordFormat("2", "1.5", 128, "fp8", 64)
    for length in range(1, 601, 23):
        case = Case(fmt, sinks=5, window=128)
        k, v = case.rows(length), case.rows(length)
        case.append(k, v)
        sees_k, sees_v = case.reference(k, v).visible_rows(length - 1)
        exact = [*range(min(5, length)), *range(max(0, length - 128), length)]
        assert torch.equal(sees_k[exact], k[exact].double())
        assert torch.equal(sees_v[exact], v[exact].double())
        q = case.rows(1, 2)
        want, _ = case.reference(k, v).attend(q, length - 1, softmax_scale=0.125)
        torch.testing.assert_close(case.attend(q)[0].double(), want, rtol=0, atol=1e-5)


def test_requests_do_not_share_scales() -> None:
    """The bytes of a sequence are the same whatever the others of its batch hold."""
    mine = torch.randn(300, 2, 64)
    pages = []
    for others in (torch.randn(300, 2, 64), torch.randn(300, 2, 64) * 1000):
        cache = SkvqCache(1, 2, 2, 64, scheme="k2-v1.5-g128-w32-sink5-fp8", batch_size=2)
        both = torch.cat([mine, others])
        cache.append(0, both, both)
        t = cache.layers[0].tensors
        pages.append(t.pages[t.page_table[0, :4].long()].clone())
    assert torch.equal(*pages)
