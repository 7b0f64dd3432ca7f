"""What quantized keys or values of one head do to the output of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """How a layer turns q · k into weights.

    scale: of q . k. softcap: c of c * tanh(logit / c), 0 = none. sliding_window: tokens seen, 0 =
    all. sink_logits: f32 [num_q_heads], learned sinks, None = none.
    """

    scale: float
    softcap: float = 0.0
    sliding_window: int = 0
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class Error:
    """Squared error of a head's outputs. fit, held: mean square over the queries choices are made
    on, and over those that only check them; nats: what both cost the model per token."""

    fit: float
    held: float
    nats: float


class HeadErrors:
    """One KV head and its query heads on calibration data: attention with one side replaced.

    As in decoding a query reads sinks and window exactly and everything between them from what
    replaces it.
    """

    def __init__(
        self,
        rows: tuple[Tensor, Tensor, Tensor],
        positions: Tensor,
        how: Softmax,
        fisher: Tensor,
        *,
        window: int,
        sinks: int,
    ) -> None:
        """Args: rows, sampled queries f32 [B, group, n, D] and all keys and values [B, T, D];
        positions int64 [n] of the queries; how, with sink_logits of these heads; fisher f64
        [group, D, D] (see `sensitivity`); window and sinks, tokens read exactly."""
        self.q, self.k, self.v = rows
        self._how, self._fisher = how, fisher.float()
        token = torch.arange(self.k.shape[1])
        back = positions[:, None] - token
        self._hidden = back < 0
        if how.sliding_window:
            self._hidden = self._hidden | (back >= how.sliding_window)
        self._read = ~self._hidden & (back >= window) & (token >= sinks)  # what is quantized
        self._held = torch.arange(len(positions)) % 4 == 3
        self._logits = self._logits_of(self.k)
        self._weights = self._weights_of(self._logits)

    def of_keys(self, k: Tensor) -> Error:
        """Args: k f32 [B, T, D], what is read instead of the keys."""
        logits = torch.where(self._read, self._logits_of(k), self._logits)
        return self._error((self._weights_of(logits) - self._weights).flatten(1, 2) @ self.v)

    def of_values(self, v: Tensor) -> Error:
        """Args: v f32 [B, T, D], what is read instead of the values."""
        return self._error((self._weights * self._read).flatten(1, 2) @ (v - self.v))

    def _logits_of(self, k: Tensor) -> Tensor:
        batch, group, n, dim = self.q.shape
        logits = (self.q.reshape(batch, group * n, dim) @ k.mT).view(batch, group, n, -1)
        logits = logits * self._how.scale
        cap = self._how.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _weights_of(self, logits: Tensor) -> Tensor:
        logits = logits.masked_fill(self._hidden, -torch.inf)
        sinks = self._how.sink_logits
        if sinks is None:
            return logits.softmax(-1)
        extra = sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]

    def _error(self, off: Tensor) -> Error:
        """off f32 [B, group * n, D], what the output is off by."""
        off = off.view(self.q.shape)
        squares = off.square().mean((0, 1, 3))
        nats = ((off @ self._fisher) * off).sum(-1).mean((0, 2)).sum() / 2
        held = self._held if self._held.any() else ~self._held
        return Error(float(squares[~self._held].mean()), float(squares[held].mean()), float(nats))
