"""Decode attention by others and by skvq_ext, each as calls on buffers of its own.

A backend takes a `Problem`, a number of copies and a device, and returns one call per copy. It raises where it is not
installed or does not take the problem; whoever measures says so beside the figures of the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Tensor]

PAGE = 16  # tokens of a page of FlashInfer
WINDOW, SINKS, ROLLBACK = 128, 5, 64
CHUNK = 16384  # tokens that are appended at once


@dataclass(frozen=True)
class Problem:
    """One query per sequence over `context` tokens."""

    batch: int
    context: int
    num_q_heads: int
    num_kv_heads: int
    dtype: str  # "bf16" or "fp16"
    head_dim: int = 128

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of queries, of the window, and of K and V in full precision."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    @property
    def ratio(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def name(self) -> str:
        """As it stands in tables and in docs/gpu.md."""
        heads = f"{self.num_kv_heads}x{self.ratio}"
        return f"{self.dtype} d{self.head_dim} {heads} b{self.batch} n{self.context}"

    def question_bytes(self) -> int:
        """Bytes of queries and outputs."""
        return 2 * 2 * self.batch * self.num_q_heads * self.head_dim


class FullPrecision:
    """A backend that reads K and V of 16 bits."""

    def __init__(self, name: str, build: Callable[[Problem, int, str], list[Call]]) -> None:
        self.name, self.build = name, build

    def bytes_moved(self, p: Problem) -> int:
        """Bytes that a call must read and write."""
        return 4 * p.batch * p.context * p.num_kv_heads * p.head_dim + p.question_bytes()

    def bytes_held(self, p: Problem) -> int:
        """Device memory that a copy takes."""
        return self.bytes_moved(p)


def random(p: Problem, device: str, *shape: int) -> Tensor:
    """Normal numbers in the problem's type."""
    return torch.randn(shape, dtype=p.torch_dtype, device=device)


def sdpa(kind: SDPBackend, grouped: bool, p: Problem, copies: int, device: str) -> list[Call]:
    """torch's scaled_dot_product_attention: query heads of one KV head as rows, or with enable_gqa."""
    rows = (p.num_kv_heads, p.ratio) if not grouped else (p.num_q_heads, 1)
    q = random(p, device, p.batch, *rows, p.head_dim)

    def call(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([kind]):
            out: Tensor = scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return out.view(p.batch, p.num_q_heads, p.head_dim)

    shape = (p.batch, p.num_kv_heads, p.context, p.head_dim)
    return [
        partial(call, random(p, device, *shape), random(p, device, *shape)) for _ in range(copies)
    ]


def flash_attn(module: str, p: Problem, copies: int, device: str) -> list[Call]:
    """flash_attn_with_kvcache of flash-attention 2 ("flash_attn") or 3 ("flash_attn_interface")."""
    attend = importlib.import_module(module).flash_attn_with_kvcache
    lengths = torch.full((p.batch,), p.context, dtype=torch.int32, device=device)
    q = random(p, device, p.batch, 1, p.num_q_heads, p.head_dim)

    def call(k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, cache_seqlens=lengths)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first.view(p.batch, p.num_q_heads, p.head_dim)

    shape = (p.batch, p.context, p.num_kv_heads, p.head_dim)
    return [
        partial(call, random(p, device, *shape), random(p, device, *shape)) for _ in range(copies)
    ]


def flashinfer(p: Problem, copies: int, device: str) -> list[Call]:
    """FlashInfer's decode over pages, planned once."""
    module: Any = importlib.import_module("flashinfer")
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=p.ratio > 1
    )
    pages = p.context // PAGE
    indptr = torch.arange(p.batch + 1, dtype=torch.int32, device=device) * pages
    indices = torch.randperm(p.batch * pages, device=device).to(torch.int32)
    last = torch.full((p.batch,), PAGE, dtype=torch.int32, device=device)
    wrapper.plan(
        *(indptr, indices, last, p.num_q_heads, p.num_kv_heads, p.head_dim, PAGE),
        q_data_type=p.torch_dtype,
        kv_data_type=p.torch_dtype,
    )
    q = random(p, device, p.batch, p.num_q_heads, p.head_dim)
    shape = (p.batch * pages, PAGE, p.num_kv_heads, p.head_dim)
    caches = [(random(p, device, *shape), random(p, device, *shape)) for _ in range(copies)]
    return [partial(wrapper.run, q, cache) for cache in caches]


def own_buffers(cache: Any) -> Any:
    """A cache that shares page table, clip ratios and exponents, and nothing that grows with the context."""
    names = ("pages", "sink_k", "sink_v", "ring_k", "ring_v")
    return cache._replace(**{name: getattr(cache, name).clone() for name in names})


class Packed:
    """skvq_ext with one scheme, through its operators."""

    def __init__(self, k: str, v: str, group: int = 128, meta: str = "fp8") -> None:
        self.k, self.v, self.group, self.meta = k, v, group, meta
        self.name = f"skvq k{k}-v{v}-g{group}"

    def format(self, p: Problem, arrangement: str = "mma") -> Any:
        """The record of one KV head and 64 tokens."""
        from skvq_ext.format import RecordFormat

        return RecordFormat(self.k, self.v, self.group, self.meta, p.head_dim, arrangement)

    def tiles(self, p: Problem) -> int:
        """Packed tiles of a sequence."""
        return max(0, p.context - SINKS - WINDOW) // 64

    def packed_bytes(self, p: Problem) -> int:
        """All records of a sequence."""
        return self.tiles(p) * p.num_kv_heads * int(self.format(p).record_bytes)

    def bytes_moved(self, p: Problem) -> int:
        """Every record and every row in full precision once, queries and outputs."""
        tail, packed = p.context - 64 * self.tiles(p), self.packed_bytes(p)
        return p.batch * (packed + 4 * tail * p.num_kv_heads * p.head_dim) + p.question_bytes()

    def bytes_held(self, p: Problem) -> int:
        """The pages and the rings, which hold more rows than are read."""
        packed = self.packed_bytes(p)
        rows = SINKS + WINDOW + 64 + ROLLBACK
        return p.batch * (packed + 4 * rows * p.num_kv_heads * p.head_dim)

    def build(self, p: Problem, copies: int, device: str, arrangement: str = "mma") -> list[Call]:
        """Calls of decode_attention on copies of one cache, filled in chunks."""
        from skvq_ext import ops

        fmt = self.format(p, arrangement)
        cache = self.empty(p, fmt, device)
        chunk = max(1, CHUNK // p.batch)
        for done in range(0, p.context, chunk):
            rows = p.batch * min(chunk, p.context - done)
            k, v = (random(p, device, rows, p.num_kv_heads, p.head_dim) for _ in range(2))
            ops.append(k, v, None, cache, fmt.args, window=WINDOW)
        caches = [cache] + [own_buffers(cache) for _ in range(copies - 1)]
        q = random(p, device, p.batch, p.num_q_heads, p.head_dim)

        def call(one: ops.CacheTensors) -> Tensor:
            return ops.decode_attention(
                q, None, one, fmt.args, window=WINDOW, softmax_scale=p.head_dim**-0.5
            )[0]

        return [partial(call, one) for one in caches]

    def empty(self, p: Problem, fmt: Any, device: str) -> Any:
        """A cache for `append`, its pages in random order."""
        from skvq_ext import ops

        tiles, heads = self.tiles(p), p.num_kv_heads

        def rows(count: int) -> Tensor:
            return torch.zeros(
                p.batch, count, heads, p.head_dim, dtype=p.torch_dtype, device=device
            )

        order = torch.randperm(p.batch * tiles, dtype=torch.int32, device=device)
        slots = WINDOW + 64 + ROLLBACK
        return ops.CacheTensors(
            pages=torch.zeros(
                p.batch * tiles, heads, fmt.record_bytes, dtype=torch.uint8, device=device
            ),
            page_table=order.view(p.batch, tiles),
            sink_k=rows(SINKS),
            sink_v=rows(SINKS),
            ring_k=rows(slots),
            ring_v=rows(slots),
            kv_len=torch.zeros(p.batch, dtype=torch.int32, device=device),
            k_clip=torch.ones(heads, len(fmt.k_groups), device=device),
            v_clip=torch.ones(heads, len(fmt.v_groups), device=device),
            exponents=torch.full((heads, 4), -2, dtype=torch.int32, device=device),
        )


Backend = FullPrecision | Packed


def backends(p: Problem) -> list[Backend]:
    """Everything that is compared; where a KV head has one query head both ways to call torch are one."""
    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found: list[Backend] = [
        FullPrecision(f"torch {name}, rows", partial(sdpa, kind, False))
        for name, kind in kinds.items()
    ]
    if p.ratio > 1:
        found += [
            FullPrecision(f"torch {name}, enable_gqa", partial(sdpa, kind, True))
            for name, kind in kinds.items()
        ]
    found += [
        FullPrecision("flashinfer", flashinfer),
        FullPrecision("flash_attn 2", partial(flash_attn, "flash_attn")),
        FullPrecision("flash_attn 3", partial(flash_attn, "flash_attn_interface")),
        Packed("2", "2"),
        Packed("2", "1.5"),
    ]
    return found
