"""A transformers cache whose tokens are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from skvq_ext import ops
from skvq_ext.cache import check_rows, resolve
from skvq_ext.door import Door
from skvq_ext.geometry import Geometry
from skvq_ext.hf import exact
from skvq_ext.hf.attention import NAME, attach, enable
from skvq_ext.hf.forward import CacheLength, ForwardState
from skvq_ext.hf.norms import key_scales
from skvq_ext.layer_cache import LayerCache
from skvq_ext.memory import memory
from skvq_ext.plan import LayerPlan, Plan, SplitPlan
from skvq_ext.ragged import Ragged
from skvq_ext.scheme import Scheme
from skvq_ext.split_cache import SplitLayerCache, make_layer_cache


@dataclass
class _Recipe:
    """What the layers of one cache have in common; a layer is made of it at its first update."""

    config: Any
    scheme: Scheme
    geometry: Geometry
    plan: Plan
    exact: bool
    doors: dict[tuple[int, torch.device], Door]

    def door(self, plan: LayerPlan | SplitPlan, device: torch.device) -> Door | None:
        """The door of one layer's plan on one device; layers of a default plan share it. None for
        a split layer, whose parts have doors of their own."""
        if isinstance(plan, SplitPlan):
            return None
        key = (next(i for i, p in enumerate(self.plan.layers) if p is plan), device)
        if key not in self.doors:
            self.doors[key] = Door(plan, self.geometry.num_q_heads, device)
        return self.doors[key]


class SkvqHFLayer(CacheLayerMixin):
    """One attention layer of a `SkvqHFCache`.

    `update` only hands the new keys on; `attend`, called by the attention implementation "skvq",
    appends them, before or after it has attended.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, index: int, recipe: _Recipe, state: ForwardState) -> None:
        """Args: index of the layer in the model; what all layers share."""
        super().__init__()  # type: ignore[no-untyped-call]
        assert recipe.geometry.sliding_windows is not None
        self.index, self.state = index, state
        self.sliding_window = recipe.geometry.sliding_windows[index]
        self.is_sliding = self.sliding_window > 0
        self.cache: LayerCache | SplitLayerCache | None = None
        self.seen = 0  # columns, padding included
        self._recipe = recipe
        self._handed_on = False  # keys that attend has not seen yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the packed layer for the batch, dtype and device of key_states."""
        recipe, device = self._recipe, key_states.device
        plan = recipe.plan.layers[self.index]
        self.cache = make_layer_cache(
            plan,
            recipe.scheme,
            num_q_heads=recipe.geometry.num_q_heads,
            batch_size=key_states.shape[0],
            dtype=key_states.dtype,
            device=device,
            sliding_window=self.sliding_window,
            exact=recipe.exact,
            door=recipe.door(plan, device),
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on to the attention implementation "skvq".

        Args: key_states, value_states [batch, num_kv_heads, columns, head_dim].
        Raises: ValueError or RuntimeError where they cannot be cached, or would be lost.
        """
        if self.index == 0:  # comes first in every forward, and all layers share one configuration
            self._check_implementation()
        self._check_use(key_states)
        self._check_shape(key_states, value_states)
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        self._handed_on = True
        return attach(key_states, self), value_states

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: Ragged | None,
        columns: int,
        how: exact.Softmax,
    ) -> Tensor:
        """Attention of the new tokens over themselves and the cache, which then holds them.

        Args: q [num_tokens, num_q_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim];
        tokens, None = equally many per sequence; columns of this forward, padding included.
        Returns: like q.
        """
        assert self.cache is not None
        cache = self.cache
        self._handed_on = False
        if self.seen and columns <= cache.scheme.rollback + 1:
            cache.append(k, v, tokens)
            out, _ = cache.attend(
                q,
                tokens,
                softmax_scale=how.scale,
                softcap=how.softcap,
                learned_sinks=how.learned_sinks,
            )
        else:
            tokens = Ragged.of(tokens, q.shape[0], cache.batch_size)
            q_parts, k_parts, v_parts = (torch.split(x, tokens.counts) for x in (q, k, v))
            sequences = list(zip(q_parts, k_parts, v_parts, strict=True))
            if self.seen:
                out = self._after_history(q, sequences, tokens, how)
            else:
                out = torch.cat([exact.prefill(*qkv, how) for qkv in sequences])
            cache.append(k, v, tokens)
        self.seen += columns
        return out

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns after query_length more, first column); a window changes nothing here.

        Early 5.x releases give the positions of the new columns instead of their number.
        """
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return CacheLength(self.seen + new, self), 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: grows as needed."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early 5.x releases

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding; empty before the first update."""
        return [] if self.cache is None else self.cache.lengths

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises: ValueError where so many of the newest columns cannot be removed exactly."""
        if self.cache is None or tokens_to_remove >= self.seen:
            return
        if self.seen - tokens_to_remove < self.state.padded_until:
            raise ValueError(
                f"cannot remove {tokens_to_remove} columns: only the newest "
                f"{self.seen - self.state.padded_until} hold no padding. Remove fewer, or reset()."
            )
        self.cache.check_crop([n - tokens_to_remove for n in self.lengths])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove columns (it is negative, as in `Cache.crop`)."""
        count = -tokens_to_remove
        self.check_crop(count)
        if self.cache is not None and count:
            self.cache.crop([max(0, n - count) for n in self.lengths])
            self.seen = max(0, self.seen - count)

    def reset(self) -> None:
        """Empties the layer; batch, dtype and device are taken from the next update."""
        self.cache, self.is_initialized, self.seen, self._handed_on = None, False, 0, False

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence beam_idx[i] was. Packed pages are shared, not copied."""
        if self.cache is not None:
            self.cache.take(check_rows(beam_idx, self.cache.batch_size))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these sequences, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, side by side."""
        if self.cache is not None:
            self.cache.take([b for b in range(self.cache.batch_size) for _ in range(repeats)])

    def offload(self) -> None:
        """Refused: a packed cache is meant to stay where it is read."""
        raise NotImplementedError("a packed cache cannot be offloaded; it stays on its device.")

    def _after_history(
        self,
        q: Tensor,
        sequences: list[tuple[Tensor, Tensor, Tensor]],
        tokens: Ragged,
        how: exact.Softmax,
    ) -> Tensor:
        """A long chunk: exact among its own tokens, packed for what came before, merged by lse.

        Beyond q, k, v and the output it takes at most four tensors like q, one of them in fp32, and
        what `exact.causal` takes: nothing that grows with the history or the square of the chunk.
        """
        assert self.cache is not None
        before = self.cache.attend(
            q, tokens, softmax_scale=how.scale, softcap=how.softcap, queries_in_cache=False
        )
        own = [exact.causal(*qkv, how) for qkv in sequences]
        out, lse = (torch.cat(parts) for parts in zip(*own, strict=True))
        return how.leave_room(*ops.merge_states(*before, out, lse))

    def _check_implementation(self) -> None:
        implementation = self._recipe.config._attn_implementation
        if implementation != NAME:
            raise RuntimeError(
                f"the model attends with {implementation!r}, which cannot read a packed cache. "
                "Call skvq_ext.hf.enable(model) first (SkvqHFCache(model) does it for you)."
            )

    def _check_use(self, keys: Tensor) -> None:
        if self._handed_on:
            raise RuntimeError(
                f"layer {self.index}: the keys of the last forward never reached the attention "
                "implementation 'skvq', so they are not in the cache. Either the model does not "
                "attend with the configuration this cache was made from, or the forward failed; "
                "build the cache as SkvqHFCache(model), or reset() it after a failure."
            )
        if torch.is_grad_enabled() and keys.requires_grad:
            raise RuntimeError(
                "gradients cannot flow through a packed cache; run the model under "
                "torch.no_grad() or torch.inference_mode()."
            )

    def _check_shape(self, keys: Tensor, values: Tensor) -> None:
        geometry, batch_size = self._recipe.geometry, keys.shape[0]
        expected = (batch_size, geometry.num_kv_heads, keys.shape[2], geometry.head_dim)
        for name, x in (("keys", keys), ("values", values)):
            if x.shape != expected:
                raise ValueError(
                    f"layer {self.index}: {name} of shape {list(x.shape)}, expected "
                    f"{list(expected)} [batch, num_kv_heads, columns, head_dim] from the "
                    "configuration. The packed cache holds K and V of equal head_dim per head."
                )
        if self.cache is not None and batch_size != self.cache.batch_size:
            raise ValueError(
                f"layer {self.index}: a batch of {batch_size} was given to a cache that holds "
                f"{self.cache.batch_size} sequences; reset() it, or make a new one."
            )


class SkvqHFCache(Cache):
    """A packed cache for `model(...)` and `model.generate(..., past_key_values=cache)`.

    Prefill attends in full precision; later tokens read the packed bytes. Up to rollback + 1 tokens
    per forward (see the scheme) give what single steps would give; longer chunks see each other in
    full precision, in memory that grows with their length and nothing else. Padding is dropped, so
    a padded batch holds what single runs hold.
    """

    def __init__(
        self,
        model_or_config: PreTrainedModel | Any,
        scheme: str | Scheme | None = None,
        plan: Plan | None = None,
        exact: bool = False,
    ) -> None:
        """Args: a model, whose attention implementation becomes "skvq", or its configuration;
        scheme, None = that of the plan, or the default one; plan from calibration, None = Hadamard
        and a fixed clip; exact, on the CPU read
        packed pages in float32, at about half the speed of integer products (see
        `ops.decode_attention`). Batch size, dtype and device are taken from the first forward.
        Raises: ValueError for attention that cannot be packed, or a plan that does not fit."""
        config: Any = model_or_config
        if isinstance(model_or_config, PreTrainedModel):
            config = enable(model_or_config).config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{config.model_type!r} is an encoder-decoder model; its cross-attention cannot be "
                "packed. Use a decoder-only model."
            )
        geometry = Geometry.from_config(config)
        scales = None
        if plan is None and isinstance(model_or_config, PreTrainedModel):
            scales = key_scales(model_or_config, geometry)
        self.scheme, self.plan = resolve(scheme, plan, geometry, scales)
        self.state = ForwardState()
        text = config.get_text_config(decoder=True)
        recipe = _Recipe(text, self.scheme, geometry, self.plan, exact, {})
        indices = range(geometry.num_layers)
        self._packed = [SkvqHFLayer(i, recipe, self.state) for i in indices]
        super().__init__(layers=list(self._packed))

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first forward."""
        return len(self.lengths) or -1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding; empty before the first forward."""
        return self._packed[0].lengths

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """(columns after query_length more, 0); asked once or twice at the start of a forward.

        Raises: RuntimeError where the last forward stopped half way.
        """
        held = [layer.seen for layer in self._packed]
        if min(held) != max(held):
            raise RuntimeError(
                f"the layers hold different numbers of columns ({min(held)} and {max(held)}): the "
                "last forward did not finish. reset() the cache and feed the tokens again."
            )
        return self._packed[layer_idx].get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove columns from every sequence.

        Args: a negative number or 0; a positive one keeps so many columns, as transformers did
        before it counted from the end.
        Raises: ValueError beyond what can be taken back exactly (see the scheme's rollback), and
        then nothing has changed.
        """
        seen = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        for layer in self._packed:
            layer.check_crop(count)
        for layer in self._packed:
            layer.crop(-count)
        if self.get_seq_length() == 0:
            self.state.padded_until = 0

    def reset(self) -> None:
        """Empties the cache and gives its memory back."""
        for layer in self._packed:
            layer.reset()
        self.state.padding, self.state.padded_until = None, 0

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence beam_idx[i] was; reads the indices once."""
        rows = check_rows(beam_idx, self.batch_size) if self.lengths else []
        for layer in self._packed:
            layer.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these sequences, in this order; reads the indices once."""
        self.reorder_cache(indices)

    def memory(self) -> dict[str, int]:
        """Bytes allocated by part, their total, and a full-precision cache's for comparison."""
        return memory(layer.cache for layer in self._packed if layer.cache is not None)
