"""Attention by llama.cpp: ggml's flash-attention operator, called in the libraries that llama-cpp-python installs.

K and V are F16 or blocks of 32 values with a scale. They lie as llama.cpp keeps them (`llama_kv_cache::get_k`), which
is token after token with the heads of a token side by side, or head after head, which is several times faster where
pages are small. The mask that llama.cpp adds is left out: every token is seen.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llama-cpp-python"
F32 = 0
TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
BITS = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}  # of a value, scales included
BLOCK = 32  # values of q8_0 and q4_0 that share a scale
SLACK = 1 << 16  # bytes for tensor and graph objects, beside what ggml says they need
FEATURES = (
    *("avx", "avx_vnni", "avx2", "f16c", "fma", "avx512", "avx512_vbmi", "avx512_vnni"),
    *("avx512_bf16", "amx_int8", "neon", "dotprod", "sve"),
)


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(ctypes.Structure):
    """struct ggml_cplan, with room for members that newer versions append."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("rest", ctypes.c_uint8 * 252),
    )


# name: result, arguments. Structs larger than two registers are returned through a pointer, so _Plan may be too long.
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int, *[c_int64] * 4]),
    "ggml_permute": (c_void_p, [c_void_p, c_void_p, *[c_int] * 4]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_flash_attn_ext": (c_void_p, [*[c_void_p] * 5, *[c_float] * 3]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_cpu_init": (None, []),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
}


class Library:
    """The functions of libggml-base and libggml-cpu, typed."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for library, functions in ((base, _BASE), (self.cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        for name, number in TYPES.items():
            found = self.type_name(number).decode()
            if found != name:
                raise ImportError(
                    f"type {number} of this {PACKAGE} is {found}, {name} was expected: its ggml is another one than "
                    "bench/ggml.py was written for"
                )
        self.cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no ggml function {name} is declared in bench/ggml.py")

    def features(self) -> list[str]:
        """Instruction sets that its kernels were compiled for."""
        tests = {name: getattr(self.cpu, f"ggml_cpu_has_{name}", None) for name in FEATURES}
        return [name for name, has in tests.items() if has is not None and has()]


@lru_cache(maxsize=1)
def load() -> Library:
    """The library. Raises: ImportError that says what is missing."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"not installed: pip install {PACKAGE}")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    try:
        return Library(folder)
    except (OSError, AttributeError) as error:
        raise ImportError(f"the ggml of {PACKAGE} cannot be used: {error}") from error


def installed_version() -> str:
    """Of llama-cpp-python."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "not installed"


class Attention:
    """One query per sequence over a cache of one type; buffers, graph and plan are made once.

    sizes: batch, context, query heads, KV heads, head_dim. kind: "f16", "q8_0" or "q4_0", of K and of V. by_head: they
    lie head after head, not token after token.
    """

    def __init__(self, *sizes: int, kind: str, by_head: bool = False) -> None:
        self._free: Any = None
        self.sizes, self.kind, self.by_head = sizes, kind, by_head
        batch, context, q_heads, kv_heads, head_dim = sizes
        if kind != "f16" and head_dim % BLOCK:
            raise ValueError(f"{kind} has blocks of {BLOCK} values, which do not divide {head_dim}")
        if q_heads % kv_heads:
            raise ValueError(f"{kv_heads} KV heads do not divide {q_heads} query heads")
        lib = self.lib = load()
        self.row_bytes = int(lib.row_size(TYPES[kind], head_dim))
        self.tensor_bytes = batch * context * kv_heads * self.row_bytes
        size = 2 * self.tensor_bytes + 2 * 4 * batch * q_heads * head_dim
        size += 16 * int(lib.tensor_overhead()) + int(lib.graph_overhead()) + SLACK
        self.buffer = torch.empty(size, dtype=torch.uint8)
        self._context = lib.init(_InitParams(size, self.buffer.data_ptr(), False))
        self._free = lib.free
        self._q = lib.new_tensor_4d(self._context, F32, head_dim, 1, q_heads, batch)
        self._k, k = self._new_cache()
        self._v, v = self._new_cache()
        self._out = lib.flash_attn_ext(self._context, self._q, k, v, None, head_dim**-0.5, 0.0, 0.0)
        self._graph = lib.new_graph(self._context)
        lib.build_forward_expand(self._graph, self._out)
        self._set_threads(1)

    def _new_cache(self) -> tuple[int, int]:
        """A tensor as it lies in memory, and as [batch, kv_heads, context, head_dim]."""
        batch, context, _, kv_heads, head_dim = self.sizes
        order = (context, kv_heads) if self.by_head else (kv_heads, context)
        made = self.lib.new_tensor_4d(self._context, TYPES[self.kind], head_dim, *order, batch)
        return made, made if self.by_head else self.lib.permute(self._context, made, 0, 2, 1, 3)

    def _set_threads(self, threads: int) -> None:
        self._plan = self.lib.graph_plan(self._graph, threads, None)
        self._work = torch.empty(max(1, self._plan.work_size), dtype=torch.uint8)
        self._plan.work_data = self._work.data_ptr()
        self._plan_pointer = ctypes.byref(self._plan)

    def __del__(self) -> None:
        if self._free is not None:
            self._free(self._context)

    def _floats(self, tensor: int) -> Tensor:
        """A float tensor [batch, q_heads, head_dim] of ggml as one of torch, without a copy."""
        batch, _, q_heads, _, head_dim = self.sizes
        start = self.lib.get_data(tensor) - self.buffer.data_ptr()
        numbers = self.buffer[start : start + 4 * batch * q_heads * head_dim].view(torch.float32)
        return numbers.view(batch, q_heads, head_dim)

    def set_queries(self, q: Tensor) -> None:
        """q: [batch, q_heads, head_dim]."""
        self._floats(self._q).copy_(q)

    def fill(self, start: int, k: Tensor, v: Tensor) -> None:
        """Stores tokens from `start` on; k, v: float32 [batch, tokens, kv_heads, head_dim]."""
        batch, context, _, kv_heads, head_dim = self.sizes
        tokens = k.shape[1]
        if k.shape != v.shape or k.shape != (batch, tokens, kv_heads, head_dim):
            raise ValueError(f"K {tuple(k.shape)} and V {tuple(v.shape)} do not fit {self.sizes}")
        if start + tokens > context:
            raise ValueError(f"{start} + {tokens} tokens do not fit into {context}")
        stripes, heads = (kv_heads, 1) if self.by_head else (1, kv_heads)
        for target, x in ((self._k, k), (self._v, v)):
            # each stripe: adjacent rows, in the cache and here
            rows = x.view(batch, tokens, stripes, heads, head_dim).transpose(1, 2).contiguous()
            for index, stripe in enumerate(rows.flatten(0, 1)):
                place = (index * context + start) * heads * self.row_bytes
                self.lib.quantize_chunk(
                    *(TYPES[self.kind], stripe.data_ptr(), self.lib.get_data(target) + place, 0),
                    *(tokens * heads, head_dim, None),
                )

    def copy(self) -> Attention:
        """The same on buffers of its own."""
        other = Attention(*self.sizes, kind=self.kind, by_head=self.by_head)
        for mine, theirs in ((self._k, other._k), (self._v, other._v)):
            data = self.lib.get_data
            ctypes.memmove(data(theirs), data(mine), self.tensor_bytes)
        other.set_queries(self._floats(self._q))
        return other

    def attend(self, threads: int = 1) -> Tensor:
        """float32 [batch, q_heads, head_dim], in a buffer that the next call overwrites."""
        if threads != self._plan.n_threads:
            self._set_threads(threads)
        status = self.lib.graph_compute(self._graph, self._plan_pointer)
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute returned {status}")
        return self._floats(self._out)
