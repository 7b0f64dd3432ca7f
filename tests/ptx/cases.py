"""A cache of tests/cache_cases.py on an interpreted device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cache_cases import Case, cu_seqlens
from torch import Tensor

from ptx.backend import Backend
from ptx.numbers import Array
from ptx.structs import (
    AppendArgs,
    Band,
    CacheView,
    ClipTable,
    DecodeArgs,
    DType,
    Meta,
    Ragged,
    RecordFormat,
    RowsView,
    TensorFormat,
)
from skvq_ext import ops
from skvq_ext.format import RecordFormat as Format

DTYPES = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}
CHANGED = ("pages", "sink_k", "sink_v", "ring_k", "ring_v", "kv_len")


def bits_of(x: Tensor) -> Array:
    """The bytes of a tensor, whatever its type: numpy has no bfloat16."""
    return x.contiguous().view(torch.uint8).numpy()


def tensor_of(raw: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(raw.copy()).view(like.dtype).reshape(like.shape)


def tensor_format(fmt: Format, side: str) -> TensorFormat:
    codes = [c["name"] for c in ops.format_table()["codes"]]
    bands = ops.describe_record(fmt.args, fmt.head_dim)[side]["bands"]
    made = TensorFormat(fmt.head_dim, fmt.group or fmt.head_dim, len(bands))
    for i, band in enumerate(bands):
        channels = band["end"] - band["begin"]
        made.bands[i] = Band(codes.index(band["code"]), band["begin"], channels)
    return made


def record_format(fmt: Format) -> RecordFormat:
    table = ops.format_table()
    arrangement = table["arrangements"].index(fmt.arrangement)
    meta = Meta.FP16 if fmt.meta == "fp16" else Meta.FP8
    return RecordFormat(tensor_format(fmt, "k"), tensor_format(fmt, "v"), meta, arrangement)


@dataclass
class DeviceCase:
    """Device copies of the tensors of a case; only those that an operator may change can be written."""

    case: Case
    backend: Backend

    def __post_init__(self) -> None:
        self.address = {
            name: self.put(tensor, writable=name in CHANGED)
            for name, tensor in self.case.cache._asdict().items()
        }

    def put(self, x: Tensor, *, writable: bool = False) -> int:
        return self.backend.memory.put(bits_of(x), writable=writable)

    def get(self, address: int, like: Tensor) -> Tensor:
        return tensor_of(self.backend.memory.get(address, np.uint8, bits_of(like).shape), like)

    def cache(self) -> dict[str, Tensor]:
        """What the device has in the tensors that change."""
        tensors = self.case.cache._asdict()
        return {name: self.get(self.address[name], tensors[name]) for name in CHANGED}

    def view(self) -> CacheView:
        case, c = self.case, self.case.cache
        pointers = (
            "pages",
            "page_table",
            "sink_k",
            "sink_v",
            "ring_k",
            "ring_v",
            "kv_len",
            "exponents",
        )
        return CacheView(
            *(self.address[name] for name in pointers),
            c.pages.shape[0],
            case.batch,
            case.num_kv_heads,
            case.fmt.head_dim,
            case.max_pages,
            case.sinks,
            case.slots,
            case.window,
            DTYPES[case.dtype],
            record_format(case.fmt),
        )

    def rows(self, x: Tensor) -> RowsView:
        return RowsView(self.put(x), x.stride(0), x.stride(1))

    def ragged(self, count: int, lengths: list[int] | None) -> Ragged:
        offsets = cu_seqlens(lengths)
        address = None if offsets is None else self.put(offsets)
        return Ragged(address, count, self.case.batch)

    def append(self, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> None:
        tables = self.case.cache._asdict()
        clips = (
            ClipTable(self.address[name], tables[name][0, 0].numel())
            for name in ("k_clip", "v_clip")
        )
        tokens = self.ragged(k.shape[0], lengths)
        self.backend.append(AppendArgs(self.view(), self.rows(k), self.rows(v), tokens, *clips))

    def attend(
        self,
        q: Tensor,
        lengths: list[int] | None = None,
        *,
        sliding_window: int = 0,
        softcap: float = 0.0,
        learned_sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Filled with garbage: a row that is not written shows.
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        places = self.put(out, writable=True), self.put(lse, writable=True)
        sinks = None if learned_sinks is None else self.put(learned_sinks)
        args = DecodeArgs(
            cache=self.view(),
            q=self.rows(q),
            queries=self.ragged(q.shape[0], lengths),
            q_dtype=DTYPES[q.dtype],
            num_q_heads=q.shape[1],
            softmax_scale=self.case.fmt.head_dim**-0.5,
            softcap=softcap,
            sliding_window=sliding_window,
            exact=True,
            queries_in_cache=True,
            learned_sinks=sinks,
            out=places[0],
            lse=places[1],
        )
        self.backend.decode_attention(args)
        return self.get(places[0], out), self.get(places[1], lse)
