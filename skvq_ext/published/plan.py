"""What fitting found: the groups and clip ratios of every layer of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skvq_ext.geometry import Geometry
from skvq_ext.published.quantizer import Grouping, Quantizer
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.published.statistics import FitError
from skvq_ext.rope import Rope


@dataclass(frozen=True)
class PublishedPlan:
    """How the published method stores K and V of one model; layers: groupings of (K, V).

    rope: how its keys are rotated, None where they are quantized as they come.
    """

    scheme: PublishedScheme
    geometry: Geometry
    layers: list[tuple[Grouping, Grouping]]
    rope: Rope | None = field(repr=False, default=None)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value over K and V of all layers: bytes of a row of packed codes, scales
        and zeros, as they are allocated. Permutations do not grow with the text."""
        total = 0
        for groupings in self.layers:
            for bits, grouping in zip((self.scheme.k, self.scheme.v), groupings, strict=True):
                total += Quantizer(
                    grouping, bits, self.scheme.meta, self.scheme.round_first
                ).row_bytes
        geometry = self.geometry
        values = 2 * len(self.layers) * geometry.num_kv_heads * geometry.head_dim
        return total * 8 / values

    def check_fits(self, model: Any) -> None:
        """Raises: FitError where the plan was fitted to another model."""
        different = Geometry.from_config(model.config).differences(self.geometry)
        if different:
            raise FitError(
                "the method was fitted to another model: "
                + "; ".join(different)
                + ". Fit it again."
            )
