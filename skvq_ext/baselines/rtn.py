"""Round to nearest, per token: the baseline of SKVQ's Table 1 (arXiv 2405.06219), without transform.

The original gives this baseline no window, no sinks and a quantized prefill; here it gets the window
and the sinks that all methods get (w0-sink0 takes them away), and an exact prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvq_ext.baselines.coding import Pair, PerToken, check_divides, group_bits
from skvq_ext.baselines.method import Simulated, Source
from skvq_ext.baselines.options import Options, average, words
from skvq_ext.evaluate.method import Method, Packed
from skvq_ext.ops import format_table
from skvq_ext.plan import DEFAULT_EXPONENTS
from skvq_ext.scheme import Scheme


@dataclass(frozen=True)
class RtnOptions(Options):
    """g: channels of a token and head that share a scale and a zero."""

    g: int = 64
    meta: str = words("fp8", "fp16")


def build(options: RtnOptions, source: Source) -> Method:
    """Really packed where this library holds it, simulated elsewhere (w0, other groups)."""
    geometry, table = source.geometry, format_table()
    check_divides("g", options.g, geometry.head_dim, "head_dim")
    if options.w and options.g in table["groups"] and geometry.head_dim in table["head_dims"]:
        scheme = Scheme(
            options.k,
            options.v,
            options.g,
            options.w,
            options.sink,
            options.meta,
            transform=frozenset(),
            clip=1.0,
        )
        return Packed(geometry, scheme, name=f"rtn:{options}")
    bits = [group_bits(width, options.g, options.meta) for _, width in options.sides]
    coders = [
        PerToken(width, options.g, options.meta, DEFAULT_EXPONENTS[side])
        for side, width in options.sides
    ]
    return Simulated.of(
        "rtn", options, average(*bits), lambda: Pair(*coders), "no transform, no clip"
    )
