"""Cache tensors and random rows for tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from devices import CPU, Device
from torch import Tensor

from skvq_ext import ops
from skvq_ext.format import TILE_TOKENS, RecordFormat
from skvq_ext.reference import ReferenceSequence

POISON = float("nan")


@dataclass
class Case:
    """A cache for a batch of ragged sequences, everything that must not be read filled with NaN or 0xFF.

    fmt in the arrangement of the device; dtype None: the most precise one of the device.
    """

    fmt: RecordFormat
    device: Device = CPU
    num_kv_heads: int = 2
    sinks: int = 5
    window: int = 32
    rollback: int = 64
    batch: int = 1
    max_pages: int = 16
    dtype: torch.dtype | None = None
    seed: int = 0
    clip: float = 0.95
    choices: int = 1  # clip ratios of each group

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.fmt = self.device.arrange(self.fmt)
        self.dtype = self.dtype or self.device.dtype
        heads, dim, batch = self.num_kv_heads, self.fmt.head_dim, self.batch
        pages = batch * self.max_pages
        order = torch.randperm(pages + 3, generator=generator)[:pages]
        self.slots = self.window + TILE_TOKENS + self.rollback

        def rows(count: int) -> Tensor:
            return torch.full((batch, count, heads, dim), POISON, dtype=self.dtype)

        groups = len(self.fmt.k_groups), len(self.fmt.v_groups)
        noise = [torch.linspace(0.0, 0.1, heads * g).reshape(heads, g) for g in groups]
        clips = [self.clip - x for x in noise]
        if self.choices > 1:
            factors = torch.linspace(1.0, 0.6, self.choices)
            clips = [(clip[..., None] * factors).contiguous() for clip in clips]
        on_cpu = ops.CacheTensors(
            pages=torch.full((pages + 3, heads, self.fmt.record_bytes), 0xFF, dtype=torch.uint8),
            page_table=order.to(torch.int32).reshape(batch, self.max_pages),
            sink_k=rows(self.sinks),
            sink_v=rows(self.sinks),
            ring_k=rows(self.slots),
            ring_v=rows(self.slots),
            kv_len=torch.zeros(batch, dtype=torch.int32),
            k_clip=clips[0],
            v_clip=clips[1],
            exponents=torch.tensor([[-2, 0, -5, -4]] * heads, dtype=torch.int32),
        )
        self.cache = ops.CacheTensors(*(t.to(self.device.name) for t in on_cpu))
        self.generator = generator

    def rows(self, tokens: int, heads: int | None = None) -> Tensor:
        """Random rows [tokens, heads, head_dim] with channels of very different spread."""
        shape = (tokens, heads or self.num_kv_heads, self.fmt.head_dim)
        spread = torch.linspace(0.3, 2.0, self.fmt.head_dim)
        rows = torch.randn(shape, generator=self.generator) * spread
        return rows.to(self.device.name, self.dtype)

    def append(self, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> None:
        starts = cu_seqlens(lengths, self.device)
        ops.append(k, v, starts, self.cache, self.fmt.args, window=self.window)

    def attend(
        self, q: Tensor, lengths: list[int] | None = None, **options: object
    ) -> tuple[Tensor, Tensor]:
        self.device.needs_decode(self.fmt, self.dtype)
        options.setdefault("softmax_scale", self.fmt.head_dim**-0.5)
        options.setdefault("exact", True)
        starts = cu_seqlens(lengths, self.device)
        return ops.decode_attention(
            q, starts, self.cache, self.fmt.args, window=self.window, **options
        )

    def unpack(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of pages, on the CPU."""
        fmt, cache = self.fmt, self.cache
        read = ops.unpack_pages(cache.pages, pages, cache.exponents, fmt.args, fmt.head_dim)
        return read[0].cpu(), read[1].cpu()

    def reference(self, k: Tensor, v: Tensor) -> ReferenceSequence:
        """The reference computes on the CPU, whatever the device."""
        clips = (self.cache.k_clip.cpu(), self.cache.v_clip.cpu())
        return ReferenceSequence.make(
            k.cpu(),
            v.cpu(),
            self.fmt,
            self.sinks,
            self.window,
            self.slots,
            clips,
            self.cache.exponents.cpu(),
        )


def cu_seqlens(lengths: list[int] | None, device: Device = CPU) -> Tensor | None:
    """Lengths as flash-attention's cumulative int32 tensor."""
    if lengths is None:
        return None
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return torch.tensor(starts, dtype=torch.int32, device=device.name)


def attention_bound(want: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """Largest error attention in `dtype` may have.

    Twice the error of the same mathematics done by PyTorch in that dtype, plus twice the rounding that an
    addition of the size of the result suffers (both measured here, none chosen).
    """
    cast = want.to(dtype)
    rounding = (cast + 0.3 - 0.3 - cast).abs().max().item()
    return 2 * torch_error + 2 * rounding


def torch_error(
    reference: ReferenceSequence,
    q: Tensor,
    first_position: int,
    softmax_scale: float,
    dtype: torch.dtype,
) -> float:
    """Error of causal attention by plain PyTorch operations in `dtype` on the rows the reference reads.

    The worst of four orders of channels and tokens: they are the same mathematics, rounded differently.
    """
    want, _ = reference.attend(q, first_position, softmax_scale=softmax_scale)
    worst = 0.0
    for order in range(4):
        generator = torch.Generator().manual_seed(order)
        channels = torch.randperm(q.shape[2], generator=generator)
        for i, query in enumerate(q):
            k, v = reference.visible_rows(first_position + i)
            tokens = torch.randperm(min(first_position + i + 1, k.shape[0]), generator=generator)
            k, v = (
                x[tokens].to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                for x in (k, v)
            )
            logits = (
                torch.einsum("hd,thd->ht", query[:, channels].to(dtype), k[:, :, channels])
                * softmax_scale
            )
            out = torch.einsum("ht,thd->hd", torch.softmax(logits, dim=1), v)
            worst = max(worst, (out.double() - want[i]).abs().max().item())
    return worst
