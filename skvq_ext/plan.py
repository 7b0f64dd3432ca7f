"""The plan: what the door of each layer does, kept in a safetensors file.

Per KV head a tensor enters the cache as y = R · diag(1/s) · P · (x − m): the shift m is in the
model's channel order, the scale s in permuted order, R is orthogonal.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from skvq_ext import ops
from skvq_ext.format import RecordFormat
from skvq_ext.geometry import Geometry
from skvq_ext.scheme import Scheme

__all__ = [
    "Geometry",
    "LayerPlan",
    "Part",
    "Plan",
    "PlanError",
    "SplitPlan",
    "TensorPlan",
    "TensorShape",
]

ROTATIONS = ("none", "hadamard", "dense")
MAX_CLIPS = 8  # ratios of one group
DEFAULT_EXPONENTS = {"k": (-2, 0), "v": (-5, -4)}  # of scale and zero

# Half the range, in standard deviations, of the best uniform quantizer of a normal variable whose
# outermost levels are its end points, by number of levels (J. Max 1960, table II).
_NORMAL_HALF_RANGE = {3: 1.224, 4: 1.494, 8: 2.051, 16: 2.514}


class PlanError(ValueError):
    """A plan that is damaged or belongs to another model or scheme."""


@dataclass(frozen=True)
class TensorShape:
    """Channels of K or of V as the record format cuts them: edges are (0, ..., head_dim)."""

    head_dim: int
    band_edges: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    codes: tuple[str, ...]  # of each group
    levels: tuple[int, ...]  # of each group

    @classmethod
    def of(cls, record: RecordFormat, name: str) -> TensorShape:
        """The shape of tensor `name` ("k" or "v") in this record format."""
        bands = record.k_bands if name == "k" else record.v_bands
        groups = record.k_groups if name == "k" else record.v_groups
        codes = record.codes(name)
        levels = {code["name"]: int(code["levels"]) for code in ops.format_table()["codes"]}
        edges = (0, *(stop for _, stop in bands))
        return cls(record.head_dim, edges, groups, codes, tuple(levels[code] for code in codes))


@dataclass
class TensorPlan:
    """The transform of K or of V in one layer.

    permutation: i32 [H, D], channel j inside the cache is the model's channel permutation[h, j].
    shift: f32 [H, D]. scale: f32 [H, D], permuted order, positive. rotation: one of ROTATIONS,
    "hadamard" is one block per band. dense: f32 [H, D, D], orthogonal, for "dense" only.
    clip: f32 [H, groups] in (0, 1], or [H, groups, choices], up to 8 ratios of which every token
    takes the one that errs least when it is packed. exponents: i32 [H, 2], of scale and zero.
    """

    permutation: Tensor
    shift: Tensor
    scale: Tensor
    rotation: str
    dense: Tensor | None
    clip: Tensor
    exponents: Tensor
    band_edges: tuple[int, ...]

    @classmethod
    def neutral(
        cls, num_kv_heads: int, shape: TensorShape, exponents: tuple[int, int]
    ) -> TensorPlan:
        """The transform that changes nothing and clips nothing."""
        size = (num_kv_heads, shape.head_dim)
        return cls(
            permutation=torch.arange(shape.head_dim, dtype=torch.int32).repeat(num_kv_heads, 1),
            shift=torch.zeros(size),
            scale=torch.ones(size),
            rotation="none",
            dense=None,
            clip=torch.ones(num_kv_heads, len(shape.groups)),
            exponents=torch.tensor([exponents], dtype=torch.int32).repeat(num_kv_heads, 1),
            band_edges=shape.band_edges,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a plan file holds of this tensor, by name."""
        parts = {
            "permutation": self.permutation,
            "shift": self.shift,
            "scale": self.scale,
            "clip": self.clip,
            "exponents": self.exponents,
        }
        return parts if self.dense is None else parts | {"dense": self.dense}


@dataclass
class LayerPlan:
    """The transforms of one layer, or of those of its heads that share their formats."""

    k: TensorPlan
    v: TensorPlan


@dataclass(frozen=True)
class Part:
    """Heads of one layer with formats of their own; plan holds these heads only, in this order."""

    heads: tuple[int, ...]
    k_format: str
    v_format: str
    plan: LayerPlan

    def scheme(self, whole: Scheme) -> Scheme:
        """The scheme of these heads in a cache of scheme `whole`."""
        return replace(whole, k=self.k_format, v=self.v_format, bits=None)


@dataclass(frozen=True)
class SplitPlan:
    """The transforms of one layer whose heads are stored in several formats.

    Raises: PlanError where the parts do not hold each head once.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        heads = sorted(head for part in self.parts for head in part.heads)
        if not heads or heads != list(range(len(heads))):
            raise PlanError(f"the parts of a layer hold heads {heads}, not each head once.")


@dataclass
class Plan:
    """Transforms of all layers of one model, for one pair of tensor formats or, where the scheme
    has a budget of bits, with formats per head.

    scheme names the transform that was used; origin says in words where the numbers come from.
    tokenizer: fingerprint of the one whose tokens it was calibrated on, "" = not known. shapes: of
    "k" and "v" where all heads have the same.
    """

    scheme: Scheme
    geometry: Geometry
    layers: list[LayerPlan | SplitPlan]
    rope_mode: str = "post"
    origin: str = ""
    tokenizer: str = ""
    shapes: dict[str, TensorShape] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        mixed = self.scheme.bits is not None
        self.shapes = {} if mixed else self.shapes_of(self.scheme)

    def shapes_of(self, scheme: Scheme) -> dict[str, TensorShape]:
        """Shapes of "k" and "v" of this model in one pair of formats."""
        record = scheme.record_format(self.geometry.head_dim)
        return {name: TensorShape.of(record, name) for name in ("k", "v")}

    @property
    def bits_per_value(self) -> float:
        """Average stored bits per value over all layers, heads, K and V, scales and zeros included."""
        dim, heads = self.geometry.head_dim, self.geometry.num_kv_heads
        if self.scheme.bits is None:
            return self.scheme.record_format(dim).bits_per_value
        spent = [
            part.scheme(self.scheme).record_format(dim).bits_per_value * len(part.heads)
            for layer in self.layers
            for part in parts_of(layer, self.scheme, heads)
        ]
        return sum(spent) / (heads * len(self.layers))

    @classmethod
    def default(cls, geometry: Geometry, scheme: Scheme, key_scales: Tensor | None = None) -> Plan:
        """The plan that needs no calibration: Hadamard and a fixed clip, or what the scheme names.

        Args: key_scales f32 [num_layers, head_dim], divisors of key channels that weights tell (see
        `skvq_ext.hf.norms`); they apply where the scheme names no transform.
        Raises: PlanError where the scheme names a transform that only calibration can give.
        """
        calibrated = (scheme.transform or frozenset()) & {"centre", "balance"}
        if scheme.bits is not None:
            raise PlanError(
                f"the scheme {str(scheme)!r} leaves the formats of every head to a plan, and there "
                "is none. Run 'skvq calibrate' and pass its plan, or name formats ('k2-v1.5')."
            )
        if calibrated:
            raise PlanError(
                f"the scheme {str(scheme)!r} asks for {' and '.join(sorted(calibrated))}, which "
                "only calibration can give, and there is no plan. Run 'skvq calibrate' and pass "
                "its plan, or drop these keys."
            )
        if scheme.transform is None:
            scheme = replace(scheme, transform=frozenset({"hadamard"}))
        else:
            key_scales = None
        plan = cls(scheme, geometry, [], origin="default, not calibrated")
        layer = LayerPlan(*(plan._default_tensor(name) for name in ("k", "v")))
        if key_scales is None:
            plan.layers.extend([layer] * geometry.num_layers)
            return plan
        for scale in key_scales.cpu():
            k = replace(layer.k, scale=scale.float().expand_as(layer.k.scale).contiguous())
            plan.layers.append(LayerPlan(k, layer.v))
        return plan

    def _default_tensor(self, name: str) -> TensorPlan:
        shape = self.shapes[name]
        tensor = TensorPlan.neutral(self.geometry.num_kv_heads, shape, DEFAULT_EXPONENTS[name])
        if "hadamard" in (self.scheme.transform or ()):
            tensor.rotation = "hadamard"
        ratios = [
            default_clip(levels, stop - start) if self.scheme.clip is None else self.scheme.clip
            for (start, stop), levels in zip(shape.groups, shape.levels, strict=True)
        ]
        tensor.clip = torch.tensor([ratios]).repeat(self.geometry.num_kv_heads, 1)
        return tensor

    def named_parts(self) -> Iterator[tuple[str, Part]]:
        """All parts with the beginning of their tensors' names in a plan file."""
        for index, layer in enumerate(self.layers):
            parts = parts_of(layer, self.scheme, self.geometry.num_kv_heads)
            for number, part in enumerate(parts):
                split = f".{number}" if isinstance(layer, SplitPlan) else ""
                yield f"layers.{index:03d}{split}", part

    def named_tensors(self) -> Iterator[tuple[str, str, TensorPlan]]:
        """All tensors as (beginning of their names, "k" or "v", plan)."""
        for where, part in self.named_parts():
            yield where, "k", part.plan.k
            yield where, "v", part.plan.v

    def check(
        self,
        geometry: Geometry | None = None,
        scheme: Scheme | None = None,
        tokenizer: str = "",
    ) -> None:
        """Raises PlanError, naming every field, where this plan does not fit model or scheme."""
        lines = geometry.differences(self.geometry) if geometry else []
        lines += scheme.differences(self.scheme) if scheme else []
        if tokenizer and self.tokenizer and tokenizer != self.tokenizer:
            lines.append(f"tokenizer: {tokenizer} here, {self.tokenizer} in the plan")
        if lines:
            raise PlanError(
                "the plan does not fit:\n  " + "\n  ".join(lines) + "\nUse the plan of this model "
                "and scheme, or make one with 'skvq calibrate'."
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; equal plans give equal bytes."""
        from skvq_ext.plan_file import write_plan

        write_plan(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        geometry: Geometry | None = None,
        scheme: Scheme | None = None,
        tokenizer: str = "",
    ) -> Plan:
        """Reads a plan file and checks it against model, scheme and tokenizer it is meant for.

        Raises: PlanError for a file that is no plan, is damaged, or does not fit.
        """
        from skvq_ext.plan_file import read_plan

        plan = read_plan(Path(path))
        plan.check(geometry, scheme, tokenizer)
        return plan


def parts_of(layer: LayerPlan | SplitPlan, scheme: Scheme, num_kv_heads: int) -> tuple[Part, ...]:
    """The parts of a layer; one of all heads where they share the scheme's formats."""
    if isinstance(layer, SplitPlan):
        return layer.parts
    return (Part(tuple(range(num_kv_heads)), scheme.k, scheme.v, layer),)


def default_clip(levels: int, channels: int) -> float:
    """The clip ratio for a group of rotated, hence nearly normal, channels.

    The best half range for this many levels, over the expected maximum of `channels` normal
    variables (Blom 1958). Never closer to 1 than half a level: a range that is missed by a quarter
    of a step on each side costs nothing, and the steps get finer.
    """
    if levels not in _NORMAL_HALF_RANGE or channels < 2:
        return 1.0
    extreme = statistics.NormalDist().inv_cdf((channels - 0.375) / (channels + 0.25))
    return min(1 - 0.5 / (levels - 1), _NORMAL_HALF_RANGE[levels] / extreme)


def check_tensor(name: str, tensor: TensorPlan, num_kv_heads: int, shape: TensorShape) -> None:
    """Raises PlanError where a tensor's plan is not a usable transform."""
    dim = shape.head_dim
    expected = {
        "permutation": ((num_kv_heads, dim), torch.int32),
        "shift": ((num_kv_heads, dim), torch.float32),
        "scale": ((num_kv_heads, dim), torch.float32),
        "clip": ((num_kv_heads, len(shape.groups)), torch.float32),
        "exponents": ((num_kv_heads, 2), torch.int32),
        "dense": ((num_kv_heads, dim, dim), torch.float32),
    }
    if tensor.clip.dim() == 3 and 1 <= tensor.clip.shape[2] <= MAX_CLIPS:
        expected["clip"] = ((num_kv_heads, len(shape.groups), tensor.clip.shape[2]), torch.float32)
    for part, value in tensor.tensors().items():
        size, dtype = expected[part]
        if tuple(value.shape) != size or value.dtype != dtype:
            raise PlanError(
                f"{name}.{part} is {value.dtype} {list(value.shape)}; the model and scheme need "
                f"{dtype} {list(size)}. The plan is damaged or of another version."
            )
        if not torch.isfinite(value).all():
            raise PlanError(f"{name}.{part} holds NaN or infinity; calibrate again.")
    order = torch.arange(dim, dtype=torch.int32).expand(num_kv_heads, dim)
    identity = torch.eye(dim)
    dense = tensor.dense
    for holds, what in (
        (torch.equal(tensor.permutation.sort(-1).values, order), "permutation is not one"),
        (bool((tensor.scale > 0).all()), "scale is not positive"),
        (bool(((tensor.clip > 0) & (tensor.clip <= 1)).all()), "clip is outside (0, 1]"),
        (bool((tensor.exponents.abs() <= 100).all()), "exponents are outside -100 .. 100"),
        (tensor.rotation in ROTATIONS, f"rotation {tensor.rotation!r} is not one of {ROTATIONS}"),
        ((tensor.rotation == "dense") == (dense is not None), "rotation and 'dense' disagree"),
        (tuple(pairwise(tensor.band_edges)) == tuple(pairwise(shape.band_edges)), "bands differ"),
        (
            dense is None or torch.allclose(dense @ dense.mT, identity, atol=1e-4),
            "dense rotation is not orthogonal",
        ),
    ):
        if not holds:
            raise PlanError(f"{name}: {what}. The plan is damaged; calibrate again.")
