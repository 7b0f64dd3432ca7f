"""A simulated method, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from skvq_ext.baselines.cache import CHUNK, Rule, SimulatedCache
from skvq_ext.baselines.coding import BaselineError, Coder, PreRope, Quantizer
from skvq_ext.baselines.options import Options
from skvq_ext.baselines.samples import LayerRows, collect
from skvq_ext.geometry import Geometry
from skvq_ext.rope import Rope


@dataclass(frozen=True)
class Simulated:
    """A method (see `skvq_ext.evaluate.method`) that stores nothing packed.

    bits: what it would store per value, all metadata included. make: a quantizer for a new cache.
    """

    name: str
    bits: float
    protocol: str
    rule: Rule
    make: Callable[[], Quantizer]
    packed: bool = False
    chunk: int = CHUNK

    def cache(self, model: Any) -> SimulatedCache:
        """A new, empty transformers cache for `model`."""
        return SimulatedCache(model, self.rule, self.make)

    @classmethod
    def of(
        cls,
        method: str,
        options: Options,
        bits: float,
        make: Callable[[], Quantizer],
        deviations: str,
        tile: int | None = None,
    ) -> Simulated:
        """Args: method, its name in specs; deviations from its source, in words."""
        rule = (
            Rule(options.w, options.sink) if tile is None else Rule(options.w, options.sink, tile)
        )
        size = "" if tile is None else f", {tile} tokens at a time"
        protocol = f"simulated; window {rule.window}, {rule.sinks} sinks{size}; {deviations}"
        return cls(f"{method}:{options}", bits, protocol, rule, make)


@dataclass(frozen=True)
class Source:
    """The model a method is fitted to, and the text it may be calibrated on.

    token_ids int64 [n] or [1, n], None = no text; seed of everything random.
    """

    model: Any
    token_ids: Tensor | None
    seed: int = 0

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes of the model."""
        return Geometry.from_config(self.model.config)

    @cached_property
    def rope(self) -> Rope:
        """How the model rotates its keys. Raises: RopeError where that cannot be undone."""
        return Rope.of(self.model)

    def rows(self, skip: int, sensitivity: bool = False) -> list[LayerRows]:
        """Keys, values and queries of the calibration text, per layer; see `collect`.

        Raises: BaselineError where there is no text.
        """
        if self.token_ids is None:
            raise BaselineError(
                "this baseline is calibrated: give token_ids of a text that is not evaluated on."
            )
        return collect(self.model, self.token_ids, skip, sensitivity=sensitivity)

    def keys(self, rows: LayerRows, layer: int, rope: str) -> Tensor:
        """Keys of a layer as a method sees them: "pre" = before RoPE, "post" = after."""
        if rope == "post":
            return rows.k
        return self.rope.unrotate(rows.k, rows.positions, layer)

    def key_coder(self, coder: Coder, rope: str) -> Coder:
        """A coder of keys, put where it belongs: before RoPE or after."""
        return coder if rope == "post" else PreRope(coder, self.rope)
