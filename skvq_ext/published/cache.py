"""A transformers cache that holds older tokens packed as the published method packs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from skvq_ext.format import TILE_TOKENS
from skvq_ext.hf.attention import select
from skvq_ext.published.attention import NAME, CacheLength, attach
from skvq_ext.published.plan import PublishedPlan
from skvq_ext.published.quantizer import Quantizer
from skvq_ext.published.statistics import channels_of
from skvq_ext.reference import packed_len

CHUNK = TILE_TOKENS  # most tokens of a forward that read what single steps would read


class PublishedLayer(CacheLayerMixin):
    """One attention layer of a `PublishedCache`: sinks and window as given, packed tiles between.

    `update` hands the new keys on; `attend`, called by the attention implementation, reads and
    packs. Nothing dense is kept of what is packed.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, index: int, plan: PublishedPlan, config: Any, sliding: bool) -> None:
        """Args: index of the layer; sliding, whether the model masks all but a window of it."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.plan, self.is_sliding = index, plan, sliding
        self._config, self._quantizers = config, dict[str, Quantizer]()
        self.reset()

    def reset(self) -> None:
        """Empties the layer."""
        self.is_initialized = False
        self.seen = self.packed = 0  # tokens; packed ones come after the sinks
        self.sinks: dict[str, Tensor] = {}  # "k", "v": [heads, tokens, head_dim]
        self.recent: dict[str, Tensor] = {}
        self.codes: dict[str, list[Tensor]] = {"k": [], "v": []}  # one entry per tile
        self.metas: dict[str, list[Tensor]] = {"k": [], "v": []}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes device and dtype from the first rows."""
        scheme, device = self.plan.scheme, key_states.device
        groupings = self.plan.layers[self.index]
        for name, bits, grouping, x in zip(
            "kv", (scheme.k, scheme.v), groupings, (key_states, value_states), strict=True
        ):
            quantizer = Quantizer(grouping, bits, scheme.meta, scheme.round_first, device)
            if x.shape[1] * x.shape[3] != quantizer.packing.channels:
                raise ValueError(
                    f"layer {self.index}: {name.upper()} of shape {list(x.shape)}, but this method "
                    f"was fitted to {quantizer.packing.channels} channels. Fit it to this model."
                )
            self._quantizers[name] = quantizer
            self.sinks[name] = self.recent[name] = x[0, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands the new keys and values on to the attention implementation "skvq_published".

        Args: key_states, value_states [1, num_kv_heads, columns, head_dim].
        Raises: ValueError or RuntimeError where they cannot be cached.
        """
        found = self._config._attn_implementation
        if found != NAME:
            raise RuntimeError(
                f"the model attends with {found!r}, which cannot read this cache. Make the cache "
                "after all others, right before the model is run with it."
            )
        if key_states.shape[0] != 1:
            raise ValueError(
                f"a batch of {key_states.shape[0]}: the published cache holds one sequence. Run "
                "them one by one, without beam search."
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RuntimeError("no gradients flow through a cache; use torch.inference_mode().")
        self._check_length(key_states.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return attach(key_states, self), value_states

    def attend(
        self, k: Tensor, v: Tensor, over: Callable[[slice, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Appends rows and attends with their queries.

        The first forward, and one of more than CHUNK columns, sees its own tokens as they are;
        other queries see what they would see in single steps.
        Args: k, v [1, num_kv_heads, columns, head_dim]; over, attention of some of the queries over
        all keys and values, which gives [1, queries, num_q_heads, head_dim].
        """
        columns, before = k.shape[2], self.seen
        self._append(k[0], v[0])
        single = before > 0 and columns <= CHUNK
        outs, start = [], 0
        while start < columns:
            stop, packed = columns, self.packed
            if single:
                packed = self._packed_len(before + start + 1)
                rest = range(start + 1, columns)
                stop = next((i for i in rest if self._packed_len(before + i + 1) > packed), columns)
            self._pack(packed)
            keys, values = self._rows("k"), self._rows("v")
            outs.append(over(slice(start, stop), keys[None], values[None]))
            start = stop
        self._pack(self._packed_len(self.seen))
        return torch.cat(outs, dim=1)

    def read_keys(self) -> Tensor:
        """All keys as the newest token's query reads them, [num_kv_heads, tokens, head_dim]."""
        return self._rows("k")

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns after query_length more, 0); early 5.x releases give positions of new ones."""
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return CacheLength(self.seen + new), 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: grows as needed."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early 5.x releases

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: rows that were packed cannot be taken back."""
        raise NotImplementedError("the published cache cannot be cropped; make a new one.")

    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        """Refused: one sequence only."""
        raise NotImplementedError("the published cache holds one sequence: no beams, no batches.")

    def batch_select_indices(self, indices: Any) -> NoReturn:
        """Refused: one sequence only."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: one sequence only."""
        self.reorder_cache(repeats)

    def offload(self) -> NoReturn:
        """Refused: packed bytes stay where they are read."""
        raise NotImplementedError("the published cache cannot be offloaded.")

    def tensors(self) -> dict[str, list[Tensor]]:
        """What is held, by part: for counting bytes."""
        return {
            "codes": [*self.codes["k"], *self.codes["v"]],
            "scales and zeros": [*self.metas["k"], *self.metas["v"]],
            "sinks": list(self.sinks.values()),
            "window": list(self.recent.values()),
            "permutations": [q.permutation for q in self._quantizers.values()],
            "work tables": [t for q in self._quantizers.values() for t in q.work_tables()],
        }

    def _check_length(self, columns: int) -> None:
        rope = self.plan.rope
        limit = 0 if rope is None else rope.switches_at
        if limit and 0 < self.seen <= limit < self.seen + columns:
            raise ValueError(
                f"the text grows over {limit} tokens, where this model changes the frequencies of "
                "its RoPE and older keys would have to be computed again. Start with a longer "
                "prompt, or stay below."
            )

    def _packed_len(self, kv_len: int) -> int:
        scheme = self.plan.scheme
        return packed_len(kv_len, scheme.sinks, scheme.window)

    def _append(self, k: Tensor, v: Tensor) -> None:
        """Rows [heads, columns, head_dim]; copies, so that no view keeps a prompt alive."""
        missing = self.plan.scheme.sinks - self.sinks["k"].shape[1]
        for name, x in (("k", k), ("v", v)):
            if missing > 0:
                self.sinks[name] = torch.cat([self.sinks[name], x[:, :missing]], dim=1)
            self.recent[name] = torch.cat([self.recent[name], x[:, max(missing, 0) :]], dim=1)
        self.seen += k.shape[1]

    def _pack(self, until: int) -> None:
        """Packs whole tiles until so many tokens are."""
        count = until - self.packed
        if count <= 0:
            return
        for name, quantizer in self._quantizers.items():
            rows = self.recent[name][:, :count].float()
            if name == "k" and self.plan.rope is not None:
                first = self.sinks[name].shape[1] + self.packed
                positions = torch.arange(first, first + count, device=rows.device)
                rows = self.plan.rope.unrotate(rows, positions, self.index, self.seen)
            for tile in channels_of(rows).split(TILE_TOKENS):
                codes, meta = quantizer.pack(tile)
                self.codes[name].append(codes)
                self.metas[name].append(meta)
            self.recent[name] = self.recent[name][:, count:].clone()
        self.packed = until

    def _rows(self, name: str) -> Tensor:
        """All tokens as they read now, [heads, seen, head_dim] in the dtype they came in."""
        parts = [self.sinks[name], self.recent[name]]
        if self.packed:
            codes, metas = torch.cat(self.codes[name]), torch.cat(self.metas[name])
            rows = self._quantizers[name].unpack(codes, metas)
            heads = rows.unflatten(1, (len(parts[0]), -1)).transpose(0, 1)
            if name == "k" and self.plan.rope is not None:
                first = parts[0].shape[1]
                positions = torch.arange(first, first + self.packed, device=rows.device)
                heads = self.plan.rope.rotate(heads, positions, self.index, self.seen)
            parts.insert(1, heads.to(parts[0].dtype))
        return torch.cat(parts, dim=1)


class PublishedCache(Cache):
    """A cache for `model(...)` and greedy or sampled `model.generate(...)`, one sequence at a time.

    Prefill attends in full precision, as in the original's long-context runs; forwards of at most
    CHUNK tokens after it read what single steps would read.
    """

    def __init__(self, model: Any, plan: PublishedPlan) -> None:
        """Args: a transformers decoder, whose attention implementation becomes "skvq_published";
        plan, fitted to it.
        Raises: ValueError for attention that has no K and V per head, or a plan of another model.
        """
        plan.check_fits(model)
        config, windows = select(model, NAME), plan.geometry.sliding_windows or ()
        self._published = [
            PublishedLayer(index, plan, config, window > 0) for index, window in enumerate(windows)
        ]
        super().__init__(layers=list(self._published))

    def memory(self) -> dict[str, int]:
        """Bytes allocated by part, whole storages, each counted once.

        Returns: "codes", "scales and zeros", "sinks", "window", "permutations" (int16 channels, as
        stored per layer), "work tables" (what reading and packing use, derived from those), their
        "total", and "full_precision": what rows of the cache's dtype would take.
        """
        found: dict[str, int] = {}
        seen: set[int] = set()
        full = 0
        for layer in self._published:
            for part, tensors in layer.tensors().items():
                found.setdefault(part, 0)
                for storage in (tensor.untyped_storage() for tensor in tensors):
                    if storage.nbytes() and storage.data_ptr() not in seen:
                        seen.add(storage.data_ptr())
                        found[part] += storage.nbytes()
            for rows in layer.sinks.values():
                full += layer.seen * rows.shape[0] * rows.shape[2] * rows.itemsize
        return found | {"total": sum(found.values()), "full_precision": full}
