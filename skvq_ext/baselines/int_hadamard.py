"""Symmetric integers behind a Hadamard rotation per head, as llama.cpp quantizes its KV cache.

Source: llama.cpp, pull request 21038 (rotation) and ggml-quants.c, quantize_row_q4_0_ref (blocks of
32 with one fp16 factor, the number of largest magnitude is hit exactly). Widths 3 and 2 are the same
rule with fewer levels; llama.cpp has no such types for a cache. The packed cache of this library
differs: its levels are asymmetric (a scale and a zero per group), clipped, and of fp8 metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq_ext.baselines.coding import (
    BaselineError,
    Coded,
    Pair,
    Rotated,
    check_divides,
    kept,
)
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, widths
from skvq_ext.evaluate.method import Method
from skvq_ext.hadamard import block_hadamard

_BLOCK = 64  # channels of the smallest rotation, and of that of values


@dataclass(frozen=True)
class HadamardOptions(Options):
    """g: channels that share a factor."""

    k: str = widths("4", "3", "2", default="4")
    v: str = widths("4", "3", "2", default="")
    g: int = 32


@dataclass(frozen=True)
class Symmetric:
    """Blocks of channels of each token and head share one factor, like ggml's q4_0."""

    width: int
    group: int

    def __call__(self, layer: int, x: Tensor, start: int) -> Coded:
        """See `Coder`."""
        blocks, half = x.unflatten(-1, (-1, self.group)), 2 ** (self.width - 1)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        factor = largest / -half
        inverse = torch.where(factor == 0.0, 0.0, 1.0 / factor)
        codes = (blocks * inverse + half + 0.5).floor().clamp(0, 2 * half - 1)
        values = (codes - half) * kept(factor)
        bits = blocks.numel() * self.width + factor.numel() * 16
        return Coded(values.flatten(-2), bits)


def build(options: HadamardOptions, source: Source) -> Method:
    """Needs no calibration."""
    dim = source.geometry.head_dim
    check_divides("g", options.g, dim, "head_dim")
    if dim % _BLOCK:
        raise BaselineError(
            f"head_dim {dim}: llama.cpp rotates heads of a multiple of {_BLOCK} channels only."
        )
    k_size = dim & -dim  # the largest power of two that divides it
    k, v = (
        Rotated(Symmetric(int(width), options.g), (_blocks(dim, size),))
        for width, size in ((options.k, k_size), (options.v, _BLOCK))
    )
    pair = Pair(k, v)
    bits = [int(width) + 16 / options.g for width in (options.k, options.v)]
    deviations = "symmetric levels, one fp16 factor per block; llama.cpp has no window and no sinks"
    return Simulated.of("int-hadamard", options, average(*bits), lambda: pair, deviations)


def _blocks(dim: int, size: int) -> Tensor:
    return block_hadamard(tuple(range(0, dim + 1, size))).float()
