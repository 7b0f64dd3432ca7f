"""A transformers cache of dense rows in which what left the window is what a method makes of it.

Nothing is packed: a tile of tokens is replaced, once, by what would be read back. Which tokens, and
when, is the rule of the packed cache, so that methods differ in nothing else. Attention goes through
an implementation of its own, because the queries of a chunk can stand on both sides of the moment
when a tile leaves the window, and because some methods look at attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from skvq_ext.baselines.coding import BaselineError, Quantizer, Seen
from skvq_ext.format import TILE_TOKENS
from skvq_ext.geometry import Geometry
from skvq_ext.hf.attention import attention as plain_attention
from skvq_ext.hf.attention import select

NAME = "skvq_simulated"
CHUNK = 64  # most tokens of a forward that read what single steps would read
_LAYER = "skvq_simulated_layer"  # attribute of the keys that `update` returns


@dataclass(frozen=True)
class Rule:
    """Which tokens are exact: the first `sinks`, and the newest, `window` or more; the others are
    replaced `tile` at a time."""

    window: int
    sinks: int
    tile: int = TILE_TOKENS

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("sinks", 0), ("tile", TILE_TOKENS)):
            if getattr(self, name) < least:
                raise BaselineError(f"{name} must be {least} or more, got {getattr(self, name)}.")

    def replaced(self, kv_len: int) -> int:
        """Tokens behind the sinks that are not exact once the cache holds kv_len tokens."""
        return self.tile * (max(0, kv_len - self.sinks - self.window) // self.tile)


class _Length(int):
    """The kv_length that a simulated layer reports: by it the mask knows whom it is made for."""


@dataclass
class _Shared:
    """What the layers of one cache have in common."""

    config: Any
    rule: Rule
    quantizer: Quantizer


class SimulatedLayer(DynamicLayer):
    """One attention layer of a `SimulatedCache`; sliding windows are left to the model's mask."""

    is_croppable = False

    def __init__(self, index: int, shared: _Shared) -> None:
        """Args: index of the layer in the model; what all layers share."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.shared = index, shared
        self.replaced = 0  # tokens behind the sinks
        self.stored_bits, self.stored_values = 0.0, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends rows [1, num_kv_heads, columns, head_dim] and hands the whole on to `attention`.

        Raises: BaselineError where they could not be simulated faithfully.
        """
        found = self.shared.config._attn_implementation
        if found != NAME:
            raise BaselineError(
                f"the model attends with {found!r}, which does not know a simulated cache. Make the "
                "cache after all others, right before the model is run with it."
            )
        if key_states.shape[0] != 1:
            raise BaselineError(
                f"a batch of {key_states.shape[0]}: a simulated cache holds one sequence. Run them "
                "one by one, without beam search."
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise BaselineError("no gradients flow through a cache; use torch.inference_mode().")
        keys, values = super().update(key_states, value_states)
        keys = keys.detach()  # another object, of the same memory, to hang the layer on
        setattr(keys, _LAYER, self)
        return keys, values

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns after query_length more, 0); early 5.x releases give positions of new ones."""
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return _Length(self.get_seq_length() + new), 0

    def attend(self, module: Any, query: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """Attention of the newest rows, [1, num_q_heads, columns, head_dim], over all.

        The first forward, and one of more than CHUNK columns, sees its own tokens as they are;
        other queries see what they would see in single steps.
        Returns: [1, columns, num_q_heads, head_dim].
        """
        rule, columns, total = self.shared.rule, query.shape[2], self.get_seq_length()
        first, outs = total - columns, []
        if first == 0 or columns > CHUNK:
            stretches = [(0, columns, self.replaced)]
        else:
            stretches = _stretches([rule.replaced(first + row + 1) for row in range(columns)])
        for start, stop, replaced in stretches:
            self._replace(replaced)
            rows, seen = query[:, :, start:stop], mask[:, :, start:stop]
            outs.append(plain_attention(module, rows, *self._held(), seen, **kwargs)[0])
            self.shared.quantizer.watch(self.index, self._seen(rows, seen, first + start, kwargs))
        self._replace(rule.replaced(total))
        return torch.cat(outs, dim=1)

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.replaced, self.stored_bits, self.stored_values = 0, 0.0, 0

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: rows that were replaced are gone."""
        raise BaselineError("a simulated cache cannot be cropped: make a new one.")

    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        """Refused: one sequence only."""
        raise BaselineError("a simulated cache holds one sequence: no beam search, no batches.")

    def batch_select_indices(self, indices: Any) -> NoReturn:
        """Refused: one sequence only."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: one sequence only."""
        self.reorder_cache(repeats)

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "update comes first"
        return self.keys, self.values

    def _replace(self, until: int) -> None:
        rule, held = self.shared.rule, self._held()
        for begin in range(self.replaced, until, rule.tile):
            place = slice(rule.sinks + begin, rule.sinks + begin + rule.tile)
            k, v = (x[0, :, place].float() for x in held)
            found = self.shared.quantizer.code(self.index, k, v, place.start)
            for rows, coded in zip(held, found, strict=True):
                rows[0, :, place] = coded.values.to(rows.dtype)
                self.stored_bits += coded.bits
                self.stored_values += coded.values.numel()
        self.replaced = max(self.replaced, until)

    def _seen(self, query: Tensor, mask: Tensor, first: int, kwargs: dict[str, Any]) -> Seen:
        scale = kwargs.get("scaling")
        return Seen(
            query=query[0],
            keys=self._held()[0][0],
            visible=mask[0, 0],
            first=first,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=kwargs.get("softcap") or 0.0,
            learned_sinks=kwargs.get("s_aux"),
        )


def _stretches(replaced: list[int]) -> list[tuple[int, int, int]]:
    """(first row, one past the last, tokens replaced) of rows that see the same."""
    edges = [row for row in range(1, len(replaced)) if replaced[row] != replaced[row - 1]]
    starts = [0, *edges]
    return [
        (start, stop, replaced[start])
        for start, stop in zip(starts, [*edges, len(replaced)], strict=True)
    ]


class SimulatedCache(Cache):
    """A cache for `model(...)` and greedy or sampled `model.generate(...)`, one sequence at a time.

    Prefill attends in full precision; later forwards of at most CHUNK tokens read what single steps
    would read.
    """

    def __init__(self, model: Any, rule: Rule, make: Callable[[], Quantizer]) -> None:
        """Args: a transformers decoder, whose attention implementation becomes "skvq_simulated";
        rule, which tokens are replaced; make, gives a quantizer without memories.
        Raises: ValueError, GeometryError for attention that has no K and V per head."""
        geometry = Geometry.from_config(model.config)
        text = select(model, NAME)
        self._make, self._shared = make, _Shared(text, rule, make())
        self._rows = [SimulatedLayer(i, self._shared) for i in range(geometry.num_layers)]
        super().__init__(layers=list(self._rows))

    @property
    def bits_per_value(self) -> float:
        """Bits that would be stored per value of K and V behind the window; nan as long as no tile
        left it."""
        values = sum(layer.stored_values for layer in self._rows)
        return sum(layer.stored_bits for layer in self._rows) / values if values else float("nan")

    def reset(self) -> None:
        """Empties the cache; the method forgets what it saw."""
        super().reset()  # type: ignore[no-untyped-call]
        self._shared.quantizer = self._make()


def mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `attention`: that of "sdpa", and always there for a simulated cache.

    Raises: BaselineError for padding in front of a simulated cache.
    """
    if isinstance(kv_length, _Length):
        if attention_mask is not None and not bool(attention_mask.all()):
            raise BaselineError(
                "the attention mask hides tokens: a simulated cache knows no padding. Give one "
                "sequence without padding."
            )
        allow_is_causal_skip = False
    found: Tensor | None = sdpa_mask(
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return found


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in the protocol of transformers.AttentionInterface; without a simulated cache it
    does what "skvq" does."""
    layer: SimulatedLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        return plain_attention(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:
        raise BaselineError(
            f"layer {layer.index} attends without a mask, so who sees what is not known. Run the "
            "model through its usual forward."
        )
    return layer.attend(module, query, attention_mask, **kwargs), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
