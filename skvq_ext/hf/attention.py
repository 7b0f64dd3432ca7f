"""The attention implementation "skvq" of transformers, and the mask that goes with it.

The attention function is not given the cache, so the layer travels with the keys that `update`
returns. The mask function is not given the cache either, but it is given the length the cache
reported. Without a packed cache both do what "sdpa" does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skvq_ext.hf import exact
from skvq_ext.hf.forward import CacheLength, rows_of

if TYPE_CHECKING:
    from skvq_ext.hf.cache import SkvqHFLayer

NAME = "skvq"
_LAYER = "skvq_layer"  # attribute of the keys that a packed layer's `update` returns
_Model = TypeVar("_Model", bound=PreTrainedModel)


def enable(model: _Model) -> _Model:
    """Selects the attention implementation "skvq" in a transformers model and returns the model.

    Raises: ValueError where the model's attention cannot be replaced.
    """
    select(model, NAME)
    return model


def select(model: Any, name: str) -> Any:
    """Selects a registered attention implementation in a model; returns its text configuration.

    Raises: ValueError where the model's attention cannot be replaced.
    """
    model.set_attn_implementation(name)
    config = model.config.get_text_config(decoder=True)
    found = config._attn_implementation
    if found != name:
        raise ValueError(
            f"the attention of {type(model).__name__} stays {found!r}: this model does not take "
            "its attention from transformers' AttentionInterface, so no packed cache can serve it."
        )
    return config


def attach(keys: Tensor, layer: SkvqHFLayer) -> Tensor:
    """The keys, as another tensor object that carries the layer they were given to."""
    keys = keys.detach()  # no gradients get here, and no other view is made as fast
    setattr(keys, _LAYER, layer)
    return keys


def mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `attention`, in the protocol of transformers.masking_utils.

    Returns: with a packed cache the real tokens among the new ones, bool [batch, columns], or None
    if all are; else what "sdpa" gets.
    """
    if not isinstance(kv_length, CacheLength):
        return sdpa_mask(
            kv_length=kv_length,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    if not allow_is_causal_skip:
        raise ValueError(
            "this forward needs a mask that is not plainly causal (bidirectional, blockwise or a "
            "custom overlay); the packed cache serves causal and sliding-window attention. Run it "
            "without SkvqHFCache."
        )
    layer = kv_length.layer
    return layer.state.begin(attention_mask, layer.seen, kv_length - layer.seen, layer.lengths)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the protocol of transformers.AttentionInterface.

    Args: query [batch, num_q_heads, columns, head_dim]; key, value [batch, num_kv_heads, columns,
    head_dim], the new tokens only when a packed cache is used; s_aux [num_q_heads], learned sinks.
    Returns: [batch, columns, num_q_heads, head_dim] and None.
    """
    layer: SkvqHFLayer | None = getattr(key, _LAYER, None)
    how = exact.Softmax(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
        None if s_aux is None else s_aux.float(),
        0 if layer is None else layer.sliding_window,
    )
    if layer is not None:
        _check(layer, dropout, sliding_window, kwargs)
        return _packed(layer, query, key, value, attention_mask, how), None
    if how.softcap or how.learned_sinks is not None:
        return exact.masked(query, key, value, attention_mask, how, dropout), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return out, None


def _packed(
    layer: SkvqHFLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    how: exact.Softmax,
) -> Tensor:
    """Attention through a packed layer, with padding dropped on the way in."""
    batch_size, num_q_heads, columns, head_dim = query.shape
    if attention_mask is None:
        out = layer.attend(rows_of(query), rows_of(key), rows_of(value), None, columns, how)
        return out.view(batch_size, columns, num_q_heads, head_dim)
    padding = layer.state.padding
    if padding is None or attention_mask.shape != (batch_size, columns):
        raise ValueError(
            f"the attention got a mask of shape {list(attention_mask.shape)}; with a packed cache "
            "give the model a 2-D attention_mask (1 = token, 0 = padding) or none."
        )
    q, k, v = (padding.pack(x) for x in (query, key, value))
    return padding.unpack(layer.attend(q, k, v, padding.tokens, columns, how))


def _check(
    layer: SkvqHFLayer, dropout: float, sliding_window: int | None, kwargs: dict[str, Any]
) -> None:
    """Raises ValueError for what a packed layer would otherwise silently leave out."""
    for asked, what in (
        (dropout > 0, "attention dropout (the model is in training mode)"),
        (kwargs.get("is_causal") is False, "attention that is not causal"),
        (kwargs.get("position_bias") is not None, "a position bias"),
        (kwargs.get("output_attentions"), "output_attentions (the weights are never formed)"),
    ):
        if asked:
            raise ValueError(
                f"layer {layer.index} was asked for {what}, which the packed cache does not "
                "support. Turn it off, or run the model without SkvqHFCache."
            )
    if (sliding_window or layer.sliding_window) != layer.sliding_window:
        raise ValueError(
            f"layer {layer.index} attends with sliding_window={sliding_window}, but the model's "
            f"configuration says {layer.sliding_window or 'no window'} for it. Build the cache "
            "from the configuration of this very model."
        )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
