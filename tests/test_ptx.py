"""What nvcc makes of the CUDA kernels, executed by the interpreter in tests/ptx on a machine without a GPU.

First every wrapper of csrc/cuda/ptx.cuh by itself against a line of numpy, then append and decode as a whole.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import Case, attention_bound, torch_error
from ptx.backend import KERNELS, SMALL_INSTANCE, Backend, Device, backend_sources
from ptx.cases import DeviceCase
from ptx.compiler import ARCHS, ROOT, Source, compile_source, find_nvcc
from ptx.launch import Program
from ptx.memory import DeviceMemory
from ptx.numbers import Array
from ptx.structs import layout_check

from skvq_ext import RecordFormat

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc in CUDA_HOME or on PATH")

PTX_HEADER = ROOT / "csrc" / "cuda" / "ptx.cuh"
CONFORMANCE = KERNELS / "conformance.cu"
RNG = np.random.default_rng(0)


class Kernels:
    """The kernels of conformance.cu on one architecture."""

    def __init__(self, text: str) -> None:
        self.memory = DeviceMemory()
        self.program = Program(text, self.memory)

    def __call__(
        self,
        name: str,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        *,
        grid: int = 1,
        threads: int = 32,
        seed: int | None = None,
    ) -> list[Array]:
        """Launches a kernel on copies of arrays; what is in the outputs then."""
        given = [self.memory.put(x, writable=False) for x in inputs]
        places = [self.memory.put(x) for x in outputs]
        self.program.launch(f"conform_{name}", (grid,), (threads,), [*given, *places], seed=seed)
        pairs = zip(places, outputs, strict=True)
        return [self.memory.get(place, x.dtype, x.shape) for place, x in pairs]


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def kernels(arch: int) -> Kernels:
    return Kernels(compile_source(Source(CONFORMANCE)).text(arch))


def halves(shape: tuple[int, ...]) -> Array:
    """Random halves, a third of them subnormal: codes reach the tensor cores as subnormal numbers."""
    x = RNG.standard_normal(shape)
    return np.where(RNG.random(shape) < 0.33, x * 2.0**-16, x).astype(np.float16)


def same(a: Array, b: Array) -> bool:
    """Equal bit for bit, except that a NaN equals any other."""
    nan = np.isnan(a) & np.isnan(b)
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and bool(((a.view(bits) == b.view(bits)) | nan).all())


def bf16(x: Array) -> Array:
    """Rounded by PyTorch, which knows the type, as its bits."""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view("u2")


def float_of_bf16(bits: Array) -> Array:
    return torch.from_numpy(bits.view("i2").copy()).view(torch.bfloat16).float().numpy()


# ---- Wrappers ----


def test_every_wrapper_has_a_kernel_of_its_own() -> None:
    """A wrapper with inline assembly is a function of ptx.cuh; conformance.cu must call all of them."""
    text = PTX_HEADER.read_text()
    functions = re.split(r"^(?:template <[^>]*>\n)?SKVQ_DEVICE ", text, flags=re.M)[1:]
    names = {re.match(r"[\w:]+ (\w+)\(", f)[1] for f in functions if "asm" in f}  # type: ignore[index]
    assert len(names) > 10, "no wrappers found: this test would pass on nothing"
    used = set(re.findall(r"ptx::(\w+)", CONFORMANCE.read_text()))
    assert names <= used, f"no conformance kernel for {names - used}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_multiplies_what_the_arrangement_deals_out(kernels: Kernels, kind: str) -> None:
    """The kernel fills the operand A by skvq::Mma::element; the interpreter reads it by the table of the ISA."""
    a, b = halves((16, 16)), halves((16, 8))
    d = RNG.standard_normal((16, 8)).astype(np.float32)
    if kind == "bf16":
        a, b = bf16(a), bf16(b)
        exact = float_of_bf16(a).astype(np.float64) @ float_of_bf16(b).astype(np.float64)
    else:
        exact = a.astype(np.float64) @ b.astype(np.float64)
    (got,) = kernels(f"mma_{kind}", [a.view("u2"), b.view("u2")], [d])
    assert same(got, (exact + d).astype(np.float32))


def test_mma_keeps_subnormal_operands(kernels: Kernels) -> None:
    """Codes 0 to 3 in bits 0, 2, ..., 8 of a half are numbers under 2^-14: their products must be exact."""
    codes = np.arange(256, dtype=np.uint16).reshape(16, 16) % 4 << 2 * (
        np.arange(16, dtype=np.uint16) % 5
    )
    b = np.eye(16, 8).astype(np.float16)
    (got,) = kernels("mma_f16", [codes.astype("u2"), b.view("u2")], [np.zeros((16, 8), np.float32)])
    assert np.array_equal(got, codes[:, :8] * 2.0**-24)


def test_matrices_are_transposed_and_loaded(kernels: Kernels) -> None:
    x = RNG.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    (got,) = kernels("transpose_8x8", [x[0]], [np.zeros((8, 8), np.uint16)])
    assert np.array_equal(got, x[0].T)
    (got,) = kernels("load_matrices", [x], [np.zeros_like(x)])
    assert np.array_equal(got, x)
    (got,) = kernels("load_matrices_transposed", [x], [np.zeros_like(x)])
    assert np.array_equal(got, x.transpose(0, 2, 1))


def test_every_e4m3_becomes_its_half(kernels: Kernels) -> None:
    """All pairs of 256 bytes, by the instruction (sm_90) and by moved bits (sm_80), against PyTorch's E4M3."""
    pairs = (
        np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).astype(np.uint8).reshape(-1, 2)
    )
    (got,) = kernels(
        "unpack_e4m3", [pairs], [np.zeros((65536, 2), np.float16)], grid=512, threads=128
    )
    want = torch.from_numpy(pairs).view(torch.float8_e4m3fn).half().numpy()
    assert same(got, want)


def special_floats(count: int) -> Array:
    """Numbers of all sizes, ties of both half types, infinities and NaN."""
    bits = RNG.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    ties = (RNG.integers(0, 1 << 19, count // 4) << 13 | 1 << 12).astype(np.uint32) + (100 << 23)
    bits[: count // 4] = ties
    bits[count // 4 : count // 2] = bits[count // 4 : count // 2] & 0xFFFF0000 | 0x8000
    x = bits.view(np.float32).copy()
    x[-6:] = [0.0, -0.0, np.inf, -np.inf, np.nan, 65520.0]
    return x


def test_pairs_are_packed_and_unpacked(kernels: Kernels) -> None:
    low, high = special_floats(1024), special_floats(1024)[::-1].copy()
    out = [np.zeros((1024, 2), np.uint16) for _ in range(2)]
    f16, b16 = kernels("pack", [low, high], out, grid=8, threads=128)
    both = np.stack([low, high], -1)
    with np.errstate(over="ignore"):
        assert same(f16.view(np.float16), both.astype(np.float16))
    assert same(float_of_bf16(b16), float_of_bf16(bf16(both)))
    pairs = RNG.integers(0, 1 << 16, (1024, 2)).astype(np.uint16)
    out = [np.zeros((1024, 2), np.float32) for _ in range(2)]
    f16, b16 = kernels("unpack", [pairs], out, grid=8, threads=128)
    assert same(f16, pairs.view(np.float16).astype(np.float32))
    assert same(b16, float_of_bf16(pairs))


def equal(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def test_sums_and_extremes_of_halves(kernels: Kernels) -> None:
    """minimum and maximum of numpy pass a NaN on, as .NaN does."""
    a, b = (RNG.integers(0, 1 << 16, (1024, 2)).astype(np.uint16) for _ in range(2))
    out = [np.zeros((1024, 2), np.uint16) for _ in range(5)]
    added, *extremes = kernels("pairs", [a, b], out, grid=8, threads=128)
    x, y = a.view(np.float16), b.view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(added.view(np.float16), (x.astype(np.float64) + y).astype(np.float16))
    assert equal(extremes[0].view(np.float16), np.minimum(x, y))
    assert equal(extremes[1].view(np.float16), np.maximum(x, y))
    x, y = float_of_bf16(a), float_of_bf16(b)
    assert equal(float_of_bf16(extremes[2]), np.minimum(x, y))
    assert equal(float_of_bf16(extremes[3]), np.maximum(x, y))


def flushed(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign, as .ftz says."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def test_functions_of_floats(kernels: Kernels) -> None:
    """Within the error that the ISA states for the approximations."""
    x, y = special_floats(1024), special_floats(1024)[::-1].copy()
    x[:512] = np.linspace(-160, 140, 512)
    out = [np.zeros(1024, np.float32) for _ in range(4)]
    powers, least, most, reciprocal = kernels("floats", [x, y], out, grid=8, threads=128)
    with np.errstate(all="ignore"):
        power = np.exp2(x.astype(np.float64)).astype(np.float32)
        inverse = (1.0 / flushed(x).astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(powers, flushed(power), rtol=2.0**-22)
    np.testing.assert_allclose(reciprocal, flushed(inverse), rtol=2.0**-23)
    assert equal(least, np.minimum(x, y)) and equal(most, np.maximum(x, y))


def test_copies_land_when_they_are_waited_for(kernels: Kernels) -> None:
    """Groups one by one, zeros behind the bytes that are read, garbage before the wait."""
    data = RNG.integers(0, 255, (64, 16)).astype(np.uint8)
    out = [np.zeros((32, 16), np.uint8), *(np.zeros((64, 16), np.uint8) for _ in range(2))]
    before, first, second = kernels("copy_async", [data], out)
    cut = np.where(np.arange(16) < (np.arange(32) % 17)[:, None], data[:32], 0)
    assert (before == 255).all() and (first[32:] == 255).all()
    assert np.array_equal(first[:32], cut) and np.array_equal(second[:32], cut)
    assert np.array_equal(second[32:], data[32:])


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_bulk_copies_and_their_barrier(arch: int, kernels: Kernels, seed: int | None) -> None:
    if arch < 90:
        pytest.skip("bulk copies are instructions of sm_90")
    data = RNG.integers(0, 255, (4, 1, 32, 16)).astype(np.uint8)
    (got,) = kernels(
        "copy_bulk", [data], [np.zeros((4, 4, 32, 16), np.uint8)], threads=128, seed=seed
    )
    assert np.array_equal(got, np.broadcast_to(data, got.shape))


def test_a_struct_by_value(kernels: Kernels) -> None:
    data = RNG.integers(0, 1000, 32).astype(np.uint32)
    out = kernels.memory.put(np.zeros(32, np.float32))
    struct = np.zeros(1, "u8, u1, 3V, 3i4, f4, 4V")
    struct[0] = (kernels.memory.put(data), 7, b"", (5, 50, 500), 0.25, b"")
    kernels.program.launch("conform_struct", (1,), (32,), [struct.tobytes(), 2, out])
    assert np.array_equal(kernels.memory.get(out, np.float32, (32,)), (data + 500) * 0.25 + 7)


# ---- Deliberate mistakes ----

MISTAKES = {
    "two registers of A exchanged": ("{%4, %5, %6, %7}", "{%5, %4, %6, %7}"),
    "registers of B exchanged": ("{%8, %9}", "{%9, %8}"),
    "halves of a pair exchanged": ('"f"(high), "f"(low)', '"f"(low), "f"(high)'),
}


def planted(folder: Path, mistake: str) -> Path:
    """A folder whose cuda/ptx.cuh has the mistake, to be searched before csrc."""
    right, wrong = MISTAKES[mistake]
    text = PTX_HEADER.read_text()
    assert right in text, f"{right} is no longer in ptx.cuh: plant another mistake"
    (folder / "cuda").mkdir()
    (folder / "cuda" / "ptx.cuh").write_text(text.replace(right, wrong))
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_operand_of_inline_assembly_is_seen(
    tmp_path: Path, arch: int, mistake: str
) -> None:
    wrong = Kernels(compile_source(Source(CONFORMANCE, (planted(tmp_path, mistake),))).text(arch))
    test = test_pairs_are_packed_and_unpacked
    arguments: tuple[object, ...] = (wrong,)
    if "register" in mistake:
        test, arguments = test_mma_multiplies_what_the_arrangement_deals_out, (wrong, "f16")
    with pytest.raises(AssertionError):
        test(*arguments)


# ---- append and decode ----


@pytest.fixture(scope="module")
def backend(arch: int) -> Backend:
    """One multiprocessor with little shared memory: few blocks, so that warps read many tiles."""
    return Backend.build(backend_sources(), Device(arch, 1, 64 * 1024))


def test_structs_lie_as_in_cpp(tmp_path: Path) -> None:
    source = tmp_path / "layout.cpp"
    source.write_text(layout_check())
    command = [str(find_nvcc()), "-std=c++20", f"-I{ROOT / 'include'}", "-c", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "layout.o")], check=True)


def make(fmt: RecordFormat, dtype: torch.dtype, lengths: list[int], kv_heads: int) -> Case:
    return Case(fmt, num_kv_heads=kv_heads, batch=len(lengths), max_pages=32, dtype=dtype)


K2V2 = RecordFormat("2", "2", 64, "fp8", 64, "mma")
TERNARY = RecordFormat("2", "1.5", 128, "fp8", 128, "mma")
FOUR = RecordFormat("4", "4", 32, "fp16", 64, "mma")
BANDS = RecordFormat("3:1/2+2", "2", 64, "fp16", 64, "mma")

APPENDS = [
    (K2V2, torch.float16, [[300]], None),
    (K2V2, torch.float32, [[37], [64], [1]], None),
    (TERNARY, torch.bfloat16, [[130, 0, 259]], 3),
    (TERNARY, torch.float16, [[5, 101], [1, 1], [64, 70]], 4),
    (FOUR, torch.float16, [[170]], 5),
    (BANDS, torch.bfloat16, [[99, 38], [3, 3], [66, 65]], None),
    (RecordFormat("8", "3", 0, "fp8", 80, "mma"), torch.float16, [[200]], 6),
    (RecordFormat("1.5", "4:1/4+2", 32, "fp16", 192, "mma"), torch.float16, [[103]], None),
]


@pytest.mark.parametrize(("fmt", "dtype", "calls", "seed"), APPENDS)
def test_append_writes_the_bytes_of_the_cpu(
    backend: Backend,
    fmt: RecordFormat,
    dtype: torch.dtype,
    calls: list[list[int]],
    seed: int | None,
) -> None:
    """Every byte of the cache, what may not be touched included; with a seed, warps run one after the other."""
    case = replace(make(fmt, dtype, calls[0], 2), choices=2 if seed is None else 1)
    device = DeviceCase(case, replace(backend, seed=seed))
    for lengths in calls:
        k, v = case.rows(sum(lengths)), case.rows(sum(lengths))
        k[0, 0, 3], v[-1, 1, 5] = torch.inf, torch.nan
        case.append(k, v, lengths)
        device.append(k, v, lengths)
        for name, got in device.cache().items():
            want = getattr(case.cache, name)
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name


def check_decode(
    backend: Backend,
    fmt: RecordFormat,
    dtype: torch.dtype,
    lengths: list[int],
    ratio: int,
    q_len: int,
    **options: object,
) -> None:
    case = make(fmt, dtype, lengths, 2)
    k, v = case.rows(sum(lengths)), case.rows(sum(lengths))
    case.append(k, v, lengths)
    q = case.rows(q_len * len(lengths), 2 * ratio)
    out, lse = DeviceCase(case, backend).attend(q, [q_len] * len(lengths), **options)  # type: ignore[arg-type]
    scale, first = fmt.head_dim**-0.5, 0
    for i, length in enumerate(lengths):
        rows, mine = slice(first, first + length), slice(i * q_len, (i + 1) * q_len)
        first += length
        reference = case.reference(k[rows], v[rows])
        want, want_lse = reference.attend(q[mine], length - q_len, softmax_scale=scale, **options)  # type: ignore[arg-type]
        error = torch_error(reference, q[mine], length - q_len, scale, dtype)
        assert (out[mine].double() - want).abs().max() <= attention_bound(want, dtype, error)
        lse_bound = 1e-5 * max(1.0, want_lse.abs().max().item())
        assert (lse[mine].double() - want_lse).abs().max() <= lse_bound


F16, BF16 = torch.float16, torch.bfloat16
DECODES = [
    (K2V2, F16, [1400], 4, 1, None, {}),
    (K2V2, BF16, [300, 37, 4], 1, 1, None, {}),
    (K2V2, F16, [700], 12, 1, 0, {}),
    (K2V2, F16, [500], 4, 3, None, {"sliding_window": 200}),
    (K2V2, BF16, [400], 2, 1, 1, {"softcap": 2.0}),
    (TERNARY, F16, [900], 8, 1, None, {}),
    (TERNARY, BF16, [230, 166], 5, 2, 2, {}),
    (FOUR, F16, [450], 4, 1, None, {}),
    (FOUR, BF16, [300], 3, 4, None, {"learned_sinks": torch.linspace(-1, 3, 6)}),
    (BANDS, F16, [450], 4, 1, 3, {}),
    (BANDS, BF16, [1000], 1, 1, None, {"sliding_window": 700}),
]


@pytest.mark.parametrize(("fmt", "dtype", "lengths", "ratio", "q_len", "seed", "options"), DECODES)
def test_decode_is_attention(
    backend: Backend,
    fmt: RecordFormat,
    dtype: torch.dtype,
    lengths: list[int],
    ratio: int,
    q_len: int,
    seed: int | None,
    options: dict[str, object],
) -> None:
    check_decode(replace(backend, seed=seed), fmt, dtype, lengths, ratio, q_len, **options)


@pytest.mark.parametrize("mistake", ["two registers of A exchanged", "halves of a pair exchanged"])
def test_decode_with_a_wrong_operand_is_no_attention(
    tmp_path: Path, backend: Backend, arch: int, mistake: str
) -> None:
    wrong = compile_source(Source(SMALL_INSTANCE, (planted(tmp_path, mistake),))).text(arch)
    with pytest.raises(AssertionError, match="attention_bound"):
        check_decode(replace(backend, modules=[*backend.modules, wrong]), K2V2, F16, [300], 4, 1)
