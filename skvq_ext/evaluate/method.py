"""What is compared: a method is a name, its bits, and a transformers cache that behaves so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from skvq_ext.generation import full_cache, packed_cache
from skvq_ext.geometry import Geometry
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme


class Method(Protocol):
    """One way to keep keys and values, fitted to one model.

    name: as tables show it. bits: average stored bits per value of K and V behind the window, all
    metadata included. packed: whether those are bytes really allocated; False: simulated, dense rows
    that hold rounded values. protocol: window, sinks and what else differs, in words for a table.
    chunk: most tokens of one forward that read what single steps would read.
    """

    # Properties, so that frozen methods are methods too.
    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def packed(self) -> bool: ...
    @property
    def protocol(self) -> str: ...
    @property
    def chunk(self) -> int: ...

    def cache(self, model: Any) -> Any:
        """A new, empty transformers cache for `model`."""
        ...


@dataclass(frozen=True)
class FullPrecision:
    """The model's own dtype, nothing quantized: what all others are compared with."""

    bits: float = 32.0
    name: str = "full precision"
    packed: bool = False
    protocol: str = "every token exact"
    chunk: int = 512

    def cache(self, model: Any) -> Any:
        """A new, empty transformers cache for `model`."""
        return full_cache(model)


class Packed:
    """The packed cache of this library, with a plan or without."""

    packed = True

    def __init__(
        self,
        geometry: Geometry,
        scheme: Scheme,
        plan: Plan | None = None,
        name: str = "",
        exact: bool = False,
    ) -> None:
        """Args: plan, None = the default one; name, None = the scheme; exact, see `SkvqHFCache`."""
        from skvq_ext.perplexity import packed_chunk

        self.geometry, self.scheme, self.plan, self.exact = geometry, scheme, plan, exact
        self.name = name or f"{scheme}{'' if plan is None else ', calibrated'}"
        record = scheme.record_format
        self.bits = plan.bits_per_value if plan else record(geometry.head_dim).bits_per_value
        self.chunk = packed_chunk(scheme.rollback)
        self.protocol = f"window {scheme.window}, {scheme.sinks} sinks"

    def cache(self, model: Any) -> Any:
        """A new, empty transformers cache for `model`."""
        return packed_cache(model, self.scheme, self.plan, self.exact)
