"""The packed keys and values of one layer.

Every sequence is [sinks | packed pages | window]: where its tokens lie is a function of its length
alone. The oldest and the newest tokens stay in the cache's dtype, all in between is packed in pages
of 64 tokens. K and V enter through the layer's door, q and the output take the adjoint way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.door import Door, token_share
from skvq_ext.format import TILE_TOKENS, RecordFormat
from skvq_ext.pages import NO_PAGE, PageChange, PagePool, grown, packed_tiles
from skvq_ext.plan import LayerPlan
from skvq_ext.ragged import Ragged
from skvq_ext.scheme import Scheme

_NORMAL = torch.inference_mode(False)  # tensors made here may be written in any mode later on
_PIECE = 256  # tokens a sliding layer appends at once, so that pages can be used again in between


def readable_format(
    scheme: Scheme, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> RecordFormat:
    """The record of a scheme in the arrangement of a device.

    Raises: ValueError where the device has no kernel for the scheme and dtype of rows.
    """
    record = scheme.record_format(head_dim, device)
    if torch.device(device).type != "meta":  # where sizes are all that counts
        try:
            ops.check_decode_format(record.args, head_dim, dtype, device)
        except ValueError as error:
            raise ValueError(
                f"a cache {scheme} of {dtype} cannot be read on {device}: {error}"
            ) from None
    return record


class LayerCache:
    """The packed keys and values of one layer.

    Without max_len, pages are allocated as they are needed and shared between sequences. With
    max_len all memory is allocated at once, its addresses never change, and neither `append` nor
    `attend` reads or writes anything on the host: what CUDA graphs need.
    """

    @_NORMAL
    def __init__(
        self,
        plan: LayerPlan,
        scheme: Scheme,
        *,
        num_q_heads: int,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_len: int | None = None,
        sliding_window: int = 0,
        exact: bool = False,
        door: Door | None = None,
    ) -> None:
        """Args: plan of this layer; num_q_heads; dtype of sinks and window, on CUDA float16 or
        bfloat16; max_len, tokens each sequence can hold, None = no limit; sliding_window, tokens a
        query sees, 0 = all; exact, on the CPU read packed pages in float32 (see
        `ops.decode_attention`); door, if one was built from this plan already.
        Raises: ValueError where the device has no kernel for the scheme and dtype."""
        num_kv_heads, head_dim = plan.k.permutation.shape
        self.scheme, self.exact = scheme, exact
        self.max_len, self.sliding_window = max_len, sliding_window
        self.format = readable_format(scheme, head_dim, dtype, device)
        self.door = Door(plan, num_q_heads, device) if door is None else door
        self._pool = PagePool(batch_size) if max_len is None else None
        self._one_each = Ragged(batch_size, batch_size)  # the layout of a decode step
        self._lengths = [0] * batch_size
        self._high = [0] * batch_size  # longest each sequence ever was, as of the last crop
        shape, record_bytes = (num_kv_heads, head_dim), self.format.record_bytes
        num_pages = batch_size * self._own_pages()
        exponents = torch.cat([plan.k.exponents, plan.v.exponents], dim=-1)

        def rows(slots: int) -> Tensor:
            return torch.zeros(batch_size, slots, *shape, dtype=dtype, device=device)

        self.tensors = ops.CacheTensors(
            pages=torch.empty(
                num_pages, num_kv_heads, record_bytes, dtype=torch.uint8, device=device
            ),
            page_table=self._empty_table(batch_size, device),
            sink_k=rows(scheme.sinks),
            sink_v=rows(scheme.sinks),
            ring_k=rows(self._ring),
            ring_v=rows(self._ring),
            kv_len=torch.zeros(batch_size, dtype=torch.int32, device=device),
            k_clip=plan.k.clip.to(device),
            v_clip=plan.v.clip.to(device),
            exponents=exponents.to(device),
        )

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """Itself: all heads share their formats."""
        return (self,)

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self._one_each.batch_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence. With max_len this reads the device."""
        return self.tensors.kv_len.tolist() if self._pool is None else list(self._lengths)

    def append(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | Ragged | None = None) -> None:
        """Adds tokens to every sequence; complete tiles are packed on the way.

        Args: k, v [num_tokens, num_kv_heads, head_dim], the model's own (not mapped), of the
        cache's dtype; cu_seqlens int32 [batch + 1], tokens of sequence b are rows
        cu_seqlens[b] : cu_seqlens[b + 1], None = equally many each.
        Raises: ValueError or RuntimeError, and then nothing has changed.
        """
        tokens = self.check_append(k, v, cu_seqlens)
        k, v = self.door.map_k(k), self.door.map_v(v)
        if not self.sliding_window or not tokens.longer_than(self._piece):
            self._append(k, v, tokens)
            return
        for rows, piece in tokens.pieces(self._piece):
            index = rows.to(k.device)
            self._append(k.index_select(0, index), v.index_select(0, index), piece)

    def check_append(
        self,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | Ragged | None = None,
        num_kv_heads: int | None = None,
    ) -> Ragged:
        """Raises what `append` would; num_kv_heads of k and v, None = those of this cache.

        Returns: the layout of the tokens.
        """
        tokens = self._layout(cu_seqlens, k.shape[0])
        self._check(k, v, num_kv_heads)
        self._check_room(tokens)
        return tokens

    def attend(
        self,
        q: Tensor,
        cu_seqlens_q: Tensor | Ragged | None = None,
        *,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        learned_sinks: Tensor | None = None,
        queries_in_cache: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q over everything cached, in one softmax, read from packed bytes.

        Args: q [num_q_tokens, num_q_heads, head_dim], not mapped; cu_seqlens_q int32 [batch + 1],
        None = equally many each; softmax_scale, None = head_dim ** -0.5; softcap, 0 = none;
        learned_sinks f32 [num_q_heads], a logit per head that takes probability and gives nothing;
        queries_in_cache: the queries are the newest cached tokens (append, then attend), else they
        come right after the cached tokens.
        Returns: out like q; lse f32 [num_q_tokens, num_q_heads], natural logarithm, with the
        learned sink in it. A query that sees nothing gives 0 and -inf.
        """
        queries = self._layout(cu_seqlens_q, q.shape[0])
        if self.sliding_window and queries_in_cache:
            self._check_queries(queries)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse = ops.decode_attention(
            self.door.map_q(q),
            queries.cu_seqlens,
            self.tensors,
            self.format.args,
            window=self.scheme.window,
            softmax_scale=scale,
            learned_sinks=learned_sinks,
            logit_shift=self.door.logit_shift(q, scale),
            sliding_window=self.sliding_window,
            softcap=softcap,
            queries_in_cache=queries_in_cache,
            exact=self.exact,
        )
        share = None if learned_sinks is None else token_share(lse, learned_sinks)
        return self.door.unmap_o(out, lse, share), lse

    def check_crop(self, lengths: Sequence[int]) -> None:
        """Raises: ValueError where a sequence cannot be cut to lengths[b] tokens exactly."""
        for b, (new, now, high) in enumerate(zip(lengths, self.lengths, self._high, strict=True)):
            high = max(now, high)
            if new == 0 or new >= now or not self._tiles(high):
                continue
            if high - new > self.scheme.rollback:
                raise ValueError(
                    f"cannot crop sequence {b} to {new} tokens: it held up to {high}, and with "
                    f"rollback{self.scheme.rollback} in the scheme only the last "
                    f"{self.scheme.rollback} of them can be taken back, because what is older is "
                    f"packed. Crop to {high - self.scheme.rollback} or more, to 0 (which empties "
                    "it), or make the cache with a larger rollback."
                )

    def crop(self, lengths: Sequence[int]) -> None:
        """Cuts sequence b to its first lengths[b] tokens. Raises: ValueError, see `check_crop`."""
        self.check_crop(lengths)
        now = self.lengths
        self._high = [
            max(pair) if new else 0 for *pair, new in zip(self._high, now, lengths, strict=True)
        ]
        self._lengths = [min(pair) for pair in zip(now, lengths, strict=True)]
        if self._pool is not None:
            self._write(self._pool.truncate([self._tiles(n) for n in self._lengths]))
        self.tensors.kv_len.copy_(torch.tensor(self._lengths, dtype=torch.int32))

    @_NORMAL
    def reset(self) -> None:
        """Empties every sequence and, without max_len, gives the pages back."""
        self.crop([0] * self.batch_size)
        if self._pool is not None:
            self._pool = PagePool(self.batch_size)
            t = self.tensors
            self._replace(pages=t.pages[:0].clone(), page_table=t.page_table[:, :0].clone())

    @_NORMAL
    def take(self, rows: Sequence[int]) -> None:
        """Makes sequence i what sequence rows[i] was; the batch becomes len(rows) sequences."""
        t, now = self.tensors, self.lengths
        index = torch.tensor(rows, dtype=torch.int64, device=t.kv_len.device)
        self._one_each = Ragged(len(rows), len(rows))
        self._lengths, self._high = [now[r] for r in rows], [self._high[r] for r in rows]
        names = ["sink_k", "sink_v", "ring_k", "ring_v", "kv_len"]
        taken = {name: getattr(t, name).index_select(0, index) for name in names}
        if self._pool is not None:
            self._pool.take(rows)
            taken["page_table"] = t.page_table.index_select(0, index)
        else:  # every sequence has its own pages at fixed addresses, so the bytes move
            own = t.pages.view(len(now), self._own_pages(), *t.pages.shape[1:]).index_select(
                0, index
            )
            taken["pages"] = own.flatten(0, 1)
        if self._pool is None and len(rows) == len(now):
            for name, value in taken.items():
                getattr(t, name).copy_(value)
        elif self._pool is None:
            self._replace(**taken, page_table=self._empty_table(len(rows), t.pages.device))
        else:
            self._replace(**taken)

    @_NORMAL
    def to(self, device: torch.device | str, doors: Mapping[int, Door] | None = None) -> LayerCache:
        """Moves everything to a device, packed pages in the arrangement that is read there.

        Args: doors that are there already, by the id of what they were. Returns: itself.
        Raises: ValueError where the device has no kernel for the scheme and dtype.
        """
        t, old = self.tensors, self.format
        new = readable_format(self.scheme, old.head_dim, t.ring_k.dtype, device)
        pages = t.pages
        if new != old:
            pages = ops.repack_pages(pages.cpu(), old.args, old.head_dim, new.arrangement)
        moved = ops.CacheTensors(*(x.to(device) for x in t._replace(pages=pages)))
        self.door = self.door.to(device) if doors is None else doors[id(self.door)]
        self.format, self.tensors = new, moved
        return self

    def full_precision_bytes(self) -> int:
        """Bytes that rows of the cache's dtype would take for what this layer holds."""
        rows = self.tensors.ring_k
        limit = self.sliding_window or max(self.lengths, default=0)
        tokens = sum(min(n, limit) for n in self.lengths)
        return 2 * tokens * rows.shape[2] * rows.shape[3] * rows.element_size()

    @property
    def _ring(self) -> int:
        return self.scheme.window + TILE_TOKENS + self.scheme.rollback

    @property
    def _piece(self) -> int:
        return max(_PIECE, TILE_TOKENS * -(-(self.scheme.rollback + 1) // TILE_TOKENS))

    def _tiles(self, kv_len: int) -> int:
        return packed_tiles(kv_len, self.scheme.sinks, self.scheme.window)

    def _layout(self, given: Tensor | Ragged | None, num_tokens: int) -> Ragged:
        if given is None and num_tokens == self._one_each.num_tokens:
            return self._one_each
        return Ragged.of(given, num_tokens, self.batch_size)

    def _append(self, k: Tensor, v: Tensor, tokens: Ragged) -> None:
        """k, v are mapped already and, in a sliding layer, few enough."""
        if self._pool is None:
            self._store(k, v, tokens)
            return
        lengths = [n + new for n, new in zip(self._lengths, tokens.counts, strict=True)]
        before, after = self._pool.tiles, [self._tiles(n) for n in lengths]
        if after != before:
            changes = self._pool.recycle(self._tiles_out_of_sight()) if self.sliding_window else []
            self._grow(self._pool.needed(after), max(after))
            self._write(changes + self._pool.extend(after))
        try:
            self._store(k, v, tokens)
        except BaseException:
            self._write(self._pool.truncate(before))
            raise
        self._lengths = lengths

    def _store(self, k: Tensor, v: Tensor, tokens: Ragged) -> None:
        ops.append(
            k, v, tokens.cu_seqlens, self.tensors, self.format.args, window=self.scheme.window
        )

    def _tiles_out_of_sight(self) -> list[int]:
        """Leading tiles of each sequence that no query sees any more, not even after a rollback."""
        hidden = self.scheme.sinks + self.scheme.rollback + self.sliding_window - 1
        return [max(0, n - hidden) // TILE_TOKENS for n in self._lengths]

    def _own_pages(self) -> int:
        """Pages of each sequence with max_len. Tile t of a sliding layer uses page t % own again:
        when it is overwritten, no query can see the old tile any more."""
        tiles = self._tiles(self.max_len or 0)
        if not self.sliding_window:
            return tiles
        seen = self._piece + self.scheme.rollback + self.sliding_window
        return min(tiles, -(-seen // TILE_TOKENS))

    def _empty_table(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Page table of an empty cache: no tiles yet, or with max_len where each will lie."""
        own, tiles = self._own_pages(), self._tiles(self.max_len or 0)
        first = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None] * own
        return first + torch.arange(tiles, dtype=torch.int32, device=device) % max(1, own)

    @_NORMAL
    def _grow(self, num_pages: int, num_tiles: int) -> None:
        assert self._pool is not None
        pages, table = self.tensors.pages, self.tensors.page_table
        if num_pages > pages.shape[0]:
            more = pages.new_empty(grown(pages.shape[0], num_pages), *pages.shape[1:])
            more[: pages.shape[0]] = pages
            self._replace(pages=more)
            self._pool.grow(more.shape[0])
        if num_tiles > table.shape[1]:
            wider = table.new_full((table.shape[0], grown(table.shape[1], num_tiles)), NO_PAGE)
            wider[:, : table.shape[1]] = table
            self._replace(page_table=wider)

    def _write(self, changes: list[PageChange]) -> None:
        if not changes:
            return
        table = self.tensors.page_table
        rows, tiles, pages = torch.tensor(changes, device=table.device).unbind(1)
        table[rows, tiles] = pages.to(table.dtype)

    def _replace(self, **tensors: Tensor) -> None:
        self.tensors = self.tensors._replace(**tensors)

    def _check(self, k: Tensor, v: Tensor, num_kv_heads: int | None) -> None:
        rows = self.tensors.ring_k
        shape = (k.shape[0], num_kv_heads or rows.shape[2], rows.shape[3])
        dtype, device = rows.dtype, rows.device
        for name, x in (("k", k), ("v", v)):
            if x.shape != shape:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; the cache holds [num_tokens, num_kv_heads, "
                    f"head_dim] = {list(shape)}."
                )
            if x.dtype != dtype or x.device != device:
                raise ValueError(
                    f"{name} is {x.dtype} on {x.device}; this cache was made for {dtype} on "
                    f"{device}. Convert {name}, or make the cache with its dtype and device."
                )

    def _check_room(self, tokens: Ragged) -> None:
        """max_len, where looking costs nothing; on a GPU the operator guards the pages it has."""
        if self.max_len is None or not self.tensors.kv_len.is_cpu or torch.compiler.is_compiling():
            return
        for b, (now, new) in enumerate(zip(self.lengths, tokens.counts, strict=True)):
            if now + new > self.max_len:
                raise ValueError(
                    f"sequence {b} holds {now} tokens and {new} more do not fit into "
                    f"max_len={self.max_len}. Nothing was appended; make the cache longer."
                )

    def _check_queries(self, queries: Ragged) -> None:
        limit = self.scheme.rollback + 1
        if queries.longer_than(limit):
            raise ValueError(
                f"{max(queries.counts)} queries of one sequence were given to a sliding-window "
                f"layer, which keeps what the newest {limit} (rollback + 1) can see. Attend "
                "before appending, with queries_in_cache=False, and merge with attention among "
                "the new tokens (ops.merge_states)."
            )
