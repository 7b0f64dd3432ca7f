"""Texts read through a packed cache: contexts first, then what is scored against them.

The last token of a context is never part of the prefill. It is fed as decoding feeds a token, so
that already the first token that is scored or generated was predicted from packed bytes; the single
letters of a multiple choice would measure full precision otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PREFILLS = ("exact", "packed")


def padded(rows: Sequence[Sequence[int]], side: str, device: Any) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one batch.

    Args: rows, token ids, of any lengths; side, "left" or "right", where padding goes.
    Returns: ids int64 [rows, columns]; mask int64 [rows, columns], 1 = token, 0 = padding.
    """
    columns = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), columns, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(columns - len(row), columns) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


class Reader:
    """One batch of sequences on their way through a packed cache."""

    def __init__(self, model: Any, cache: Any, chunk: int, prefill: str) -> None:
        """Args: model, a transformers causal language model; cache, its `SkvqHFCache`, which is
        emptied; chunk, most tokens of a forward that read what single steps would read; prefill,
        one of PREFILLS: whether contexts attend in full precision or read packed bytes too."""
        cache.reset()
        self.model, self.cache, self.chunk, self.prefill = model, cache, chunk, prefill
        self._mask: Tensor | None = None

    def contexts(self, ids: Tensor, mask: Tensor) -> None:
        """Reads contexts without their last tokens, which `score` or generate feeds.

        Args: ids, mask int64 [batch, columns], left-padded; columns may be 0.
        """
        size = max(1, ids.shape[1]) if self.prefill == "exact" else self.chunk
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            self._forward(ids[:, part], mask[:, part], keep=1)

    def select(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence rows[i] was; rows may repeat."""
        if self._mask is not None:
            self.cache.batch_select_indices(rows)
            self._mask = self._mask[list(rows)]

    def score(self, ids: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log probability of what follows each token, as if the tokens came one by one.

        Args: ids, mask int64 [batch, columns], right-padded; targets, int64 [batch, columns], the
        token that follows each, ignored where the mask is 0.
        Returns: log probabilities summed per sequence, f64 [batch], in nats; bool [batch], whether
        every target was the likeliest token.
        """
        total = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
        greedy = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        for start in range(0, ids.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            logits = self._forward(ids[:, part], mask[:, part], keep=0).float()
            real, wanted = mask[:, part].bool(), targets[:, part]
            found = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
            total += found.double().masked_fill(~real, 0.0).sum(-1)
            greedy &= ((logits.argmax(-1) == wanted) | ~real).all(-1)
        return total, greedy

    @torch.inference_mode()
    def _forward(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits of the last `keep` columns, 0 = all, [batch, columns, vocab]."""
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = out.logits
        return logits
