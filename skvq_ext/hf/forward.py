"""What the layers of one cache share during a forward: which of its columns are padding.

A batch reaches a model as [batch, columns]. Columns that the 2-D attention mask calls padding never
enter the cache: every sequence is as long as its real tokens, so a padded batch is a ragged batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skvq_ext.ragged import Ragged

if TYPE_CHECKING:
    from skvq_ext.hf.cache import SkvqHFLayer


class CacheLength(int):
    """The kv_length a packed layer reports for the mask, with a reference to that layer.

    transformers hands this number, and not the cache, to the function that makes the mask.
    """

    layer: SkvqHFLayer

    def __new__(cls, length: int, layer: SkvqHFLayer) -> CacheLength:
        """An int that knows where it came from."""
        number = super().__new__(cls, length)
        number.layer = layer
        return number


def rows_of(x: Tensor) -> Tensor:
    """[batch, heads, columns, head_dim] to [batch * columns, heads, head_dim]."""
    # One view instead of two where it does: every layer of every step comes by here three times.
    return x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


@dataclass
class Padding:
    """Real tokens of a padded chunk: index int64 [num_tokens] into its batch * columns places."""

    index: Tensor
    tokens: Ragged
    columns: int

    def pack(self, x: Tensor) -> Tensor:
        """[batch, heads, columns, head_dim] to real tokens [num_tokens, heads, head_dim]."""
        return rows_of(x).index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows back to [batch, columns, heads, head_dim]; zero at padding."""
        batch_size, shape = self.tokens.batch_size, rows.shape[1:]
        places = rows.new_zeros(batch_size * self.columns, *shape)
        return places.index_copy_(0, self.index, rows).view(batch_size, self.columns, *shape)


@dataclass
class ForwardState:
    """Shared by the layers of one cache.

    padding: of the forward that runs now, None where every column is real. padded_until: no column
    from here on is padding, so that many columns can be cropped without asking which were.
    """

    padding: Padding | None = None
    padded_until: int = 0

    def begin(
        self, mask: Tensor | None, seen: int, columns: int, lengths: list[int]
    ) -> Tensor | None:
        """Takes note of the padding of a forward; called once per kind of mask.

        Args: mask bool [batch, seen + columns], True at real tokens, None = no padding; seen,
        columns the cache holds; columns, new ones; lengths, tokens each sequence holds.
        Returns: what the attention function gets as its mask: bool [batch, columns], or None.
        Raises: ValueError where the mask hides tokens that are in the cache.
        """
        self.padding = None
        if mask is None:
            return None
        if mask.shape[1] != seen + columns:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns; the cache holds {seen} and {columns} "
                f"are new. Give all {seen + columns}."
            )
        old, new = mask[:, :seen], mask[:, seen:]
        held, counts = torch.stack([old.sum(1), new.sum(1)]).tolist()
        if seen and held != lengths:
            raise ValueError(
                f"attention_mask shows {held} of the cached tokens, but {lengths} are cached. "
                "Tokens cannot be hidden once they are in the cache: keep the padding of earlier "
                "calls in the mask, and mask nothing else."
            )
        if all(count == columns for count in counts):
            return None
        index = new.flatten().nonzero()[:, 0]
        self.padding = Padding(index, Ragged.of_counts(counts, mask.device), columns)
        holes = (~new).any(0).nonzero()[:, 0]
        self.padded_until = seen + int(holes[-1]) + 1
        return new
