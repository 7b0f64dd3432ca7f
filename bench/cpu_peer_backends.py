"""Decode attention on a CPU by skvq_ext, by torch and by llama.cpp: the caches, and the ways to read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ggml
import torch
from cpu_problem import CpuProblem, Data
from peer_backends import SINKS, WINDOW, Packed, own_buffers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from skvq_ext import ops
from skvq_ext.scheme import Scheme

MOST_ERROR = 0.5  # of a peer; far above that of 4 bits or of ggml's sums in half precision over long contexts
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cache(Protocol):
    """Keys and values in some form."""

    def fill(self, start: int, k: Tensor, v: Tensor) -> None:
        """Takes the next tokens, as `Data` gives them."""

    def copy(self) -> Any:
        """The same on buffers of its own."""


class TorchCache:
    """K and V as [batch, num_kv_heads, context, head_dim], which torch's attention likes best."""

    def __init__(self, data: Data, dtype: torch.dtype) -> None:
        p = self.p = data.p
        self.dtype = dtype
        self.q = data.queries.to(dtype)
        shape = (p.batch, p.num_kv_heads, p.context, p.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype) for _ in range(2))

    def fill(self, start: int, k: Tensor, v: Tensor) -> None:
        """As in `Cache`."""
        stop = start + k.shape[1]
        self.k[:, :, start:stop] = k.transpose(1, 2)
        self.v[:, :, start:stop] = v.transpose(1, 2)

    def copy(self) -> TorchCache:
        """As in `Cache`."""
        other = object.__new__(TorchCache)
        other.p, other.dtype, other.q = self.p, self.dtype, self.q
        other.k, other.v = self.k.clone(), self.v.clone()
        return other

    def rows(self) -> Tensor:
        """Queries with those of one KV head as rows of one matrix."""
        return self.q.view(self.p.batch, self.p.num_kv_heads, self.p.ratio, self.p.head_dim)


def sdpa_gqa(c: TorchCache) -> Tensor:
    """torch's fused attention, told of the groups."""
    return scaled_dot_product_attention(c.q[:, :, None], c.k, c.v, enable_gqa=True)


def sdpa_rows(c: TorchCache) -> Tensor:
    """torch's fused attention, a group as rows."""
    return scaled_dot_product_attention(c.rows(), c.k, c.v)


def matmul(c: TorchCache) -> Tensor:
    """Two products and a softmax."""
    logits = c.rows() @ c.k.transpose(-1, -2) * c.p.head_dim**-0.5
    return torch.softmax(logits, -1) @ c.v


def matmul_keys(c: TorchCache) -> Tensor:
    """The same with keys as the left operand, which is what MKL likes better in float32."""
    logits = (c.k @ c.rows().transpose(-1, -2)).transpose(-1, -2) * c.p.head_dim**-0.5
    return torch.softmax(logits, -1) @ c.v


class PackedCache:
    """skvq_ext with one scheme, filled by `ops.append`."""

    def __init__(self, data: Data, scheme: Scheme) -> None:
        packed = packed_of(scheme)
        self.p, self.q = data.p, data.queries.to(data.p.torch_dtype)
        self.fmt = scheme.record_format(data.p.head_dim)
        self.tensors = packed.empty(data.p, self.fmt, "cpu")

    def fill(self, start: int, k: Tensor, v: Tensor) -> None:
        """As in `Cache`."""
        k, v = (x.flatten(0, 1).to(self.p.torch_dtype) for x in (k, v))
        ops.append(k, v, None, self.tensors, self.fmt.args, window=WINDOW)

    def copy(self) -> PackedCache:
        """As in `Cache`."""
        other = object.__new__(PackedCache)
        other.p, other.q, other.fmt = self.p, self.q, self.fmt
        other.tensors = own_buffers(self.tensors)
        return other

    def attend(self, exact: bool) -> Tensor:
        """One step of decoding."""
        options = {"window": WINDOW, "softmax_scale": self.p.head_dim**-0.5, "exact": exact}
        return ops.decode_attention(self.q, None, self.tensors, self.fmt.args, **options)[0]


def packed_of(scheme: Scheme) -> Packed:
    """What knows the sizes. Raises: ValueError for a window or sinks other than those that are measured."""
    if (scheme.window, scheme.sinks) != (WINDOW, SINKS):
        raise ValueError(f"{scheme}: the caches here have w{WINDOW} and sink{SINKS}")
    return Packed(scheme.k, scheme.v, scheme.group, scheme.meta)


def scheme_key(scheme: Scheme) -> str:
    """As in the keys of ratios: k2v1.5_g128, with the type of scales where it is not fp8."""
    group = "ghead" if scheme.group == 0 else f"g{scheme.group}"
    return f"k{scheme.k}v{scheme.v}_{group}" + ("" if scheme.meta == "fp8" else f"_{scheme.meta}")


@dataclass(frozen=True)
class Way:
    """One way to read a cache. scratch: bytes that a call may need besides."""

    call: Callable[[Any], Tensor]
    scratch: int = 0


@dataclass(frozen=True)
class Kind:
    """A form of cache and the ways to read it, by name.

    moved: bytes that a call must read and write. held: bytes of one copy. most_error: relative, of an output that is
    taken for attention. scheme, rivals: as in `Side`.
    """

    name: str
    make: Callable[[Data], Cache]
    ways: dict[str, Way]
    moved: int
    held: int
    most_error: float = MOST_ERROR
    scheme: str = ""
    rivals: str = ""


def packed_kind(p: CpuProblem, scheme: Scheme, suffix: str = "") -> Kind:
    """Ours, both ways to read packed tiles; suffix: of the names. How far off two bits are is for others to judge."""
    packed, name = packed_of(scheme), scheme_key(scheme)
    ways = {
        f"{name}{mode}{suffix}": Way(partial(PackedCache.attend, exact=bool(mode)))
        for mode in ("", "_exact")
    }
    make = partial(PackedCache, scheme=scheme)
    sizes = packed.bytes_moved(p), packed.bytes_held(p)
    return Kind(name + suffix, make, ways, *sizes, math.inf, name)


def torch_kind(p: CpuProblem, name: str) -> Kind:
    """K and V in one of torch's types. Told of groups, torch may repeat keys and values for every query head, and it
    may convert the operands of a product; a group of one is the same told or not."""
    dtype = TYPES[name]
    size = p.values * dtype.itemsize
    ways = {"rows": Way(sdpa_rows)}
    if p.ratio > 1:
        ways["gqa"] = Way(sdpa_gqa, p.ratio * size)
    ways |= {"matmul": Way(matmul, size), "matmul_keys": Way(matmul_keys, size)}
    named = {f"torch_{name}_{way}": call for way, call in ways.items()}
    moved = size + p.question_bytes() * dtype.itemsize // 2
    make = partial(TorchCache, dtype=dtype)
    return Kind(f"torch_{name}", make, named, moved, size, rivals="torch")


def ggml_attend(cache: ggml.Attention) -> Tensor:
    """llama.cpp's, on as many threads as torch's."""
    return cache.attend(torch.get_num_threads())


def llama_kind(p: CpuProblem, name: str, by_head: bool) -> Kind:
    """llama.cpp's flash attention over one of its types of cache, in its own layout or head after head."""

    def make(data: Data) -> ggml.Attention:
        sizes = p.batch, p.context, p.num_q_heads, p.num_kv_heads, p.head_dim
        cache = ggml.Attention(*sizes, kind=name, by_head=by_head)
        cache.set_queries(data.queries)
        return cache

    moved = int(p.values * ggml.BITS[name]) // 8 + 2 * p.question_bytes()
    peer = f"llama_{name}"
    way = f"{peer}_by_{'head' if by_head else 'token'}"
    return Kind(way, make, {way: Way(ggml_attend)}, moved, moved, rivals=peer)


def peers(p: CpuProblem) -> list[Kind]:
    """Everybody else, those first that must not be missing where memory is short."""
    first, *llama = [llama_kind(p, name, by) for by in (True, False) for name in ggml.TYPES]
    bf16, fp32, fp16 = (torch_kind(p, name) for name in ("bf16", "fp32", "fp16"))
    return [bf16, first, fp32, *llama, fp16]
