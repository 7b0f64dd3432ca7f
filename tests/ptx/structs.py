"""The structs of include/skvq for ctypes. `layout_check()` is C++ that fails to compile where they differ."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_uint8, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

Fields = list[tuple[str, Any]]


class DType(IntEnum):
    F32, F16, BF16 = range(3)


class Meta(IntEnum):
    FP8, FP16 = range(2)


class Band(Structure):
    _fields_: ClassVar[Fields] = [("code", c_uint8), ("begin", c_int), ("channels", c_int)]


class TensorFormat(Structure):
    _fields_: ClassVar[Fields] = [
        ("head_dim", c_int),
        ("group", c_int),
        ("num_bands", c_int),
        ("bands", Band * 2),
    ]


class RecordFormat(Structure):
    _fields_: ClassVar[Fields] = [
        ("k", TensorFormat),
        ("v", TensorFormat),
        ("meta", c_uint8),
        ("arrangement", c_uint8),
    ]


class CacheView(Structure):
    _fields_: ClassVar[Fields] = [
        ("pages", c_void_p),
        ("page_table", c_void_p),
        ("sink_k", c_void_p),
        ("sink_v", c_void_p),
        ("ring_k", c_void_p),
        ("ring_v", c_void_p),
        ("kv_len", c_void_p),
        ("exponents", c_void_p),
        ("num_pages", c_int64),
        ("batch", c_int),
        ("num_kv_heads", c_int),
        ("head_dim", c_int),
        ("max_pages", c_int),
        ("num_sinks", c_int),
        ("ring_slots", c_int),
        ("window", c_int),
        ("dtype", c_uint8),
        ("format", RecordFormat),
    ]


class RowsView(Structure):
    _fields_: ClassVar[Fields] = [
        ("data", c_void_p),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
    ]


class Ragged(Structure):
    _fields_: ClassVar[Fields] = [
        ("cu_seqlens", c_void_p),
        ("num_tokens", c_int64),
        ("batch", c_int),
    ]


class ClipTable(Structure):
    _fields_: ClassVar[Fields] = [
        ("ratios", c_void_p),
        ("choices", c_int),
    ]


class AppendArgs(Structure):
    _fields_: ClassVar[Fields] = [
        ("cache", CacheView),
        ("k", RowsView),
        ("v", RowsView),
        ("tokens", Ragged),
        ("k_clip", ClipTable),
        ("v_clip", ClipTable),
    ]


class DecodeArgs(Structure):
    _fields_: ClassVar[Fields] = [
        ("cache", CacheView),
        ("q", RowsView),
        ("queries", Ragged),
        ("q_dtype", c_uint8),
        ("num_q_heads", c_int),
        ("softmax_scale", c_float),
        ("softcap", c_float),
        ("sliding_window", c_int),
        ("exact", c_bool),
        ("queries_in_cache", c_bool),
        ("learned_sinks", c_void_p),
        ("logit_shift", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
    ]


STRUCTS = (
    *(Band, TensorFormat, RecordFormat, CacheView),
    *(RowsView, Ragged, ClipTable, AppendArgs, DecodeArgs),
)


def layout_check() -> str:
    """C++ whose static assertions compare every size and offset."""
    lines = ["#include <cstddef>", '#include "skvq/cache.h"']
    for struct in STRUCTS:
        name = f"skvq::{struct.__name__}"
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, _ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f"static_assert(offsetof({name}, {field}) == {offset});")
    return "\n".join(lines) + "\n"
