"""The published SKVQ as a method to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from skvq_ext.format import TILE_TOKENS
from skvq_ext.geometry import Geometry
from skvq_ext.published.cache import CHUNK, PublishedCache
from skvq_ext.published.clip import search_layer
from skvq_ext.published.plan import PublishedPlan
from skvq_ext.published.quantizer import Grouping
from skvq_ext.published.reorder import ReorderError, cluster, neighbours
from skvq_ext.published.reorder_file import read_reorder_file
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.published.statistics import LayerStatistics, collect
from skvq_ext.report import Step, no_steps
from skvq_ext.rope import Rope


class Published:
    """SKVQ as published, really packed (see `skvq_ext.evaluate.method`)."""

    packed = True

    def __init__(self, plan: PublishedPlan, name: str = "") -> None:
        """Args: a fitted plan; name, "" = made of the scheme."""
        self.plan = plan
        self.name = name or f"SKVQ as published, {plan.scheme}"
        self.bits = plan.bits_per_value
        # The first forward sees itself as it is; single steps do so until a tile is packed.
        self.chunk = min(CHUNK, plan.scheme.sinks + plan.scheme.window + TILE_TOKENS - 1)
        keys = "before" if plan.scheme.pre_rope else "after"
        self.protocol = (
            f"window {plan.scheme.window}, {plan.scheme.sinks} sinks, {TILE_TOKENS} tokens at a "
            f"time; keys {keys} RoPE"
        )

    @classmethod
    def fit(
        cls,
        model: Any,
        token_ids: Tensor,
        scheme: str | PublishedScheme,
        seed: int = 0,
        reorder_file: str | Path | None = None,
        step: Step = no_steps,
    ) -> Published:
        """Fits groups and clip ratios to a model on a text.

        Args: model, a transformers decoder; token_ids int64 [n] or [1, n], read in forwards of 2048
        tokens; scheme, see `PublishedScheme.parse`; seed of K-Means; reorder_file, groups made by
        the original's calibration.py instead of K-Means here; step, see `skvq_ext.report`.
        Returns: the method; equal arguments give equal groups and ratios.
        Raises: PublishedSchemeError, ReorderError, FitError, RopeError, GeometryError.
        """
        if isinstance(scheme, str):
            scheme = PublishedScheme.parse(scheme)
        geometry = Geometry.from_config(model.config)
        rope = Rope.of(model) if scheme.pre_rope else None
        found = collect(model, token_ids, scheme, rope)
        layers = _groupings(found, scheme, geometry, seed, reorder_file)
        for index, layer in enumerate(found):
            layers[index] = _clipped(layer, layers[index], scheme, rope, index, geometry)
            layer.samples.clear()
            step("fitting SKVQ as published", index + 1, len(layers))
        return cls(PublishedPlan(scheme, geometry, layers, rope))

    def cache(self, model: Any) -> PublishedCache:
        """A new, empty transformers cache for `model`."""
        return PublishedCache(model, self.plan)


def _groupings(
    found: list[LayerStatistics],
    scheme: PublishedScheme,
    geometry: Geometry,
    seed: int,
    reorder_file: str | Path | None,
) -> list[tuple[Grouping, Grouping]]:
    channels = geometry.num_kv_heads * geometry.head_dim
    if reorder_file is not None:
        if not scheme.reorder:
            raise ReorderError(
                f"a reorder file was given, but {str(scheme)!r} does not reorder. Add 'reorder'."
            )
        return read_reorder_file(reorder_file, geometry.num_layers, channels)
    if not scheme.reorder:
        same = neighbours(channels, scheme.group)
        return [(same, same)] * len(found)

    def of(layer: LayerStatistics, name: str) -> Grouping:
        return cluster(layer.low[name], layer.high[name], scheme.group, seed)

    return [(of(layer, "k"), of(layer, "v")) for layer in found]


def _clipped(
    layer: LayerStatistics,
    groupings: tuple[Grouping, Grouping],
    scheme: PublishedScheme,
    rope: Rope | None,
    index: int,
    geometry: Geometry,
) -> tuple[Grouping, Grouping]:
    if scheme.clip is None:
        windows = geometry.sliding_windows
        sliding_window = 0 if windows is None else windows[index]
        return search_layer(layer, groupings, scheme, rope, index, sliding_window)
    k, v = (g.with_clip(g.clip * scheme.clip) for g in groupings)
    return k, v
