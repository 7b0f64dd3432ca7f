"""KIVI: keys share a scale per channel over some tokens, values per token over some channels.

Source: arXiv 2402.02750, algorithm 1; groups of 32 and fp16 metadata as in its
repository (3.0 bits at 2 bits). KIVI keeps the newest 0 .. 127 keys and exactly 128 values exact and
no sinks; here the window and the sinks are those of all methods (sink0 takes the sinks away).
"""

from __future__ import annotations

from dataclasses import dataclass

from skvq_ext.baselines.coding import Pair, PerChannel, PerToken, check_divides, group_bits
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.evaluate.method import Method
from skvq_ext.format import TILE_TOKENS


@dataclass(frozen=True)
class KiviOptions(Options):
    """g: tokens of a key channel, and channels of a value token, that share a scale and a zero."""

    g: int = 32
    meta: str = words("fp16", "fp8")


def build(options: KiviOptions, source: Source) -> Method:
    """Needs no calibration."""
    check_divides("g", options.g, TILE_TOKENS, "the tokens of a tile,")
    check_divides("g", options.g, source.geometry.head_dim, "head_dim")
    pair = Pair(
        PerChannel(options.k, options.g, options.meta),
        PerToken(options.v, options.g, options.meta),
    )
    bits = [group_bits(width, options.g, options.meta) for _, width in options.sides]
    deviations = "K per channel, V per token, both leave the window 64 tokens at a time"
    return Simulated.of("kivi", options, average(*bits), lambda: pair, deviations)
