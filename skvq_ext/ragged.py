"""Tokens of several sequences laid end to end, as flash attention's varlen functions take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass
class Ragged:
    """How num_tokens rows are shared out among batch_size sequences.

    cu_seqlens: int32 [batch_size + 1], sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1];
    None = equally many rows each. Build it once per forward and give it to every layer: the counts
    are then read from the device once, and only where somebody asks for them.
    """

    num_tokens: int
    batch_size: int
    cu_seqlens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cu_seqlens is None:
            each, over = divmod(self.num_tokens, self.batch_size)
            if over:
                raise ValueError(
                    f"{self.num_tokens} tokens cannot be shared out equally among "
                    f"{self.batch_size} sequences; give cu_seqlens (int32 [batch + 1])."
                )
            self.counts = [each] * self.batch_size
        elif self.cu_seqlens.shape != (self.batch_size + 1,):
            raise ValueError(
                f"cu_seqlens has shape {list(self.cu_seqlens.shape)}; the cache holds "
                f"{self.batch_size} sequences and needs [{self.batch_size + 1}]."
            )
        elif self.cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens is {self.cu_seqlens.dtype}; give torch.int32.")

    @classmethod
    def of(cls, given: Tensor | Ragged | None, num_tokens: int, batch_size: int) -> Ragged:
        """What a caller gave, checked against the rows and the batch it is meant for."""
        if not isinstance(given, Ragged):
            return cls(num_tokens, batch_size, given)
        if (given.num_tokens, given.batch_size) != (num_tokens, batch_size):
            raise ValueError(
                f"this layout is for {given.num_tokens} tokens of {given.batch_size} sequences, "
                f"found {num_tokens} tokens and {batch_size} sequences."
            )
        return given

    @classmethod
    def of_counts(cls, counts: list[int], device: torch.device | str = "cpu") -> Ragged:
        """The layout of counts[b] rows per sequence."""
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        ragged = cls(sum(counts), len(counts), starts)
        ragged.counts = counts
        return ragged

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each sequence. Reads cu_seqlens from its device the first time."""
        assert self.cu_seqlens is not None  # else known from the start
        starts = self.cu_seqlens.tolist()
        counts = [b - a for a, b in pairwise(starts)]
        if starts[0] != 0 or starts[-1] != self.num_tokens or min(counts) < 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens ({self.num_tokens}), found "
                f"{starts}."
            )
        return counts

    def longer_than(self, limit: int) -> bool:
        """Whether some sequence owns more than `limit` rows; reads the device only if it must."""
        if self.num_tokens <= limit:
            return False
        return max(self.counts) > limit

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Ragged]]:
        """Cuts every sequence into pieces of at most `size` rows.

        Yields (int64 row indices, layout of these rows), the oldest rows first.
        """
        device = "cpu" if self.cu_seqlens is None else self.cu_seqlens.device
        starts = [0, *accumulate(self.counts)]
        for done in range(0, max(self.counts), size):
            counts = [min(size, max(0, n - done)) for n in self.counts]
            rows = [
                torch.arange(start + done, start + done + n)
                for start, n in zip(starts, counts, strict=False)
            ]
            yield torch.cat(rows), Ragged.of_counts(counts, device)
