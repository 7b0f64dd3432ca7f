"""Operators as PyTorch sees them: schemas, fake kernels, torch.compile; and the small operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_cases import Case, cu_seqlens
from devices import EMULATED, Device
from torch._subclasses.fake_tensor import FakeTensorMode

from skvq_ext import RecordFormat, build_info, ops

FORMAT = RecordFormat("2", "1.5", 128, "fp8", 64)


def names(case: Case) -> dict[str, object]:
    return case.fmt.args._asdict()


def case_with(tokens: int, device: Device) -> Case:
    case = Case(FORMAT, device)
    # opcheck compares all bytes, and NaN is not equal to itself.
    case.cache = case.cache._replace(
        **{
            n: torch.zeros_like(getattr(case.cache, n))
            for n in ("sink_k", "sink_v", "ring_k", "ring_v")
        }
    )
    case.append(case.rows(tokens), case.rows(tokens))
    return case


def test_opcheck_append(device: Device):
    case = case_with(90, device)
    arguments = (case.rows(40), case.rows(40), cu_seqlens([40], device), *case.cache)
    torch.library.opcheck(
        torch.ops.skvq.append.default, arguments, {**names(case), "window": case.window}
    )


@pytest.mark.parametrize("own_workspace", [False, True])
def test_opcheck_decode_attention(own_workspace: bool, device: Device):
    case = case_with(300, device)
    tensors = case.rows(2, 4), None, *case.cache[:7], case.cache.exponents
    options = {**names(case), "window": case.window}
    skvq = torch.ops.skvq
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(skvq.decode_workspace_bytes.default, tensors, options, test_utils=checks)
    extras = [torch.zeros(4, device=device.name), torch.zeros(2, 4, device=device.name)]
    if own_workspace:
        size = skvq.decode_workspace_bytes(*tensors, **options)
        assert (size > 0) == device.tensor_cores
        extras.append(torch.zeros(size, dtype=torch.uint8, device=device.name))
    options["softmax_scale"] = 0.125
    torch.library.opcheck(skvq.decode_attention.default, (*tensors, *extras), options)


def test_opcheck_the_others(device: Device):
    opcheck, skvq = torch.library.opcheck, torch.ops.skvq
    case = case_with(300, device)

    def here(x: torch.Tensor) -> torch.Tensor:
        return x.to(device.name)

    groups = torch.tensor([0, 3, 64], dtype=torch.int32)
    x, clip = here(torch.randn(5, 64)), here(torch.ones(2))
    # fp16 metadata: opcheck itself multiplies results, which PyTorch cannot do with float8 on the CPU.
    opcheck(skvq.quantize_pack.default, (x, groups, clip), {"code": "1.5", "meta": "fp16"})
    codes, metas = ops.quantize_pack(x, groups, code="1.5", meta="fp16")
    opcheck(skvq.dequantize_unpack.default, (codes, metas, groups), {"code": "1.5"})
    permutation = torch.stack([torch.randperm(64) for _ in range(2)]).to(torch.int32)
    opcheck(skvq.permute_channels.default, (case.rows(3), here(permutation)))
    state = here(torch.randn(3, 2, 64)), here(torch.randn(3, 2))
    opcheck(skvq.merge_states.default, (*state, *(t.clone() for t in state)))
    ids = (here(torch.tensor(pair, dtype=torch.int32)) for pair in ([0, 1], [2, 3]))
    opcheck(skvq.copy_pages.default, (case.cache.pages, *ids))
    packed = case.cache.page_table[0, :2].contiguous()
    opcheck(
        skvq.unpack_pages.default,
        (case.cache.pages, packed, case.cache.exponents),
        {**names(case), "head_dim": 64},
    )
    options = {**names(case), "target": "rows", "head_dim": 64}
    opcheck(skvq.repack_pages.default, (case.cache.pages.cpu(),), options)


def test_compile_full_graph_through_a_model_like_function(device: Device):
    eager, compiled = case_with(99, device), case_with(99, device)
    fmt = eager.fmt.args
    weight = (torch.randn(64 * 4, 64 * 4) / 16).to(device.name, device.dtype)

    def step(x, cache):
        rows = (x @ weight).reshape(1, 4, 64)
        ops.append(rows[:, :2], rows[:, 2:], None, cache, fmt, window=32)
        out, _ = ops.decode_attention(rows, None, cache, fmt, window=32, softmax_scale=0.125)
        return torch.nn.functional.silu(out.flatten(1)) @ weight

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(1, 256).to(device.name, device.dtype)
        torch.testing.assert_close(run(x, compiled.cache), step(x, eager.cache), rtol=0, atol=1e-6)
    assert compiled.cache.kv_len.item() == eager.cache.kv_len.item() == 103
    assert torch.equal(compiled.cache.pages, eager.cache.pages)


def fake_cache() -> ops.CacheTensors:
    """A cache on a GPU that need not exist; inside of a FakeTensorMode."""
    rows = torch.empty(1, 160, 2, 64, dtype=torch.bfloat16, device="cuda")
    table, kv_len = (torch.empty(s, dtype=torch.int32, device="cuda") for s in ((1, 4), (1,)))
    pages = torch.empty(8, 2, 2112, dtype=torch.uint8, device="cuda")
    clip, exponents = torch.empty(2, 1, device="cuda"), torch.empty(2, 4, device="cuda").int()
    return ops.CacheTensors(pages, table, rows, rows, rows, rows, kv_len, clip, clip, exponents)


def test_shapes_are_known_without_data_on_any_device():
    with FakeTensorMode():
        cache, q = fake_cache(), torch.empty(7, 4, 64, dtype=torch.bfloat16, device="cuda")
        workspace = torch.empty(999, dtype=torch.uint8, device="cuda")
        options = {"window": 32, "softmax_scale": 1.0, "workspace": workspace}
        out, lse = ops.decode_attention(q, None, cache, FORMAT.args, **options)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype) == ((7, 4), torch.float32)
        k = torch.empty(7, 2, 64, dtype=torch.bfloat16, device="cuda")
        ops.append(k, k, None, cache, FORMAT.args, window=32)
        with pytest.raises(RuntimeError, match="ask for it before tracing, or pass no workspace"):
            ops.decode_workspace_bytes(q, None, cache, FORMAT.args, window=32)
        ids = torch.empty(3, dtype=torch.int32, device="cuda")
        ops.copy_pages(cache.pages, ids, ids)
        k, v = ops.unpack_pages(cache.pages, ids, cache.exponents, FORMAT.args, 64)
        assert k.shape == v.shape == (3, 2, 64, 64) and k.device.type == "cuda"
        assert ops.repack_pages(cache.pages, FORMAT.args, 64, "mma").shape == cache.pages.shape
        tables = (None, None, None, torch.empty(64, 64, device="cuda"))
        assert ops.enter_heads(q, *tables, num_kv_heads=2).device == q.device
        assert ops.leave_heads(q, *tables, None, num_kv_heads=2).shape == q.shape
        merged, _ = ops.merge_states(out, lse, out, lse)
        assert (merged.shape, merged.device.type) == (q.shape, "cuda")


def test_tensors_on_different_devices_are_named():
    with FakeTensorMode(), pytest.raises(ValueError, match=r"different devices \(cpu, cuda:0\)"):
        q = torch.empty(7, 4, 64, dtype=torch.bfloat16)
        options = {"window": 32, "softmax_scale": 1.0}
        ops.decode_attention(q, None, fake_cache(), FORMAT.args, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_the_tensor_on_another_device_is_named():
    case = Case(FORMAT, dtype=torch.float16)
    case.append(case.rows(100), case.rows(100))
    with pytest.raises(ValueError, match="ring_k is on cpu and the other tensors of this call on"):
        case.attend(torch.zeros(1, 4, 64, dtype=torch.float16, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_permute_channels(dtype, device: Device):
    x = torch.randn(3, 5, 2, 96).to(dtype)
    permutation = torch.stack([torch.randperm(96) for _ in range(2)])
    got = ops.permute_channels(x.to(device.name), permutation.int().to(device.name))
    want = torch.stack([x[..., h, permutation[h]] for h in range(2)], dim=-2)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("x", "permutation", "message"),
    [
        (
            torch.zeros(3, 2, 8),
            torch.zeros(2, 8, dtype=torch.int32),
            "permutation of head 0 holds 0 at 1",
        ),
        (
            torch.zeros(3, 2, 8),
            torch.arange(8, dtype=torch.int32),
            r"permutation has shape \[8\]; expected \[2, 8\]",
        ),
        (
            torch.zeros(8),
            torch.arange(8, dtype=torch.int32),
            r"x has shape \[8\]; expected \[..., heads, head_dim\]",
        ),
        (torch.zeros(3, 8, 2).mT, torch.zeros(2, 8, dtype=torch.int32), "x is not contiguous"),
    ],
)
def test_permutations_that_are_refused(x, permutation, message):
    with pytest.raises(ValueError, match=message):
        ops.permute_channels(x, permutation)


def test_copy_pages(device: Device):
    pages = torch.randint(0, 256, (6, 2, 32), dtype=torch.uint8, device=device.name)
    before = pages.clone()
    ids = (torch.tensor(x, dtype=torch.int32, device=device.name) for x in ([0, 1], [5, 3]))
    ops.copy_pages(pages, *ids)
    assert torch.equal(pages[[5, 3]], before[[0, 1]]) and torch.equal(
        pages[[0, 1, 2, 4]], before[[0, 1, 2, 4]]
    )


def test_pages_that_cannot_be_copied():
    pages = torch.zeros(6, 2, 32, dtype=torch.uint8)
    for source, target, message in (
        ([0], [6], r"target_ids\[0\] is 6; pages are 0 to 5"),
        ([0, 1], [2, 2], "target_ids names page 2 twice"),
        ([0, 1], [1, 2], "page 1 is both source and target"),
        ([0, 1], [2], "source_ids and target_ids have 2 and 1 entries"),
    ):
        ids = torch.tensor(source, dtype=torch.int32), torch.tensor(target, dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            ops.copy_pages(pages, *ids)


DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, {tests!r})
from cache_cases import Case
from skvq_ext import RecordFormat, build_info
case = Case(RecordFormat("3:1/2+2", "1.5", 128, "fp8", 128))
k, v, q = case.rows(400), case.rows(400), case.rows(2, 8)
case.append(k, v)
out, _ = case.attend(q)
digest = hashlib.sha256(case.cache.pages.numpy().tobytes()).hexdigest()
print(build_info()["cpu_isa"], digest, out.double().sum().item())
"""


# The emulator takes the place of csrc/cpu.
ONLY_CPU = pytest.mark.skipif(EMULATED, reason="about csrc/cpu, whose place the emulator takes")


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = DIGEST.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "SKVQ_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@ONLY_CPU
def test_every_instruction_set_packs_the_same_bytes():
    results = {}
    for isa in build_info()["cpu_isas"].split(", "):
        done = run_with_isa(isa)
        if "is not supported by this CPU" in done.stderr:
            continue
        name, digest, total = done.stdout.split()
        assert name == isa
        results[isa] = digest, float(total)
    assert "portable" in results
    digests, totals = zip(*results.values(), strict=True)
    assert len(set(digests)) == 1
    assert max(totals) - min(totals) < 1e-3


def test_an_unknown_instruction_set_is_refused():
    done = run_with_isa("sse9")
    assert (
        "SKVQ_CPU_ISA=sse9 is not an instruction set of this build; this build has" in done.stderr
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 112, 192, 512])
def test_heads_enter_and_leave(dim, dtype, device: Device):
    x = torch.randn(7, 6, dim).to(dtype)
    permutation = torch.stack([torch.randperm(dim) for _ in range(2)])
    shift, scale = torch.randn(2, dim), torch.rand(2, dim) + 0.5
    matrix, share = torch.randn(2, dim, dim) / dim**0.5, torch.rand(7, 6)
    there = [t.to(device.name) for t in (x, permutation.int(), shift, scale, matrix, share)]
    entered = ops.enter_heads(*there[:5], num_kv_heads=2).cpu()
    left = ops.leave_heads(*there, num_kv_heads=2).cpu()
    for head in range(6):
        kv = head // 3
        rows = (x[:, head].double() - shift[kv])[:, permutation[kv]] * scale[kv]
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(
            entered[:, head].double(), rows @ matrix[kv].double(), rtol=tolerance, atol=tolerance
        )
        back = torch.empty(7, dim, dtype=torch.float64)
        back[:, permutation[kv]] = x[:, head].double() @ matrix[kv].double() * scale[kv]
        back += share[:, head, None] * shift[kv]
        torch.testing.assert_close(left[:, head].double(), back, rtol=tolerance, atol=tolerance)
    options = {"num_kv_heads": 2}
    torch.library.opcheck(torch.ops.skvq.enter_heads.default, tuple(there[:5]), options)
    torch.library.opcheck(torch.ops.skvq.leave_heads.default, tuple(there), options)
    nothing = ops.enter_heads(there[0], None, None, None, None, num_kv_heads=6)
    assert torch.equal(nothing.cpu(), x)


def map_in_order(x, permutation, shift, scale, matrix):
    """The map into the cache in float32, one product after the other from the first channel to the last."""
    heads = []
    for head in range(x.shape[1]):
        kv = head // (x.shape[1] // len(shift))
        u = (x[:, head].float() - shift[kv])[:, permutation[kv].long()] * scale[kv]
        total = torch.zeros_like(u)
        for i in range(u.shape[1]):
            total += u[:, i, None] * matrix[kv, i]
        heads.append(total)
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256, 512])
def test_every_device_maps_heads_to_the_same_bits(dim, dtype, device: Device):
    x = (torch.randn(5, 4, dim) * 3).to(dtype)
    tables = torch.stack([torch.randperm(dim) for _ in range(2)]).int(), torch.randn(2, dim)
    arguments = (x, *tables, torch.rand(2, dim) + 0.5, torch.randn(2, dim, dim) / dim**0.5)
    there = [t.to(device.name) for t in arguments]
    got = ops.enter_heads(*there, num_kv_heads=2).cpu()
    assert torch.equal(got, map_in_order(*arguments).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has shape \[3, 4\]; expected \[any, any, any\]"),
        ({"x": torch.zeros(3, 5, 64)}, "x has 5 heads; expected a multiple of num_kv_heads 2"),
        ({"x": torch.zeros(3, 4, 70)}, "x has 70 channels; expected a multiple of 16 up to 512"),
        ({"shift": torch.zeros(4, 64)}, r"shift has shape \[4, 64\]; expected \[2, 64\]"),
        ({"scale": torch.zeros(2, 64).half()}, "scale has dtype Half; expected Float"),
        ({"matrix": torch.zeros(64, 32)}, r"matrix has shape \[64, 32\]; expected \[64, 64\]"),
        (
            {"permutation": torch.full((2, 64), 64, dtype=torch.int32)},
            "permutation of head 0 holds 64; channels are 0 to 63",
        ),
    ],
)
def test_maps_that_are_refused(change, message):
    names = ("permutation", "shift", "scale", "matrix")
    arguments = {"x": torch.zeros(3, 4, 64), **dict.fromkeys(names), **change}
    with pytest.raises(ValueError, match=message):
        ops.enter_heads(*arguments.values(), num_kv_heads=2)
