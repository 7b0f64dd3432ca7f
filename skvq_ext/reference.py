"""Plain PyTorch reference of the quantizer, the cache and the attention: slow, obvious, independent of the C++.

Only sizes (which channels form a group, how many levels a code has) are read from the shared definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.format import TILE_TOKENS, RecordFormat
from skvq_ext.ops import format_table

_LEVELS = {c["name"]: int(c["levels"]) for c in format_table()["codes"]}


@dataclass(frozen=True)
class Quantized:
    """Codes (integers as float32) of a group and its rounded scale and zero, [..., channels] and [..., 1]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """code * scale + zero in float32."""
        return self.codes * self.scale + self.zero


def round_meta(x: Tensor, meta: str) -> Tensor:
    """Round float32 to E4M3 (saturating at 448) or fp16 (at 65504) and back."""
    if meta == "fp16":
        return x.clamp(-65504.0, 65504.0).to(torch.float16).float()
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def quantize_group(
    x: Tensor,
    code: str,
    meta: str,
    clip: float | Tensor = 1.0,
    scale_exponent: int = 0,
    zero_exponent: int = 0,
) -> Quantized:
    """Quantize one group: the last dimension of x shares a scale and a zero.

    Dynamic asymmetric quantization with clipping (SKVQ section 3); codes are computed against the rounded
    scale and zero, the scale spans from the rounded zero to the clipped maximum, a group that holds a NaN or an
    infinity becomes NaN.

    Args:
        x: [..., channels], any float dtype; the arithmetic is float32.
        code: name of the number format.
        meta: "fp8" or "fp16".
        clip: share of the range that is kept, about the midpoint; where there are several, [choices], every
            group takes the first that errs least.
        scale_exponent, zero_exponent: stored values are divided by 2 ** exponent.
    """
    x = x.float()
    ratios = torch.as_tensor(clip, dtype=torch.float32).reshape(-1).tolist()
    made = [_quantize(x, code, meta, ratio, scale_exponent, zero_exponent) for ratio in ratios]
    best = made[0]
    for other in made[1:]:
        better = _errors(x, other) < _errors(x, best)
        pairs = zip(vars(other).values(), vars(best).values(), strict=True)
        best = Quantized(*(torch.where(better, new, old) for new, old in pairs))
    return best


def _errors(x: Tensor, found: Quantized) -> Tensor:
    """Squared errors in whole parts of the group's range, int64 [..., 1]; 1023 parts are a range."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    parts = 511.5 / (0.5 * high - 0.5 * low)
    off = ((x - found.dequantize()) * parts).abs().nan_to_num(0.0, posinf=1023.0).clamp(max=1023.0)
    return off.round().long().square().sum(-1, keepdim=True)


def _quantize(
    x: Tensor, code: str, meta: str, clip: float, scale_exponent: int, zero_exponent: int
) -> Quantized:
    top = float(_LEVELS[code] - 1)
    finite = x.isfinite().all(-1, keepdim=True)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle = 0.5 * low + 0.5 * high
    half = (0.5 * high - 0.5 * low) * torch.as_tensor(clip, dtype=torch.float32)
    nan = torch.full_like(low, math.nan)
    zero = (
        round_meta(torch.where(finite, (middle - half) * 2.0**-zero_exponent, nan), meta)
        * 2.0**zero_exponent
    )
    step = (((middle + half) - zero) / top).clamp(min=0.0) * 2.0**-scale_exponent
    scale = round_meta(torch.where(finite, step, nan), meta)
    smallest = 2.0**-24 if meta == "fp16" else 2.0**-9
    scale = torch.where(scale == 0.0, smallest, scale) * 2.0**scale_exponent
    codes = ((x - zero) * (1.0 / scale)).clamp(0.0, top).round()
    return Quantized(torch.where(finite, codes, 0.0), scale, zero)


def fake_quantize_side(
    x: Tensor, fmt: RecordFormat, side: str, clip: Tensor, exponents: Tensor
) -> Tensor:
    """Quantize and dequantize K (side "k") or V ("v") of whole heads.

    Args:
        x: [tokens, num_kv_heads, head_dim].
        clip: float32 [num_kv_heads, groups] or [num_kv_heads, groups, choices].
        exponents: int32 [num_kv_heads, 4].

    Returns:
        float32 like x.
    """
    groups = fmt.k_groups if side == "k" else fmt.v_groups
    column = 0 if side == "k" else 2
    out = torch.empty(x.shape, dtype=torch.float32)
    for head in range(x.shape[1]):
        scale_exponent, zero_exponent = (int(e) for e in exponents[head, column : column + 2])
        for g, ((first, stop), code) in enumerate(zip(groups, fmt.codes(side), strict=True)):
            group = quantize_group(
                x[:, head, first:stop],
                code,
                fmt.meta,
                clip[head, g],
                scale_exponent,
                zero_exponent,
            )
            out[:, head, first:stop] = group.dequantize()
    return out


def packed_len(kv_len: int, sinks: int, window: int) -> int:
    """Tokens in packed tiles after kv_len tokens, a pure function of the length."""
    return TILE_TOKENS * (max(0, kv_len - sinks - window) // TILE_TOKENS)


def packed_end(position: int, kv_len: int, sinks: int, window: int, slots: int) -> int:
    """First position that the query at `position` reads in full precision after the sinks."""
    single_step = packed_len(min(position + 1, kv_len), sinks, window)
    left_ring = max(0, kv_len - slots - sinks)
    return sinks + max(single_step, TILE_TOKENS * math.ceil(left_ring / TILE_TOKENS))


@dataclass
class ReferenceSequence:
    """One sequence as plain rows: full-precision k, v and what packing makes of them, [tokens, heads, head_dim]."""

    k: Tensor
    v: Tensor
    packed_k: Tensor
    packed_v: Tensor
    sinks: int
    window: int
    slots: int

    @staticmethod
    def make(
        k: Tensor,
        v: Tensor,
        fmt: RecordFormat,
        sinks: int,
        window: int,
        slots: int,
        clips: tuple[Tensor, Tensor],
        exponents: Tensor,
    ) -> ReferenceSequence:
        """Quantize all rows; which of them are read packed depends on the query."""
        return ReferenceSequence(
            k,
            v,
            fake_quantize_side(k, fmt, "k", clips[0], exponents),
            fake_quantize_side(v, fmt, "v", clips[1], exponents),
            sinks,
            window,
            slots,
        )

    def visible_rows(self, position: int) -> tuple[Tensor, Tensor]:
        """K and V that the query at `position` reads, float64 [kv_len, heads, head_dim]."""
        kv_len = self.k.shape[0]
        end = packed_end(position, kv_len, self.sinks, self.window, self.slots)
        index = torch.arange(kv_len)
        packed = ((index >= self.sinks) & (index < end))[:, None, None]
        k = torch.where(packed, self.packed_k.double(), self.k.double())
        return k, torch.where(packed, self.packed_v.double(), self.v.double())

    def attend(
        self,
        q: Tensor,
        first_position: int,
        *,
        softmax_scale: float,
        sliding_window: int = 0,
        softcap: float = 0.0,
        learned_sinks: Tensor | None = None,
        logit_shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention in float64, one query at a time.

        Args:
            q: [q_len, num_q_heads, head_dim], the first of them at `first_position`.
            logit_shift: [q_len, num_q_heads].

        Returns:
            out [q_len, num_q_heads, head_dim] and lse [q_len, num_q_heads], float64.
        """
        ratio = q.shape[1] // self.k.shape[1]
        outs, lses = [], []
        for i, query in enumerate(q.double()):
            position = first_position + i
            k, v = (x.repeat_interleave(ratio, dim=1) for x in self.visible_rows(position))
            logits = torch.einsum("hd,thd->ht", query, k) * softmax_scale
            if logit_shift is not None:
                logits = logits + logit_shift[i, :, None]
            if softcap > 0.0:
                logits = softcap * torch.tanh(logits / softcap)
            index = torch.arange(k.shape[0])
            seen = (index <= position) & (index > position - (sliding_window or position + 2))
            logits = logits[:, seen]
            extra = (
                learned_sinks.double()[:, None]
                if learned_sinks is not None
                else logits.new_empty(len(query), 0)
            )
            lse = torch.logsumexp(torch.cat([logits, extra], dim=1), dim=1)
            weights = torch.exp(logits - torch.where(lse.isneginf(), 0.0, lse)[:, None])
            outs.append(torch.einsum("ht,thd->hd", weights, v[seen]))
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)
