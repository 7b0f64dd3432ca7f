"""Geometry of a decoder's attention: what a plan must fit and what a ledger counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


class GeometryError(ValueError):
    """A model whose attention this cache cannot hold."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model. Fields that default to None may be unknown and are then not compared.

    sliding_windows: tokens seen per layer, 0 = all. rope_parameters: canonical JSON of everything
    that says how keys are rotated.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int | None = None
    vocab_size: int | None = None
    rope_theta: float | None = None
    rope_parameters: str | None = None
    model_type: str | None = None
    sliding_windows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_q_heads % self.num_kv_heads:
            raise GeometryError(
                f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: every KV head must serve equally many query heads."
            )
        if self.sliding_windows is not None and len(self.sliding_windows) != self.num_layers:
            raise GeometryError(
                f"sliding_windows has {len(self.sliding_windows)} entries for {self.num_layers} "
                "layers; give one per layer, 0 where a layer sees everything."
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @classmethod
    def from_config(cls, config: Any) -> Geometry:
        """Reads a transformers configuration (text part of a multimodal one) or its dict.

        Raises: GeometryError for attention that has no K and V per head in every layer.
        """
        text = _text_config(config)
        _refuse_foreign_attention(text)
        num_q_heads = _need(text, "num_attention_heads")
        hidden_size = _need(text, "hidden_size")
        num_layers = _need(text, "num_hidden_layers")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        return cls(
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=text.get("num_key_value_heads") or num_q_heads,
            head_dim=text.get("head_dim") or hidden_size // num_q_heads,
            hidden_size=hidden_size,
            vocab_size=text.get("vocab_size"),
            rope_theta=_rope_theta(text, rope),
            rope_parameters=json.dumps(rope, sort_keys=True) if rope else None,
            model_type=text.get("model_type"),
            sliding_windows=_sliding_windows(text, num_layers),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """The inverse of `as_dict`. Raises: GeometryError on missing or unknown fields."""
        values = dict(values)
        if values.get("sliding_windows") is not None:
            values["sliding_windows"] = tuple(values["sliding_windows"])
        try:
            return cls(**values)
        except TypeError as error:
            raise GeometryError(f"these fields do not describe a model: {error}.") from None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def differences(self, other: Geometry) -> list[str]:
        """One line per field known on both sides that differs: 'name: here, there'."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {mine[name]!r} here, {theirs[name]!r} in the plan"
            for name in mine
            if None not in (mine[name], theirs[name]) and mine[name] != theirs[name]
        ]


def _text_config(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        values = dict(config)
        return dict(values.get("text_config") or values)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    values = config.to_dict()
    assert isinstance(values, dict)
    return values


def _need(text: Mapping[str, Any], name: str) -> int:
    value = text.get(name)
    if not isinstance(value, int):
        raise GeometryError(
            f"the configuration of {text.get('model_type', 'this model')!r} has no {name!r} "
            f"(found {value!r}); give a decoder-only text model or build Geometry(...) by hand."
        )
    return value


def _refuse_foreign_attention(text: Mapping[str, Any]) -> None:
    model = text.get("model_type", "this model")
    if text.get("kv_lora_rank"):
        raise GeometryError(f"{model!r} caches a latent (MLA), not K and V per head.")
    if text.get("num_kv_shared_layers"):
        raise GeometryError(f"{model!r} shares K and V between layers, which is not supported.")
    global_dim = text.get("global_head_dim")
    if global_dim and global_dim != text.get("head_dim"):
        raise GeometryError(
            f"{model!r} has two head sizes ({text.get('head_dim')} and {global_dim}); one cache "
            "has one head_dim."
        )


def _rope_theta(text: Mapping[str, Any], rope: Mapping[str, Any]) -> float | None:
    if "rope_theta" not in rope and "full_attention" in rope:
        rope = rope["full_attention"]
    theta = rope.get("rope_theta", text.get("rope_theta"))
    return None if theta is None else float(theta)


def _sliding_windows(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    window = text.get("sliding_window") or 0
    if text.get("use_sliding_window") is False:
        window = 0
    kinds: Iterable[str] | None = text.get("layer_types")
    if kinds is None:
        pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
        if window and pattern:
            return tuple(window if (i + 1) % pattern else 0 for i in range(num_layers))
        return (window,) * num_layers
    known = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    for layer, kind in enumerate(kinds):
        if kind not in known:
            raise GeometryError(
                f"layer {layer} of {text.get('model_type')!r} is {kind!r}; only full_attention and "
                "sliding_attention layers have a K and V cache of this kind."
            )
    return tuple(known[kind] for kind in kinds)
