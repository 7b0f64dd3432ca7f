"""The operators: `torch.ops.skvq.*` with names, shapes and units. The only module that spells them.

The raw operators take the tensors of a cache one by one; the functions here take them as one `CacheTensors`
and the format as one `RecordFormat`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skvq_ext import _library  # noqa: F401  registers the operators

_ops = torch.ops.skvq


class FormatArgs(NamedTuple):
    """Format of a record as the operators take it; see `skvq_ext.format.RecordFormat`."""

    k_format: str
    v_format: str
    group: int
    meta: str
    arrangement: str


class CacheTensors(NamedTuple):
    """The tensors of one layer's cache, all on one device and contiguous; on CUDA pages and rows start
    at multiples of 16 bytes, as everything does that PyTorch allocates.

    pages: uint8 [num_pages, num_kv_heads, record_bytes], the packed records.
    page_table: int32 [batch, max_pages], page of each tile of a sequence, -1 where there is none.
    sink_k, sink_v: [batch, sinks, num_kv_heads, head_dim], the first tokens in full precision.
    ring_k, ring_v: [batch, slots, num_kv_heads, head_dim], the last tokens; position p lies in slot p % slots.
        slots = window + 64 + rollback.
    kv_len: int32 [batch], cached tokens.
    k_clip, v_clip: float32 [num_kv_heads, groups of K or V], share of a group's range that is kept, or
        [num_kv_heads, groups, choices], up to 8 of them: every token takes the one that errs least.
    exponents: int32 [num_kv_heads, 4], powers of two of (K scale, K zero, V scale, V zero).
    """

    pages: Tensor
    page_table: Tensor
    sink_k: Tensor
    sink_v: Tensor
    ring_k: Tensor
    ring_v: Tensor
    kv_len: Tensor
    k_clip: Tensor
    v_clip: Tensor
    exponents: Tensor


def append(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cache: CacheTensors,
    fmt: FormatArgs,
    *,
    window: int,
) -> None:
    """Append tokens to the sequences of a cache; packs every tile that is complete.

    Any number of tokens per sequence and call; the bytes do not depend on how tokens are cut into calls.
    A NaN or infinity makes its own group of its own token read back as NaN and touches nothing else.

    Contents of tensors on a GPU are not checked, since the host would have to wait for them: there a tile
    that has no page is dropped, and cu_seqlens, clip and exponents are taken as they are.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim] in the cache's dtype; tokens of sequence b are rows
            cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        cu_seqlens: int32 [batch + 1], or None for equal lengths.
        cache: written in place, kv_len included.
        fmt: format of the pages.
        window: tokens that stay in full precision.

    Raises:
        ValueError: a tensor does not fit, or a tile that is complete has no page; nothing is written then.
    """
    _ops.append(k, v, cu_seqlens, *cache, *fmt, window)


def decode_attention(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cache: CacheTensors,
    fmt: FormatArgs,
    *,
    window: int,
    softmax_scale: float,
    learned_sinks: Tensor | None = None,
    logit_shift: Tensor | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    queries_in_cache: bool = True,
    exact: bool = False,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over sinks, packed pages and window in one softmax.

    With `queries_in_cache` the q_len queries of a sequence are its last q_len cached tokens and attention is
    causal; for q_len <= rollback + 1 every query sees in full precision exactly what it would see in single
    steps. Without, the queries come right after the cached tokens and see all of them.

    Args:
        q: [num_tokens, num_q_heads, head_dim], float32, float16 or bfloat16, on CUDA the cache's dtype, one
            of the last two; num_q_heads is a multiple of the number of KV heads, and query head h reads KV
            head h // (num_q_heads / num_kv_heads).
        cu_seqlens_q, cache, fmt, window: as given to `append`.
        softmax_scale: factor of q . k.
        learned_sinks: float32 [num_q_heads], a logit per head that takes probability and gives no value.
        logit_shift: float32 [num_tokens, num_q_heads], added to every logit before softcap.
        sliding_window: tokens a query sees, itself included; 0 for all.
        softcap: c of c * tanh(logit / c); 0 for none.
        exact: on the CPU read packed tiles in float32. False: multiply codes with queries and probabilities
            rounded to 7 or 8 bits, 14 or 16 for wide codes: about twice as fast, an error of 1 to 3 % of that
            of the codes (docs/numerics.md). On CUDA both are the same: tensor-core products of halves, summed
            in float32, with exact codes and queries and probabilities rounded to 11 bits.
        workspace: uint8 [decode_workspace_bytes(...)], scratch memory for CUDA; None: allocated here.

    Returns:
        out like q, and lse float32 [num_tokens, num_q_heads], the natural logarithm of the softmax
        denominator (learned sinks included). A query that sees nothing gives 0 and minus infinity.

    Raises:
        ValueError: a tensor or number does not fit, or on CUDA no kernel was built for the format. As in
            `append`, contents are checked on the CPU only; on CUDA a page that is not there makes NaN.
    """
    tensors = q, cu_seqlens_q, *cache[:7], cache.exponents, learned_sinks, logit_shift, workspace
    options = {"window": window, "softmax_scale": softmax_scale, "sliding_window": sliding_window}
    options |= {"softcap": softcap, "queries_in_cache": queries_in_cache, "exact": exact}
    out, lse = _ops.decode_attention(
        *tensors,
        k_format=fmt.k_format,
        v_format=fmt.v_format,
        group=fmt.group,
        meta=fmt.meta,
        arrangement=fmt.arrangement,
        **options,
    )
    return out, lse


def decode_workspace_bytes(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cache: CacheTensors,
    fmt: FormatArgs,
    *,
    window: int,
    sliding_window: int = 0,
) -> int:
    """Bytes of scratch memory that `decode_attention` needs for these arguments, 0 on the CPU.

    Depends on shapes and the device only: one workspace serves every step of a batch, and one layer after
    the other on the same stream.
    """
    tensors = *cache[:7], cache.exponents
    options = {"window": window, "sliding_window": sliding_window}
    return int(_ops.decode_workspace_bytes(q, cu_seqlens_q, *tensors, **fmt._asdict(), **options))


def check_decode_format(
    fmt: FormatArgs, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Raise what `decode_attention` would raise for this format and dtype of rows on a device.

    Raises:
        ValueError: no kernel was built for it; the message says for what there are kernels.
        RuntimeError: this build has no kernels for the device at all.
    """
    _ops.check_decode_format(*fmt, head_dim, dtype, torch.device(device).type)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries over two disjoint sets of tokens.

    Args:
        out_a, out_b: [num_tokens, num_heads, head_dim] of one dtype.
        lse_a, lse_b: float32 [num_tokens, num_heads], natural logarithm.

    Returns:
        out and lse over both sets. Learned sinks must be counted in one part only.
    """
    out, lse = _ops.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse


def copy_pages(pages: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """Copy pages inside a pool.

    Args:
        pages: uint8 [num_pages, num_kv_heads, record_bytes], written in place.
        source_ids, target_ids: int32 [n]; no target may occur twice or be a source (checked on the CPU only;
            on CUDA ids are taken as they are).
    """
    _ops.copy_pages(pages, source_ids, target_ids)


def repack_pages(pages: Tensor, fmt: FormatArgs, head_dim: int, arrangement: str) -> Tensor:
    """Pages in another arrangement, for another device: the same codes, scales and zeros.

    Args:
        pages: as in `CacheTensors`; on CUDA they travel to the CPU and back. fmt: their format.
        arrangement: the one they are wanted in.

    Returns:
        like pages.
    """
    options = {**fmt._asdict(), "target": arrangement, "head_dim": head_dim}
    result: Tensor = _ops.repack_pages(pages.cpu(), **options)
    return result.to(pages.device)


def unpack_pages(
    pages: Tensor, page_ids: Tensor, exponents: Tensor, fmt: FormatArgs, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Read pages back as numbers, for tests and inspection.

    Args:
        pages, exponents: as in `CacheTensors`. page_ids: int32 [n]. fmt: format of the pages.

    Returns:
        k and v, float32 [n, num_kv_heads, 64, head_dim].
    """
    k, v = _ops.unpack_pages(pages, page_ids, exponents, head_dim=head_dim, **fmt._asdict())
    return k, v


def permute_channels(x: Tensor, permutation: Tensor) -> Tensor:
    """Gather channels within each head: out[..., h, c] = x[..., h, permutation[h, c]].

    Args:
        x: [..., heads, head_dim], float32, float16 or bfloat16.
        permutation: int32 [heads, head_dim], a permutation per head.
    """
    result: Tensor = _ops.permute_channels(x, permutation)
    return result


def enter_heads(
    x: Tensor,
    permutation: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    matrix: Tensor | None,
    *,
    num_kv_heads: int,
) -> Tensor:
    """Map k, v or q into the space of the cache: ((x - shift) permuted * scale) @ matrix.

    Every row is computed by itself in float32 and in one order: what a token becomes does not depend on
    which tokens it came with, nor on the instruction set.

    Args:
        x: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; num_heads is a multiple of
            num_kv_heads and heads of one KV head share its tables.
        permutation: int32 [num_kv_heads, head_dim]; channel c comes from permutation[c]. None: as they are.
        shift: float32 [num_kv_heads, head_dim], in the order of x. None: 0.
        scale: float32 [num_kv_heads, head_dim], in permuted order. None: 1.
        matrix: float32 [head_dim, head_dim] or one per KV head. None: the identity.

    Returns:
        like x, contiguous.
    """
    result: Tensor = _ops.enter_heads(x, permutation, shift, scale, matrix, num_kv_heads)
    return result


def leave_heads(
    o: Tensor,
    permutation: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    matrix: Tensor | None,
    share: Tensor | None,
    *,
    num_kv_heads: int,
) -> Tensor:
    """Map the output of attention back: inverse permutation of (o @ matrix * scale), plus share * shift.

    Args:
        o: [num_tokens, num_heads, head_dim].
        permutation, shift, scale, matrix: as in `enter_heads`.
        share: float32 [num_tokens, num_heads], how much of `shift` each row gets. None: 1.

    Returns:
        like o, contiguous.
    """
    result: Tensor = _ops.leave_heads(o, permutation, shift, scale, matrix, share, num_kv_heads)
    return result


def quantize_pack(
    x: Tensor,
    group_start: Tensor,
    clip: Tensor | None = None,
    *,
    code: str,
    meta: str = "fp8",
    scale_exponent: int = 0,
    zero_exponent: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a matrix, each group of channels with its own scale and zero, and pack the codes.

    Groups may have any size; each starts at a byte. Per group (SKVQ section 3, with codes computed against
    the rounded scale and zero): lo, hi = min, max shrunk about their midpoint by clip; zero = round(lo);
    scale = round((hi - zero) / (levels - 1)); code = round(clamp((x - zero) / scale, 0, levels - 1)).

    Args:
        x: [tokens, channels], float32, float16 or bfloat16.
        group_start: int32 [groups + 1], first channel of each group, then the number of channels. Always on
            the CPU: it decides the sizes of the results.
        clip: float32 [groups] in (0, 1], or [groups, choices], up to 8 ratios of which every token takes the one
            that errs least, or None for 1.
        code: "8", "4", "3", "2", "1.5" (5 trits a byte) or "1.5fast" (trits in 2-bit fields).
        meta: "fp8" (E4M3) or "fp16", type of scale and zero.
        scale_exponent, zero_exponent: scale and zero are stored divided by 2 ** exponent.

    Returns:
        codes uint8 [tokens, bytes], and (scale, zero) as float8_e4m3fn or float16 [tokens, groups, 2].
    """
    codes, metas = _ops.quantize_pack(
        x,
        group_start,
        clip,
        code=code,
        meta=meta,
        scale_exponent=scale_exponent,
        zero_exponent=zero_exponent,
    )
    return codes, metas


def dequantize_unpack(
    codes: Tensor,
    meta: Tensor,
    group_start: Tensor,
    *,
    code: str,
    scale_exponent: int = 0,
    zero_exponent: int = 0,
) -> Tensor:
    """Undo `quantize_pack`: code * scale + zero.

    Args: as given to and returned by `quantize_pack`.

    Returns:
        float32 [tokens, channels].
    """
    result: Tensor = _ops.dequantize_unpack(
        codes,
        meta,
        group_start,
        code=code,
        scale_exponent=scale_exponent,
        zero_exponent=zero_exponent,
    )
    return result


@lru_cache(maxsize=1)
def format_table() -> dict[str, Any]:
    """What formats there are: codes with levels and stored bits, head_dims, groups, metas, arrangements."""
    table: dict[str, Any] = json.loads(_ops.format_table())
    return table


@lru_cache(maxsize=256)
def describe_record(fmt: FormatArgs, head_dim: int) -> dict[str, Any]:
    """Sizes, section offsets, bands and groups of one record format."""
    text = _ops.describe_record(*fmt, head_dim)
    record: dict[str, Any] = json.loads(text)
    return record


def build_info() -> dict[str, Any]:
    """What was built and what runs: version, compiler, CPU instruction sets and the chosen one, the
    arrangement each device is made for, and of CUDA (None where it was not built) "archs" and "instances",
    the formats with a decode kernel."""
    info: dict[str, Any] = json.loads(_ops.build_info())
    return info
