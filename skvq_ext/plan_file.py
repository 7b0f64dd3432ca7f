"""Plan files: safetensors with one JSON entry that says what they belong to. Never pickle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skvq_ext.geometry import Geometry
from skvq_ext.plan import (
    LayerPlan,
    Part,
    Plan,
    PlanError,
    SplitPlan,
    TensorPlan,
    TensorShape,
    check_tensor,
    parts_of,
)
from skvq_ext.scheme import Scheme

SCHEMA = 2
# A single metadata entry: safetensors writes several in no fixed order, and equal plans must give
# equal bytes.
_ENTRY = "skvq_plan"


def write_plan(plan: Plan, path: Path) -> None:
    """Writes the plan to `path`. Raises: PlanError where it is not usable."""
    _check_all(plan)
    header = {
        "schema": SCHEMA,
        "scheme": str(plan.scheme),
        "rope_mode": plan.rope_mode,
        "origin": plan.origin,
        "geometry": plan.geometry.as_dict(),
        "tokenizer": plan.tokenizer,
        "layers": [_describe(layer) for layer in plan.layers],
    }
    tensors = {
        # Copies, because layers of a default plan share tensors and safetensors refuses that.
        f"{where}.{side}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for where, side, tensor in plan.named_tensors()
        for name, value in tensor.tensors().items()
    }
    save_file(tensors, path, metadata={_ENTRY: json.dumps(header, sort_keys=True)})


def _describe(layer: LayerPlan | SplitPlan) -> dict[str, Any]:
    """What a header says of a layer: how it rotates, and of a split one its parts."""
    if isinstance(layer, LayerPlan):
        return {"rotations": [layer.k.rotation, layer.v.rotation]}
    return {
        "parts": [
            {"heads": part.heads, "formats": [part.k_format, part.v_format]} | _describe(part.plan)
            for part in layer.parts
        ]
    }


def read_plan(path: Path) -> Plan:
    """Reads and validates the plan in `path`. Raises: PlanError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no plan file at {path}; make one with 'skvq calibrate'.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise PlanError(f"{path} is not a safetensors file: {error}.") from None
    try:
        plan = _build(header, tensors)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path} is damaged: {error}.") from error
    if tensors:
        raise PlanError(f"{path} holds tensors no plan has: {sorted(tensors)[:4]}.")
    _check_all(plan)
    return plan


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise PlanError(f"{path} is a safetensors file but not a plan: it has no {_ENTRY!r} entry.")
    try:
        header = json.loads(metadata[_ENTRY])
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is damaged: its header is not JSON ({error}).") from None
    found = header.get("schema") if isinstance(header, dict) else None
    if found != SCHEMA:
        raise PlanError(
            f"{path} has plan schema {found}; this version reads schema {SCHEMA}. Calibrate again."
        )
    assert isinstance(header, dict)
    return header


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    """Takes its tensors out of `tensors`, so that what is left over can be refused."""
    geometry = Geometry.from_dict(header["geometry"])
    told = {name: header[name] for name in ("rope_mode", "origin", "tokenizer")}
    plan = Plan(Scheme.parse(header["scheme"]), geometry, [], **told)
    if plan.rope_mode != "post":
        raise PlanError(
            f"the plan is for keys cached in rope mode {plan.rope_mode!r}; this version caches "
            "keys after RoPE ('post'). Calibrate again."
        )
    if len(header["layers"]) != geometry.num_layers:
        raise PlanError(
            f"the plan has {len(header['layers'])} layers for a model of {geometry.num_layers}."
        )
    for index, entry in enumerate(header["layers"]):
        where = f"layers.{index:03d}"
        if plan.scheme.bits is None:
            plan.layers.append(_layer(entry["rotations"], plan.shapes, where, tensors))
        else:
            plan.layers.append(_split(entry["parts"], plan, where, tensors))
    return plan


def _split(
    entries: list[dict[str, Any]], plan: Plan, where: str, tensors: dict[str, Tensor]
) -> SplitPlan:
    parts = []
    for number, entry in enumerate(entries):
        k, v = entry["formats"]
        scheme = replace(plan.scheme, k=k, v=v, bits=None)
        layer = _layer(entry["rotations"], plan.shapes_of(scheme), f"{where}.{number}", tensors)
        parts.append(Part(tuple(entry["heads"]), k, v, layer))
    return SplitPlan(tuple(parts))


def _layer(
    rotations: list[str], shapes: dict[str, TensorShape], where: str, tensors: dict[str, Tensor]
) -> LayerPlan:
    k, v = (
        TensorPlan(
            rotation=rotation,
            dense=tensors.pop(f"{where}.{side}.dense", None),
            band_edges=shapes[side].band_edges,
            **{
                part: tensors.pop(f"{where}.{side}.{part}")
                for part in ("permutation", "shift", "scale", "clip", "exponents")
            },
        )
        for side, rotation in zip(("k", "v"), rotations, strict=True)
    )
    return LayerPlan(k, v)


def _check_all(plan: Plan) -> None:
    num_kv_heads = plan.geometry.num_kv_heads
    for index, layer in enumerate(plan.layers):
        split = isinstance(layer, SplitPlan)
        if split != (plan.scheme.bits is not None):
            raise PlanError(
                f"layer {index} has formats {'per head' if split else 'of the scheme'}, which the "
                f"scheme {plan.scheme} does not leave to it. Calibrate again."
            )
        held = sum(len(part.heads) for part in parts_of(layer, plan.scheme, num_kv_heads))
        if held != num_kv_heads:
            raise PlanError(
                f"layer {index}: its parts hold {held} heads, the model has {num_kv_heads}. "
                "Calibrate again."
            )
    for where, part in plan.named_parts():
        shapes = plan.shapes_of(part.scheme(plan.scheme))
        for side in ("k", "v"):
            check_tensor(f"{where} {side}", getattr(part.plan, side), len(part.heads), shapes[side])
