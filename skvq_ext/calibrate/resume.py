"""Finished layers of a calibration, kept until the plan is complete, so that it can go on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from skvq_ext import __version__
from skvq_ext.calibrate.objective import Error
from skvq_ext.calibrate.search import Option, Shapes
from skvq_ext.geometry import Geometry
from skvq_ext.plan import TensorPlan
from skvq_ext.scheme import Scheme

_ENTRY = "skvq_layer"
_SAMPLED = 512  # values of a parameter that tell it from others
_PARTS = ("permutation", "shift", "scale", "dense", "clip", "exponents")
Head = dict[str, dict[str, Option]]


def fingerprint(
    model: Any,
    geometry: Geometry,
    scheme: Scheme,
    segments: Tensor,
    pairs: Sequence[tuple[str, str]],
    seed: int,
) -> str:
    """What must agree for kept layers to be of use: everything that decides them.

    How many bits may be spent decides nothing before all layers are searched. Weights are told
    apart by a sample of every parameter.
    """
    searched = str(scheme if scheme.bits is None else replace(scheme, bits=9.0))
    known = [__version__, geometry.as_dict(), searched, list(pairs), seed]
    found = sha256(json.dumps(known, sort_keys=True).encode())
    found.update(segments.numpy().tobytes())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // _SAMPLED)].float().cpu()
        found.update(f"{name} {parameter.dtype}".encode() + values.numpy().tobytes())
    return f"search-{found.hexdigest()[:16]}"


class Progress:
    """A directory with one file per finished layer; without a directory nothing is kept."""

    def __init__(self, directory: Path | None, mark: str) -> None:
        """Args: mark, see `fingerprint`; layers of another mark are thrown away."""
        self._directory = None
        if directory is not None:
            self._directory = directory / mark
            self._directory.mkdir(parents=True, exist_ok=True)
            for other in _searches(directory):
                if other != self._directory:
                    shutil.rmtree(other)

    def fisher(self, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The matrices of all layers, made where they are not kept."""
        path = self._path("fisher")
        held = None if path is None else _read(path)
        if held is not None:
            return [held[f"{index:03d}"] for index in range(len(held))]
        made = make()
        if path is not None:
            _write(path, {f"{i:03d}": x.contiguous() for i, x in enumerate(made)}, {})
        return made

    def layer(self, index: int, shapes: Shapes) -> list[Head] | None:
        """The heads of a finished layer, None where it is not."""
        path = self._path(f"layer{index:03d}")
        tensors = None if path is None else _read(path)
        if path is None or tensors is None:
            return None
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_ENTRY])
        return [
            {
                side: {
                    code: _option(entry[side][code], shape, tensors, f"{n}.{side}.{code}")
                    for code, shape in shapes[side].items()
                }
                for side in shapes
            }
            for n, entry in enumerate(header)
        ]

    def keep(self, index: int, heads: list[Head]) -> None:
        """Writes a finished layer."""
        path = self._path(f"layer{index:03d}")
        if path is None:
            return
        header: list[dict[str, dict[str, Any]]] = []
        tensors: dict[str, Tensor] = {}
        for n, head in enumerate(heads):
            header.append({})
            for side, options in head.items():
                header[n][side] = {}
                for code, option in options.items():
                    header[n][side][code] = {
                        "name": option.name,
                        "rotation": option.tensor.rotation,
                        "error": asdict(option.error),
                    }
                    for part, value in option.tensor.tensors().items():
                        tensors[f"{n}.{side}.{code}.{part}"] = value.contiguous().clone()
        _write(path, tensors, {_ENTRY: json.dumps(header, sort_keys=True)})

    def _path(self, name: str) -> Path | None:
        return None if self._directory is None else self._directory / f"{name}.safetensors"


def forget(directory: Path) -> None:
    """Removes finished layers once the plan they went into is written; other files stay."""
    for search in _searches(directory):
        shutil.rmtree(search)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _searches(directory: Path) -> list[Path]:
    """What searches left behind, and nothing else that lies there."""
    return [x for x in directory.glob("search-*") if re.fullmatch(r"search-[0-9a-f]{16}", x.name)]


def _option(entry: dict[str, Any], shape: Any, tensors: dict[str, Tensor], where: str) -> Option:
    parts = {part: tensors.get(f"{where}.{part}") for part in _PARTS}
    tensor = TensorPlan(rotation=entry["rotation"], band_edges=shape.band_edges, **parts)  # type: ignore[arg-type]
    return Option(entry["name"], tensor, Error(**entry["error"]))


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a kept file; None where there is none, or it was cut off."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        path.unlink()
        return None


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Complete or absent, never half."""
    partial = path.with_suffix(".partial")
    save_file({name: x.detach().cpu() for name, x in tensors.items()}, partial, metadata=metadata)
    partial.rename(path)
