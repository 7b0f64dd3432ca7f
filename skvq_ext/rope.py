"""Rotary position embedding taken off keys and put on again, by the model's own rotary module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skvq_ext.observe import frozen

_PROBE_POSITION = 5  # the fastest channels turn by one radian per token: five are not to be missed
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 0.03  # of the largest key; keys of bfloat16 models carry errors of 2 ** -8


class RopeError(ValueError):
    """A model whose keys are not rotated, or not in a way that can be undone."""


@dataclass(frozen=True)
class Rope:
    """How one model rotates its keys: y = R(position) x, linear, the same for every head.

    The cosines and sines and the pairing of channels are the model's own, so that every family of
    transformers that has a `rotary_emb` and an `apply_rotary_pos_emb` is followed: rotation of a
    part of the head, interleaved pairs, one base per kind of layer, scaled frequencies, layers that
    do not rotate at all.
    """

    module: Any  # torch.nn.Module: (x, position_ids[, layer_type]) -> cos, sin
    apply: Callable[..., tuple[Tensor, Tensor]]  # the model's apply_rotary_pos_emb
    layer_types: tuple[str | None, ...]  # what `module` wants to be told per layer, None = nothing
    rotated: tuple[bool, ...]  # per layer
    switches_at: int  # longrope: longer sequences have other frequencies; 0 = never

    @classmethod
    def of(cls, model: Any) -> Rope:
        """Reads a transformers model, and checks on a few tokens that its keys are rotated so.

        Raises: RopeError where there is no rotary embedding, or it is of a kind that cannot be
        undone.
        """
        decoder = _decoder(model)
        config = model.config.get_text_config(decoder=True)
        module, name = getattr(decoder, "rotary_emb", None), type(model).__name__
        if module is None:
            raise RopeError(
                f"{name} has no rotary_emb in {type(decoder).__name__}: it does not rotate its "
                "keys, or every layer does so by itself. Use a scheme without pre_rope."
            )
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise RopeError(
                f"the module of {type(module).__name__} has no apply_rotary_pos_emb, so how {name} "
                "pairs its channels is not known. Use a scheme without pre_rope."
            )
        kinds = _kinds(module)
        if any("dynamic" in kind for kind in kinds):
            raise RopeError(
                f"{name} scales its RoPE dynamically: what a key was rotated by depends on the "
                "length when it was made. Choose another rope_type or a scheme without pre_rope."
            )
        count = config.num_hidden_layers
        by_type = "layer_type" in inspect.signature(module.forward).parameters
        types = tuple(config.layer_types[:count]) if by_type else (None,) * count
        switches_at = _switch(config) if "longrope" in kinds else 0
        rope = cls(module, apply, types, (True,) * count, switches_at)
        return cls(module, apply, types, rope._probe(model), switches_at)

    def rotate(self, x: Tensor, positions: Tensor, layer: int, length: int = 0) -> Tensor:
        """Puts RoPE on: what the model's attention makes of a key or query at these positions.

        Args: x [heads, tokens, head_dim] or [batch, heads, tokens, head_dim], any float dtype;
        positions, int64 [tokens] or [batch, tokens]; layer, its index; length, tokens of the whole
        sequence, for models whose frequencies depend on it: 0 = up to the largest position.
        Returns: float32 like x; computed in float32.
        """
        return self._turn(x, positions, layer, length, back=False)

    def unrotate(self, x: Tensor, positions: Tensor, layer: int, length: int = 0) -> Tensor:
        """Takes RoPE off again, its scaling of lengths included: the inverse of `rotate`.

        Args, Returns: as `rotate`.
        """
        return self._turn(x, positions, layer, length, back=True)

    def _turn(self, x: Tensor, positions: Tensor, layer: int, length: int, back: bool) -> Tensor:
        batched = x if x.dim() == 4 else x[None]
        wide = batched.float()
        if self.rotated[layer]:
            cos, sin, factor = self._tables(wide, positions, layer, length)
            if back:  # a rotation times `factor`: its inverse turns the other way
                cos, sin = cos / factor**2, -sin / factor**2
            width = self._width(layer)  # attention rotates the first channels of a head
            turned, rest = wide.split([width, wide.shape[-1] - width], dim=-1)
            turned, _ = self.apply(turned, turned, cos, sin)
            wide = torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
        return wide if x.dim() == 4 else wide[0]

    def _width(self, layer: int) -> int:
        """Channels of a head that rotate: two per frequency."""
        kind = self.layer_types[layer]
        name = "inv_freq" if kind is None else f"{kind}_inv_freq"
        return 2 * len(getattr(self.module, name))

    def _tables(
        self, x: Tensor, positions: Tensor, layer: int, length: int
    ) -> tuple[Tensor, Tensor, float]:
        """cos and sin, f32 [batch or 1, tokens, channels], and the length of (cos, sin)."""
        if positions.is_floating_point() or positions.shape[-1:] != x.shape[2:3]:
            raise RopeError(
                f"positions are {positions.dtype} {list(positions.shape)} for {x.shape[2]} tokens; "
                "give integers [tokens] or [batch, tokens]."
            )
        rows = positions.to(x.device)
        rows = rows if rows.dim() == 2 else rows[None]
        # Position 0 does not turn: there cos is the scaling of lengths. The last position of the
        # sequence goes along because frequencies of longrope depend on the largest one.
        last = max(length - 1, 0)
        extra = rows.new_tensor([[0, last]]).expand(len(rows), 2)
        kind = self.layer_types[layer]
        more = () if kind is None else (kind,)
        cos, sin = self.module(x, torch.cat([rows, extra], dim=1), *more)
        return cos[:, :-2].float(), sin[:, :-2].float(), float(cos[0, -2, 0])

    @torch.no_grad()
    def _probe(self, model: Any) -> tuple[bool, ...]:
        """Which layers rotate; raises RopeError where one does something else.

        A sequence of one token attends to itself only, so that what layers compute depends on its
        position nowhere but in the keys: those at two positions must be rotations of each other.
        """
        size = model.get_input_embeddings().weight.shape[0]
        # Away from the first ids, which are often padding with an embedding of zeros.
        ids = torch.linspace(size // 8, size - 1, _PROBE_TOKENS, device=model.device).long()[
            :, None
        ]
        first, second = (
            _keys(model, ids, torch.full_like(ids, position)) for position in (0, _PROBE_POSITION)
        )
        zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
        rotated = []
        for layer, (still, moved) in enumerate(zip(first, second, strict=True)):
            plain = self.unrotate(still, zero, layer)
            expected = self.rotate(plain, zero + _PROBE_POSITION, layer)
            allowed = _PROBE_TOLERANCE * float(moved.abs().max())
            as_rotated = float((expected - moved).abs().max())
            as_is = float((still.float() - moved).abs().max())
            if min(as_rotated, as_is) > allowed:
                raise RopeError(
                    f"layer {layer} of {type(model).__name__} does not rotate its keys as its "
                    f"rotary_emb says: they differ by {as_rotated:.3g} where {allowed:.3g} would "
                    "be rounding. Use a scheme without pre_rope."
                )
            rotated.append(as_rotated <= as_is)
        return tuple(rotated)


def _decoder(model: Any) -> Any:
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if found is None else found


def _kinds(module: Any) -> set[str]:
    """The rope_type of the module, or of each kind of layer."""
    kinds = getattr(module, "rope_type", "default")
    return set(kinds.values()) if isinstance(kinds, dict) else {kinds}


def _switch(config: Any) -> int:
    """Tokens up to which longrope keeps its short factors."""
    parameters = config.rope_parameters
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    found = [one.get("original_max_position_embeddings", 0) for one in nested or [parameters]]
    return int(max(found))


def _keys(model: Any, ids: Tensor, positions: Tensor) -> list[Tensor]:
    """Keys of every layer after one forward without history, [batch, heads, tokens, head_dim]."""
    with frozen(model):
        out = model.base_model(input_ids=ids, position_ids=positions, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    return [layer.keys for layer in cache.layers]
