"""The published arithmetic, and that what is packed is exactly it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skvq_ext import ops
from skvq_ext.published.packing import LEVELS, Packing
from skvq_ext.published.quantizer import Grouping, Quantizer, encode, fake_quantize
from skvq_ext.published.reorder import edges_of

SIZES = [1, 3, 7, 127, 129, 448, 64]
ROW_BYTES = {  # of groups of SIZES, each from a byte on
    "4": sum(math.ceil(n / 2) for n in SIZES),
    "3": sum(math.ceil(n / 4) + math.ceil(n / 8) for n in SIZES),
    "2": sum(math.ceil(n / 4) for n in SIZES),
    "1.5": sum(math.ceil(n / 5) for n in SIZES),
}


def grouping(seed: int = 0, sizes: list[int] = SIZES) -> Grouping:
    generator = torch.Generator().manual_seed(seed)
    edges = edges_of(torch.tensor(sizes))
    permutation = torch.randperm(sum(sizes), generator=generator)
    clip = 1 - 0.5 * torch.rand(len(sizes), generator=generator)
    return Grouping(permutation.short(), edges.short(), clip)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Rounded to E4M3 by hand: 3 bits behind the point from 2**-6 on, steps of 2**-9 below."""
    clamped = np.clip(x, -448, 448).astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(clamped), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return (np.round(clamped / step) * step).astype(np.float32)


def original(x: np.ndarray, clip: float, levels: int, fp8: bool) -> np.ndarray:
    """One group of one token as the released code computes it, in float32 numpy."""
    f = np.float32
    low, high = f(x.min()) * f(clip), f(x.max()) * f(clip)
    zero, scale = low, max(f(f(high - low) / f(levels - 1)), f(1e-5))
    if not fp8:  # computed in half precision there
        zero = f(np.float16(zero))
        scale = f(np.float16(max(f(f(high - zero) / f(levels - 1)), f(1e-5))))
    codes = np.round(np.clip((x - zero) / scale, 0, levels - 1))
    if fp8:
        zero, scale = e4m3(np.array(zero)), e4m3(np.array(scale))
    return (codes * scale + zero).astype(f)


@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("bits", list(LEVELS))
def test_packed_equals_the_formula_exactly(bits: str, meta: str) -> None:
    groups = grouping()
    x = torch.randn(20, sum(SIZES), generator=torch.Generator().manual_seed(1)) * 3 + 1
    quantizer = Quantizer(groups, bits, meta, round_first=False)
    back = quantizer.unpack(*quantizer.pack(x)).numpy()
    edges, order = groups.edges.tolist(), groups.permutation.long().numpy()
    for group, clip in enumerate(groups.clip.tolist()):
        channels = order[edges[group] : edges[group + 1]]
        for token in range(len(x)):
            row = x[token].numpy()[channels]
            expected = original(row, clip, LEVELS[bits], meta == "fp8")
            assert np.array_equal(back[token, channels], expected), (group, token)


@pytest.mark.parametrize("round_first", [False, True])
@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("bits", list(LEVELS))
def test_packed_equals_fake_quantization_exactly(bits: str, meta: str, round_first: bool) -> None:
    groups = grouping(2)
    x = torch.randn(64, sum(SIZES), generator=torch.Generator().manual_seed(3))
    quantizer = Quantizer(groups, bits, meta, round_first)
    rows, stored = quantizer.pack(x)
    back = quantizer.unpack(rows, stored)
    parts = groups.permutation.int().split(groups.edges.long().diff().tolist())
    for part, clip in zip(parts, groups.clip, strict=True):
        expected = fake_quantize(x[:, part], clip, LEVELS[bits], meta, round_first)
        assert torch.equal(back[:, part], expected)


@pytest.mark.parametrize("bits", list(LEVELS))
def test_the_bytes_are_what_is_stated_and_the_operator_reads_them(bits: str) -> None:
    """The same layout as `ops.quantize_pack`: two readers written apart agree."""
    groups = grouping(4)
    quantizer = Quantizer(groups, bits, "fp8", round_first=True)
    x = torch.randn(30, sum(SIZES), generator=torch.Generator().manual_seed(5))
    rows, stored = quantizer.pack(x)
    assert rows.dtype == torch.uint8 and rows.shape == (30, ROW_BYTES[bits])
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == (30, len(SIZES), 2)
    assert quantizer.row_bytes == ROW_BYTES[bits] + 2 * len(SIZES)
    read = ops.dequantize_unpack(rows, stored, groups.edges.int(), code=bits)
    assert torch.equal(quantizer.unpack(rows, stored)[:, groups.permutation.long()], read)


@pytest.mark.parametrize("bits", list(LEVELS))
def test_every_code_survives_in_every_place(bits: str) -> None:
    sizes = [9, 5, 16]
    groups = grouping(6, sizes)
    packing = Packing(groups.permutation, groups.edges, bits)
    levels = LEVELS[bits]
    codes = (torch.arange(levels)[:, None] + torch.arange(sum(sizes)) * 7) % levels
    rows = packing.pack(codes.to(torch.uint8))
    assert torch.equal(packing.unpack(rows), codes.float())


def test_bytes_of_a_row_by_hand() -> None:
    """Two groups, channel 4 first: its code fills the lowest place of the first byte."""
    order, edges = torch.tensor([4, 0, 1, 2, 3, 5]).short(), torch.tensor([0, 5, 6]).short()
    codes = torch.tensor([[1, 2, 0, 2, 1, 2]], dtype=torch.uint8)  # of channels 0 .. 5
    ternary = Packing(order, edges, "1.5").pack(codes)
    assert ternary.tolist() == [[1 + 3 * 1 + 9 * 2 + 27 * 0 + 81 * 2, 2]]
    two = Packing(order, edges, "2").pack(codes)
    assert two.tolist() == [[1 + 4 * 1 + 16 * 2 + 64 * 0, 2, 2]]
    wide = torch.tensor([[1, 6, 0, 7, 4, 3]], dtype=torch.uint8)
    three = Packing(order, edges, "3").pack(wide)
    # Low two bits of 4 1 6 0 | 7, then their third bits; then those of 3.
    assert three.tolist() == [[0 + 4 * 1 + 16 * 2 + 64 * 0, 3, 0b10101, 3, 0]]


@pytest.mark.parametrize(
    ("bits", "after", "first"),
    [("4", 0.0191, 0.0096), ("3", 0.0487, 0.0400), ("2", 0.2203, 0.2130), ("1.5", 0.4687, 0.4600)],
)
def test_the_cost_of_rounding_after_the_codes(bits: str, after: float, first: float) -> None:
    """Squared error on N(0, 1), groups of 128, ratio 0.92: the original's order and the better one."""
    x = torch.randn(20000, 128, generator=torch.Generator().manual_seed(7))
    errors = [
        float((fake_quantize(x, 0.92, LEVELS[bits], "fp8", rounded) - x).square().mean())
        for rounded in (False, True)
    ]
    assert errors[0] == pytest.approx(after, rel=0.02)
    assert errors[1] <= first


def test_the_clip_is_about_zero() -> None:
    """A group on [5, 7] moves down as a whole: clipping makes it worse, as published."""
    x = 5 + 2 * torch.rand(2000, 128, generator=torch.Generator().manual_seed(8))
    whole, clipped = (
        float((fake_quantize(x, ratio, 4, "fp16") - x).square().mean()) for ratio in (1.0, 0.92)
    )
    assert whole == pytest.approx(0.0355, rel=0.03)
    assert clipped == pytest.approx(0.0518, rel=0.03)


def test_flat_groups_and_large_values_are_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [3.3, 3.3], [-1000.0, 1000.0], [1e-7, 2e-7]])
    for meta in ("fp8", "fp16"):
        for rounded in (False, True):
            back = fake_quantize(x, 1.0, 4, meta, rounded)
            assert back.isfinite().all()
            torch.testing.assert_close(back[1], x[1], rtol=0.05, atol=0)
            torch.testing.assert_close(back[3], x[3], rtol=0, atol=2e-3)


def test_a_broken_token_spoils_its_own_group_only() -> None:
    groups = grouping(9, [4, 4])
    x = torch.randn(3, 8)
    x[1, groups.permutation[2].long()] = torch.inf
    x[2, groups.permutation[5].long()] = torch.nan
    for rounded in (False, True):
        quantizer = Quantizer(groups, "2", "fp8", rounded)
        back = quantizer.unpack(*quantizer.pack(x))[:, groups.permutation.long()]
        assert back.isnan().tolist() == [
            [False] * 8,
            [True] * 4 + [False] * 4,
            [False] * 4 + [True] * 4,
        ]


def test_codes_are_whole_numbers_below_the_levels() -> None:
    x = torch.randn(50, 16)
    for levels in LEVELS.values():
        codes, scale, zero = encode(x, 0.5, levels, "fp8")
        assert codes.dtype == torch.uint8 and int(codes.max()) == levels - 1
        assert scale.shape == zero.shape == (50, 1)
