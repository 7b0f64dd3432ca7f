"""Formats, the quantizer of plain matrices, and the bytes of records."""

from __future__ import annotations

import itertools

import pytest
import torch
from cache_cases import Case
from devices import EMULATED, Device

from skvq_ext import RecordFormat, format_table, ops
from skvq_ext.reference import quantize_group

CODES = [c["name"] for c in format_table()["codes"]]
UNEVEN = [1, 3, 7, 127, 129, 448, 2155]


def starts(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def reference_rows(x, sizes, code, meta, clip, exponents=(0, 0)):
    parts, first = [], 0
    for size, ratios in zip(sizes, clip, strict=True):
        part = quantize_group(x[:, first : first + size], code, meta, ratios, *exponents)
        parts.append(part.dequantize())
        first += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("reorder", "choices"), [(False, 1), (True, 1), (True, 3)])
def test_packed_rows_equal_the_reference_in_every_bit(
    code, meta, dtype, reorder, choices, device: Device
):
    torch.manual_seed(1)
    x = torch.randn(5, sum(UNEVEN)) * torch.linspace(0.01, 3, sum(UNEVEN))
    if reorder:
        x = x[:, torch.randperm(x.shape[1])].contiguous()
    x = x.to(dtype)
    clip = torch.linspace(0.8, 1.0, len(UNEVEN))
    if choices > 1:
        clip = clip[:, None] * torch.tensor([0.9, 0.7, 1.0])
    exponents = {"scale_exponent": -3, "zero_exponent": -2}
    there = x.to(device.name), starts(UNEVEN), clip.to(device.name)
    codes, metas = ops.quantize_pack(*there, code=code, meta=meta, **exponents)
    back = ops.dequantize_unpack(codes, metas, starts(UNEVEN), code=code, **exponents)
    assert torch.equal(back.cpu(), reference_rows(x, UNEVEN, code, meta, clip, (-3, -2)))


@pytest.mark.parametrize(
    ("code", "bits"), [("4", 4.125), ("3", 3.125), ("2", 2.125), ("1.5", 1.75)]
)
def test_bytes_of_rows_are_what_is_stated(code, bits):
    x = torch.randn(4, 4096)
    codes, metas = ops.quantize_pack(x, starts([128] * 32), code=code)
    stored = codes.untyped_storage().nbytes() + metas.untyped_storage().nbytes()
    assert stored * 8 / x.numel() == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize(
    ("code", "limit"), [("4", 0.0096), ("3", 0.0400), ("2", 0.2130), ("1.5", 0.4600)]
)
@pytest.mark.parametrize("size", [1.0, 0.003])
def test_fp8_metadata_costs_nothing(code, limit, size):
    torch.manual_seed(0)
    x = torch.randn(4000, 128)
    exponent = 0 if size == 1.0 else -8
    arguments = {"code": code, "scale_exponent": exponent, "zero_exponent": exponent}
    codes, metas = ops.quantize_pack(x * size, starts([128]), torch.tensor([0.92]), **arguments)
    back = ops.dequantize_unpack(codes, metas, starts([128]), **arguments)
    assert ((back / size - x) ** 2).mean() <= limit * (1.0 if size == 1.0 else 1.02)


@pytest.mark.parametrize("meta", ["fp8", "fp16"])
@pytest.mark.parametrize("code", CODES)
def test_large_values_stay_finite(code, meta, device: Device):
    x = torch.linspace(-1000, 1000, 256, device=device.name).reshape(2, 128)
    codes, metas = ops.quantize_pack(
        x, starts([128]), code=code, meta=meta, scale_exponent=2, zero_exponent=2
    )
    back = ops.dequantize_unpack(
        codes, metas, starts([128]), code=code, scale_exponent=2, zero_exponent=2
    )
    assert back.isfinite().all()


def test_clip_does_not_shift_one_sided_groups():
    x = torch.rand(2000, 128, generator=torch.Generator().manual_seed(0)) * 2 + 5
    errors = {}
    for clip in (1.0, 0.92):
        codes, metas = ops.quantize_pack(
            x, starts([128]), torch.tensor([clip]), code="2", meta="fp16"
        )
        errors[clip] = (
            (ops.dequantize_unpack(codes, metas, starts([128]), code="2") - x) ** 2
        ).mean()
    assert errors[0.92] <= errors[1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_group_only(bad, device: Device):
    x = torch.randn(3, 96)
    x[1, 40] = bad
    x = x.to(device.name)
    codes, metas = ops.quantize_pack(x, starts([32, 32, 32]), code="2")
    back = ops.dequantize_unpack(codes, metas, starts([32, 32, 32]), code="2")
    spoiled = torch.zeros(3, 96, dtype=torch.bool)
    spoiled[1, 32:64] = True
    assert torch.equal(back.isnan().cpu(), spoiled)


def test_record_sizes():
    assert RecordFormat("2", "2", 128, "fp8", 128).record_bytes == 4352
    assert RecordFormat("2", "1.5", 128, "fp8", 128).record_bytes == 3968
    assert RecordFormat("2", "1.5fast", 128, "fp8", 128).record_bytes == 4352
    assert RecordFormat("4", "4", 128, "fp8", 128).bits_per_value == 4.125
    assert RecordFormat("3:1/2+2", "1.5", 0, "fp8", 128).record_bytes == 64 * (40 + 4 + 26 + 2)


def test_groups_stay_inside_bands():
    fmt = RecordFormat("3:1/2+2", "1.5", 128, "fp8", 192)
    assert fmt.k_bands == ((0, 96), (96, 192)) == fmt.k_groups
    assert fmt.v_groups == ((0, 128), (128, 192))
    assert fmt.codes("k") == ("3", "2")


def code_from_rows(section: bytes, code: str, channels: int, token: int, channel: int) -> int:
    """The readable arrangement as docs/layout.md states it, written once more for this test."""
    if code == "1.5":
        return section[channel * 13 + token // 5] // 3 ** (token % 5) % 3
    widths = {"8": [8], "4": [4], "3": [2, 1], "2": [2], "1.5fast": [2]}[code]
    value, low, plane = 0, 0, 0
    for width in widths:
        bit = (token * channels + channel) * width
        value |= (section[plane + bit // 8] >> bit % 8 & (2**width - 1)) << low
        plane += channels * 64 * width // 8
        low += width
    return value


@pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")
@pytest.mark.parametrize("code", CODES)
def test_bytes_of_a_record_in_rows(code):
    fmt = RecordFormat(code, "2", 32, "fp8", 64, "rows")
    case = Case(fmt, num_kv_heads=1, sinks=0, window=1)
    k, v = case.rows(66), case.rows(66)
    case.append(k, v)
    record = bytes(case.cache.pages[case.cache.page_table[0, 0], 0].tolist())
    groups = [
        quantize_group(k[:64, 0, a:b], code, "fp8", float(case.cache.k_clip[0, g]), -2, 0)
        for g, (a, b) in enumerate(fmt.k_groups)
    ]
    want = torch.cat([g.codes for g in groups], dim=1)
    got = [[code_from_rows(record, code, 64, t, c) for c in range(64)] for t in range(64)]
    assert torch.equal(torch.tensor(got), want.to(torch.int64))


@pytest.mark.parametrize(
    ("head_dim", "k"),
    [
        (head_dim, k)
        for head_dim in format_table()["head_dims"]
        for k in [*CODES, "3:1/2+2", "4:1/4+2"]
        if ":" not in k or head_dim * int(k[2]) % (int(k[4]) * 16) == 0
    ],
)
def test_all_arrangements_hold_the_same_numbers_as_the_reference(k, head_dim, device: Device):
    arrangements = ["mma"] if device.tensor_cores else format_table()["arrangements"]
    read = {}
    for arrangement in arrangements:
        fmt = RecordFormat(k, k.split(":")[0], 32, "fp16", head_dim, arrangement)
        case = Case(fmt, device, sinks=2, window=3, dtype=torch.float32)
        rows_k, rows_v = case.rows(135), case.rows(135)
        case.append(rows_k, rows_v)
        read[arrangement] = case.unpack(case.cache.page_table[0, :2].contiguous())
    reference = case.reference(rows_k, rows_v)
    for arrangement, (got_k, got_v) in read.items():
        for got, want in ((got_k, reference.packed_k), (got_v, reference.packed_v)):
            assert torch.equal(got.transpose(1, 2).flatten(0, 1), want[2:130]), arrangement


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2", "2", 128, "fp8", 72), "head_dim 72 is not supported; supported are 64, 80, 96"),
        (("2", "2", 48, "fp8", 64), "group 48 is not supported; supported are 32, 64, 128 and 0"),
        (("2", "2", 64, "fp32", 64), 'type "fp32" is unknown; possible are "fp8", "fp16"'),
        (
            ("5", "2", 64, "fp8", 64),
            'number format "5" is unknown; possible are "8", "4", "3", "2", "1.5"',
        ),
        (("3:1/3+2", "2", 64, "fp8", 64), "1/3 of head_dim 64 channels is not a band"),
        (("3:2/2+2", "2", 64, "fp8", 64), "2/2 of head_dim 64 channels is not a band"),
        (("3:1/2", "2", 64, "fp8", 64), "two bands are written WIDTH:NUM/DEN"),
        (("3:x/2+2", "2", 64, "fp8", 64), 'expected a positive number, found "x"'),
        (
            ("2", "2", 64, "fp8", 64, "tensor"),
            'arrangement "tensor" is unknown; possible are "rows", "lanes", "mma"',
        ),
    ],
)
def test_formats_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("+", r"\+")):
        RecordFormat(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 2, 8)}, r"x has shape \[4, 2, 8\]; expected \[tokens, channels\]"),
        (
            {"x": torch.zeros(4, 16, dtype=torch.float64)},
            "x has dtype .*; use float32, float16 or bfloat16",
        ),
        ({"x": torch.zeros(16, 4).T}, "x is not contiguous"),
        (
            {"group_start": torch.tensor([0, 8], dtype=torch.int32)},
            "group_start runs from 0 to 8; expected 0 to 16",
        ),
        (
            {"group_start": torch.tensor([0, 9, 9, 16], dtype=torch.int32)},
            "group 1 runs from channel 9 to 9",
        ),
        ({"group_start": torch.tensor([0, 16])}, "group_start has dtype Long; expected Int"),
        (
            {"clip": torch.tensor([1.5])},
            "clip holds 1.5; a clip ratio is above 0 and at most 1",
        ),
        (
            {"clip": torch.ones(1, 9)},
            r"clip has shape \[1, 9\]; expected \[1\], or a last dimension more of up to 8 ratios",
        ),
        ({"clip": torch.ones(1).double()}, "clip has dtype Double; expected Float"),
        (
            {"x": torch.zeros(1, 4097), "group_start": starts([4097]), "clip": torch.ones(1, 2)},
            "group 0 has 4097 channels; several clip ratios need groups of at most 4096",
        ),
        ({"code": "7"}, 'number format "7" is unknown'),
        ({"meta": "fp4"}, 'type "fp4" is unknown'),
        ({"scale_exponent": 99}, "are 99 and 0; allowed is -32 to 32"),
    ],
)
def test_rows_that_are_refused(change, message):
    arguments = {"x": torch.zeros(4, 16), "group_start": starts([16]), "code": "2", **change}
    with pytest.raises(ValueError, match=message):
        ops.quantize_pack(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_group_starts_on_a_gpu_are_refused():
    x = torch.zeros(4, 16, device="cuda")
    with pytest.raises(ValueError, match=r"group_start is on a GPU.*call \.cpu\(\) on it"):
        ops.quantize_pack(x, starts([16]).cuda(), code="2")


def test_codes_that_do_not_fit_their_groups_are_refused():
    codes, metas = ops.quantize_pack(torch.zeros(4, 16), starts([16]), code="2")
    with pytest.raises(ValueError, match=r"codes has shape \[4, 4\]; expected \[any, 8\]"):
        ops.dequantize_unpack(codes, metas, starts([16]), code="4")
    with pytest.raises(ValueError, match="meta has dtype Float; expected float8_e4m3fn or float16"):
        ops.dequantize_unpack(codes, metas.float(), starts([16]), code="2")
