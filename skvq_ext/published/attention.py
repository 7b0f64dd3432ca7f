"""The attention implementation "skvq_published" of transformers: read the tiles, then attend.

The layer of the cache travels with the keys that `update` returns, as in `skvq_ext.hf.attention`,
because the queries of a chunk may stand on both sides of the moment when a tile is packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from skvq_ext.hf.attention import attention as plain_attention
from skvq_ext.hf.attention import mask as plain_mask

if TYPE_CHECKING:
    from skvq_ext.published.cache import PublishedLayer

NAME = "skvq_published"
_LAYER = "skvq_published_layer"  # attribute of the keys that a layer's `update` returns


class CacheLength(int):
    """The kv_length that a published cache reports: by it the mask knows whom it is made for."""


def attach(keys: Tensor, layer: PublishedLayer) -> Tensor:
    """The keys, as another tensor object that carries the layer they were given to."""
    keys = keys.detach()
    setattr(keys, _LAYER, layer)
    return keys


def mask(*, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask "sdpa" gets. Raises: ValueError for padding in front of a published cache."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded and isinstance(kv_length, CacheLength):
        raise ValueError(
            "the attention mask hides tokens: the published cache holds one sequence without "
            "padding. Give the tokens without it."
        )
    return plain_mask(kv_length=int(kv_length), attention_mask=attention_mask, **kwargs)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the protocol of transformers.AttentionInterface; without a published cache it
    does what "skvq" does without one."""
    layer: PublishedLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        return plain_attention(module, query, key, value, attention_mask, **kwargs)

    def attend(rows: slice, k: Tensor, v: Tensor) -> Tensor:
        seen = None if attention_mask is None else attention_mask[:, :, rows]
        return plain_attention(module, query[:, :, rows], k, v, seen, **kwargs)[0]

    return layer.attend(key, value, attend), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
