"""What decode attention refuses, and what it says then."""

from __future__ import annotations

import pytest
import torch
from cache_cases import Case
from devices import CPU, CUDA, EMULATED, Device

from skvq_ext import RecordFormat, ops

FORMAT = RecordFormat("2", "1.5", 128, "fp8", 64)


def filled(device: Device, tokens: int = 200, **options) -> Case:
    case = Case(FORMAT, device, **options)
    case.append(case.rows(tokens), case.rows(tokens))
    return case


def on(device: Device, x: object) -> object:
    moves = isinstance(x, torch.Tensor) and x.device.type != "meta"
    return x.to(device.name) if moves else x


def refuses(case: Case, change: dict[str, object], message: str) -> None:
    """An attention with something changed fails."""
    arguments = {"q": torch.zeros(2, 4, 64, dtype=case.dtype), **change}
    arguments = {name: on(case.device, x) for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        case.attend(arguments.pop("q"), arguments.pop("lengths", None), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, 3, 64)},
            "q has 3 heads; expected a multiple of the cache's 2 KV heads",
        ),
        ({"q": torch.zeros(2, 4, 80)}, r"q has shape \[2, 4, 80\]; expected \[any, any, 64\]"),
        ({"q": torch.zeros(2, 4, 64).double()}, "q has dtype .*; use float32, float16 or bfloat16"),
        ({"q": torch.zeros(2, 4, 64, device="meta")}, "on different devices"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; expected a finite number"),
        ({"softcap": -1.0}, "softcap is -1; expected 0"),
        ({"sliding_window": -4}, "sliding_window is -4; expected 0"),
        ({"learned_sinks": torch.zeros(3)}, r"learned_sinks has shape \[3\]; expected \[4\]"),
        ({"logit_shift": torch.zeros(2, 4).half()}, "logit_shift has dtype Half; expected Float"),
        ({"workspace": torch.zeros(64)}, "workspace has dtype Float; expected Byte"),
        (
            {"workspace": torch.zeros(8, 8, dtype=torch.uint8)},
            r"workspace has shape \[8, 8\]; expected \[any\]",
        ),
    ],
)
def test_what_decode_attention_refuses(change, message, device: Device):
    refuses(filled(device), change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(300, 4, 64)}, "sequence 0 has 300 queries but 200 cached tokens"),
        ({"lengths": [1]}, "cu_seqlens_q runs from 0 to 1; expected 0 to 2"),
    ],
)
def test_contents_that_it_refuses_on_the_cpu(change, message):
    case = filled(CPU)
    change = {n: x.to(case.dtype) if n == "q" else x for n, x in change.items()}
    refuses(case, change, message)


def test_a_missing_page_is_named():
    case = filled(CPU, 300)
    case.cache.page_table[0, 2] = 99
    message = r"page_table\[0, 2\] is 99; tokens 133 to 196 of sequence 0 need a page"
    with pytest.raises(ValueError, match=message):
        case.attend(torch.zeros(1, 2, 64, dtype=case.dtype))


# ---- what only tensor cores ask for ----


@pytest.fixture
def cores(device: Device) -> Device:
    """A device whose attention runs on tensor cores."""
    if not device.tensor_cores:
        pytest.skip("csrc/cpu asks for no alignment, format or workspace")
    return device


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same numbers two bytes further on in memory."""
    room = torch.zeros(x.numel() + 8, dtype=x.dtype, device=x.device)
    moved = room[2 // x.element_size() :][: x.numel()].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("name", ["pages", "sink_k", "sink_v", "ring_k", "ring_v"])
def test_tensors_of_a_cache_start_at_sixteen_bytes(name: str, cores: Device):
    case = filled(cores)
    case.cache = case.cache._replace(**{name: shifted(getattr(case.cache, name))})
    message = rf"{name} starts 2 bytes behind a multiple of 16.*call \.clone\(\) on it"
    refuses(case, {}, message)
    with pytest.raises(ValueError, match=message):
        case.append(case.rows(3), case.rows(3))


def test_queries_start_and_step_at_sixteen_bytes(cores: Device):
    case = filled(cores)
    refuses(case, {"q": shifted(case.rows(2, 4))}, "q starts 2 bytes behind a multiple of 16")
    wide = torch.zeros(2, 260, dtype=case.dtype)[:, :256].unflatten(1, (4, 64))
    refuses(case, {"q": wide}, r"q has stride 260 in dimension 0.*call \.contiguous\(\)")
    heads = torch.zeros(1, 4, 68, dtype=case.dtype)[:, :, :64]
    message = "q has stride 68 in dimension 1, and the CUDA kernels load 8 channels at once"
    refuses(case, {"q": heads}, message)


def test_new_rows_may_lie_anywhere(cores: Device):
    plain, crooked = Case(FORMAT, cores), Case(FORMAT, cores)
    k, v = plain.rows(200), plain.rows(200)
    plain.append(k, v)
    crooked.append(shifted(k), torch.cat([v, v[..., :4]], dim=2)[..., :64])
    for own, other in zip(plain.cache, crooked.cache, strict=True):
        assert torch.equal(own.view(torch.uint8), other.view(torch.uint8))


def test_a_workspace_that_is_too_small_or_crooked(cores: Device):
    case, q = filled(cores), torch.zeros(2, 4, 64, dtype=cores.dtype, device=cores.name)
    fmt = case.fmt.args
    needed = ops.decode_workspace_bytes(q, None, case.cache, fmt, window=case.window)
    room = torch.zeros(needed + 16, dtype=torch.uint8, device=cores.name)
    message = f"workspace has {needed - 1} bytes and {needed} are needed; make it as decode_work"
    refuses(case, {"q": q, "workspace": room[: needed - 1]}, message)
    message = "workspace starts 3 bytes behind a multiple of 16"
    refuses(case, {"q": q, "workspace": room[3:]}, message)


def test_formats_and_dtypes_without_a_kernel(cores: Device):
    dtype = cores.dtype
    for fmt, rows, message in (
        (FORMAT, torch.float32, "takes float16 or bfloat16, the same for both"),
        (RecordFormat("8", "8", 32, "fp8", 80), dtype, "no CUDA decode kernel was built for k8-v8"),
        (
            RecordFormat("2", "2", 128, "fp8", 64, "rows"),
            dtype,
            "keep pages in the arrangement mma, and these are in rows",
        ),
    ):
        fmt = cores.arrange(fmt)
        with pytest.raises(ValueError, match=message):
            ops.check_decode_format(fmt.args, fmt.head_dim, rows, cores.name)
    case = filled(cores)
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[dtype]
    refuses(case, {"q": torch.zeros(2, 4, 64, dtype=other)}, "q is bfloat16 and the cache holds fl")


def test_an_unknown_kind_of_device():
    with pytest.raises(ValueError, match="device_type is mps; expected cpu or cuda"):
        ops.check_decode_format(FORMAT.args, 64, torch.float16, "mps")


@pytest.mark.skipif(CUDA is not None and not EMULATED, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so():
    message = r"this build of skvq_ext has no CUDA kernels \(.+\); .*SKVQ_CUDA=1 pip install"
    with pytest.raises(RuntimeError, match=message):
        ops.check_decode_format(FORMAT.args, 64, torch.float16, "cuda")


@pytest.mark.skipif(CUDA is None, reason="no CUDA kernels in this build")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("k", "v"), [("2", "2"), ("2", "1.5"), ("4", "4"), ("2", "1.5fast")])
def test_the_usual_formats_have_a_kernel(k: str, v: str, group: int, head_dim: int):
    fmt = RecordFormat(k, v, group, "fp8", head_dim, "mma")
    name = "cpu" if EMULATED else "cuda"
    ops.check_decode_format(fmt.args, head_dim, torch.bfloat16, name)
