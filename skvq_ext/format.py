"""The format of a record; sizes, bands and groups come from the compiled definition (include/skvq)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from skvq_ext import ops

TILE_TOKENS = int(ops.format_table()["tile_tokens"])
"""Tokens of a tile and of a page."""


@lru_cache(maxsize=16)
def default_arrangement(device: torch.device | str = "cpu") -> str:
    """The arrangement that attention on a device is made for; elsewhere the CPU's."""
    arrangements: dict[str, str] = ops.build_info()["arrangements"]
    return arrangements.get(torch.device(device).type, arrangements["cpu"])


@dataclass(frozen=True)
class RecordFormat:
    """How one page of one KV head is stored.

    Args:
        k, v: number formats, "2", "1.5", or two bands such as "3:1/2+2".
        group: channels that share a scale and a zero: 32, 64, 128, or 0 for the whole head. Groups stay
            inside a band and the last one of a band may be shorter.
        meta: type of scale and zero, "fp8" or "fp16".
        head_dim: channels of a head.
        arrangement: "lanes" (vector units of a CPU), "mma" (tensor cores of a GPU) or "rows" (readable); see
            `default_arrangement`.

    Raises:
        ValueError: something is not supported; the message names what is.
    """

    k: str
    v: str
    group: int
    meta: str
    head_dim: int
    arrangement: str = field(default_factory=default_arrangement)

    def __post_init__(self) -> None:
        ops.describe_record(self.args, self.head_dim)

    @cached_property
    def args(self) -> ops.FormatArgs:
        """The format as the operators take it."""
        return ops.FormatArgs(self.k, self.v, self.group, self.meta, self.arrangement)

    @cached_property
    def _record(self) -> dict[str, Any]:
        return ops.describe_record(self.args, self.head_dim)

    @property
    def record_bytes(self) -> int:
        """Bytes of 64 tokens of one head, K and V with all scales and zeros."""
        return int(self._record["record_bytes"])

    @property
    def k_groups(self) -> tuple[tuple[int, int], ...]:
        """(first, one past last) channel of each group of K."""
        return tuple((a, b) for a, b in self._record["k"]["groups"])

    @property
    def v_groups(self) -> tuple[tuple[int, int], ...]:
        """(first, one past last) channel of each group of V."""
        return tuple((a, b) for a, b in self._record["v"]["groups"])

    @property
    def k_bands(self) -> tuple[tuple[int, int], ...]:
        """(first, one past last) channel of each band of K."""
        return tuple((b["begin"], b["end"]) for b in self._record["k"]["bands"])

    @property
    def v_bands(self) -> tuple[tuple[int, int], ...]:
        """(first, one past last) channel of each band of V."""
        return tuple((b["begin"], b["end"]) for b in self._record["v"]["bands"])

    def codes(self, side: str) -> tuple[str, ...]:
        """Number format of every group of one side, "k" or "v"."""
        bands = self._record[side]["bands"]
        return tuple(
            next(b["code"] for b in bands if b["begin"] <= first < b["end"])
            for first, _ in self._record[side]["groups"]
        )

    @property
    def bits_per_value(self) -> float:
        """Average stored bits per value over K and V, scales and zeros included."""
        return self.record_bytes * 8 / (2 * TILE_TOKENS * self.head_dim)
