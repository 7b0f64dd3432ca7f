"""Clip ratios as the paper chooses them: least squared error of the attention module's output.

The paper names the objective (section 3, "clipped dynamic quantization") but neither grid nor order
nor whether K and V are searched apart. Here: K with exact V, V with exact K; the best single ratio
of a layer first, then group after group, one step up or down as long as the error falls, until a
sweep changes nothing. All groups at 1 is among what is tried first, so nothing is worse than that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skvq_ext.published.packing import LEVELS
from skvq_ext.published.quantizer import Grouping, fake_quantize
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.published.statistics import LayerStatistics, Sample
from skvq_ext.rope import Rope

# 1.00, 0.96 .. 0.40; ratios below, which keys sometimes choose, did not help on other texts.
RATIOS = tuple(1 - step / 25 for step in range(16))
_STRIDE = 2  # of the first look, at one ratio for all groups
_SWEEPS = 3

# Error of the output when K or V of the samples read as these rows do, f32 [num_tokens, channels].
_Error = Callable[[list[Tensor]], float]


class _Attention:
    """Attention of one sample in one layer, exact and with rows of the packed tokens replaced."""

    def __init__(
        self,
        layer: LayerStatistics,
        sample: Sample,
        scheme: PublishedScheme,
        turn: Callable[[Tensor], Tensor],
        sliding_window: int,
    ) -> None:
        """Args: turn, keys [heads, num_tokens, head_dim] as quantized to keys after RoPE."""
        self._layer, self._turn = layer, turn
        self._queries = sample.queries * layer.scale
        num_q_heads, _, self._dim = sample.queries.shape
        self._repeat = num_q_heads * self._dim // sample.k.shape[1]
        age = sample.at[:, None] - torch.arange(len(sample.k))
        hidden = (age < 0) | (age >= (sliding_window or len(sample.k)))
        self._hidden = hidden.to(sample.k.device)
        # Token by token, not tile by tile: what the window of the paper leaves.
        exact = (age < scheme.window) | (torch.arange(len(sample.k)) < scheme.sinks)
        self._exact = exact.to(sample.k.device)
        self._logits = (
            self._queries @ self._turn(self._heads(sample.k)).repeat_interleave(self._repeat, 0).mT
        )
        self._v = self._heads(sample.v).repeat_interleave(self._repeat, 0)
        self._weights = self._softmax(self._logits)
        self._out = self._weights @ self._v
        self._old = self._weights.masked_fill(self._exact, 0.0)

    def key_error(self, k: Tensor) -> float:
        """Squared error of the module's output where packed keys read as k [tokens, channels]."""
        keys = self._turn(self._heads(k)).repeat_interleave(self._repeat, 0)
        logits = torch.where(self._exact, self._logits, self._queries @ keys.mT)
        return self._energy(self._softmax(logits) @ self._v - self._out)

    def value_error(self, v: Tensor) -> float:
        """The same for values v [tokens, channels]."""
        return self._energy(
            self._old @ (self._heads(v).repeat_interleave(self._repeat, 0) - self._v)
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._dim).transpose(0, 1)

    def _softmax(self, logits: Tensor) -> Tensor:
        layer = self._layer
        if layer.softcap:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
        logits = logits.masked_fill(self._hidden, -torch.inf)
        if layer.learned_sinks is not None:
            extra = layer.learned_sinks[:, None, None].expand(*logits.shape[:2], 1)
            logits = torch.cat([logits, extra], dim=-1)
        return torch.softmax(logits, dim=-1)[..., : self._hidden.shape[1]]

    def _energy(self, out: Tensor) -> float:
        assert self._layer.output is not None
        module = out.transpose(0, 1).flatten(1) @ self._layer.output.mT
        return float(module.square().sum(dtype=torch.float64))


def search_layer(
    layer: LayerStatistics,
    groupings: tuple[Grouping, Grouping],
    scheme: PublishedScheme,
    rope: Rope | None,
    index: int,
    sliding_window: int,
) -> tuple[Grouping, Grouping]:
    """The groupings of K and V of one layer, with the clip ratios found on its samples.

    Args: rope, None where keys are quantized after RoPE; index of the layer; sliding_window, tokens
    the layer sees, 0 = all.
    """

    def turn(keys: Tensor) -> Tensor:
        positions = torch.arange(keys.shape[1], device=keys.device)
        return keys if rope is None else rope.rotate(keys, positions, index)

    parts = [_Attention(layer, s, scheme, turn, sliding_window) for s in layer.samples]

    def key_error(rows: list[Tensor]) -> float:
        return sum(part.key_error(x) for part, x in zip(parts, rows, strict=True))

    def value_error(rows: list[Tensor]) -> float:
        return sum(part.value_error(x) for part, x in zip(parts, rows, strict=True))

    k, v = groupings
    return (
        k.with_clip(_search(k, [s.k for s in layer.samples], scheme.k, scheme, key_error)),
        v.with_clip(_search(v, [s.v for s in layer.samples], scheme.v, scheme, value_error)),
    )


def _search(
    grouping: Grouping, rows: list[Tensor], bits: str, scheme: PublishedScheme, error: _Error
) -> Tensor:
    """Ratios of least error, f32 [groups]; all 1 where nothing is better."""
    groups = list(grouping.permutation.int().split(grouping.edges.long().diff().tolist()))

    def read(group: int, ratio: float) -> list[Tensor]:
        how = LEVELS[bits], scheme.meta, scheme.round_first
        return [fake_quantize(x[:, groups[group]], ratio, *how) for x in rows]

    def put(current: list[Tensor], group: int, ratio: float) -> list[Tensor]:
        changed = [x.clone() for x in current]
        for x, part in zip(changed, read(group, ratio), strict=True):
            x[:, groups[group]] = part
        return changed

    def uniform(ratio: float) -> list[Tensor]:
        current = rows
        for group in range(len(groups)):
            current = put(current, group, ratio)
        return current

    errors = {place: error(uniform(RATIOS[place])) for place in range(0, len(RATIOS), _STRIDE)}
    start = min(errors, key=lambda place: errors[place])  # of equals the first, the mildest
    places, current, least = [start] * len(groups), uniform(RATIOS[start]), errors[start]
    for _ in range(_SWEEPS):
        before = list(places)
        for group in range(len(groups)):
            for direction in (1, -1):
                while 0 <= (place := places[group] + direction) < len(RATIOS):
                    candidate = put(current, group, RATIOS[place])
                    found = error(candidate)
                    if found >= least:
                        break
                    least, places[group], current = found, place, candidate
        if places == before:
            break
    return torch.tensor([RATIOS[place] for place in places], dtype=torch.float32)
