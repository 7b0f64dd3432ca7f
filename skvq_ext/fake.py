"""Fake kernels: shapes and dtypes of every operator without data, for torch.compile and FakeTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skvq_ext import ops

_META_DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}


def _same_device(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(
            f"tensors of one call are on different devices ({names}); move all of them to one device"
        )


@torch.library.register_fake("skvq::permute_channels")
def _permute_channels(x: Tensor, permutation: Tensor) -> Tensor:
    _same_device(x, permutation)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("skvq::enter_heads")
def _enter_heads(
    x: Tensor,
    permutation: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    matrix: Tensor | None,
    num_kv_heads: int,
) -> Tensor:
    _same_device(x, permutation, shift, scale, matrix)
    return x.new_empty(x.shape)


@torch.library.register_fake("skvq::leave_heads")
def _leave_heads(
    o: Tensor,
    permutation: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    matrix: Tensor | None,
    share: Tensor | None,
    num_kv_heads: int,
) -> Tensor:
    _same_device(o, permutation, shift, scale, matrix, share)
    return o.new_empty(o.shape)


@torch.library.register_fake("skvq::quantize_pack")
def _quantize_pack(
    x: Tensor,
    group_start: Tensor,
    clip: Tensor | None = None,
    *,
    code: str,
    meta: str = "fp8",
    scale_exponent: int = 0,
    zero_exponent: int = 0,
) -> tuple[Tensor, Tensor]:
    _same_device(x, clip)  # group_start is always on the CPU
    # The bytes of a row depend on the group sizes, which are data.
    row_bytes = torch.library.get_ctx().new_dynamic_size(min=1)
    metas = x.new_empty((x.shape[0], group_start.shape[0] - 1, 2), dtype=_META_DTYPES[meta])
    return x.new_empty((x.shape[0], row_bytes), dtype=torch.uint8), metas


@torch.library.register_fake("skvq::dequantize_unpack")
def _dequantize_unpack(
    codes: Tensor,
    meta: Tensor,
    group_start: Tensor,
    *,
    code: str,
    scale_exponent: int = 0,
    zero_exponent: int = 0,
) -> Tensor:
    _same_device(codes, meta)
    channels = torch.library.get_ctx().new_dynamic_size(min=1)
    return codes.new_empty((codes.shape[0], channels), dtype=torch.float32)


@torch.library.register_fake("skvq::append")
def _append(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *cache_and_format: Any) -> None:
    _same_device(k, v, cu_seqlens, *cache_and_format[: len(ops.CacheTensors._fields)])


@torch.library.register_fake("skvq::decode_attention")
def _decode_attention(
    q: Tensor, cu_seqlens_q: Tensor | None, *cache: Tensor | None, **_options: object
) -> tuple[Tensor, Tensor]:
    _same_device(q, cu_seqlens_q, *cache)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("skvq::decode_workspace_bytes")
def _decode_workspace_bytes(*_tensors: Tensor | None, **_options: object) -> int:
    raise RuntimeError(
        "the size of a workspace depends on the device, which is not there while a function is traced; "
        "ask for it before tracing, or pass no workspace"
    )


@torch.library.register_fake("skvq::merge_states")
def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    _same_device(out_a, lse_a, out_b, lse_b)
    return torch.empty_like(out_a), torch.empty_like(lse_a)


@torch.library.register_fake("skvq::copy_pages")
def _copy_pages(pages: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    _same_device(pages, source_ids, target_ids)


@torch.library.register_fake("skvq::unpack_pages")
def _unpack_pages(
    pages: Tensor, page_ids: Tensor, exponents: Tensor, *, head_dim: int, **_format: object
) -> tuple[Tensor, Tensor]:
    _same_device(pages, page_ids, exponents)
    tile = int(ops.format_table()["tile_tokens"])
    shape = (page_ids.shape[0], pages.shape[1], tile, head_dim)
    return pages.new_empty(shape, dtype=torch.float32), pages.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("skvq::repack_pages")
def _repack_pages(pages: Tensor, **_format: object) -> Tensor:
    return torch.empty_like(pages)
