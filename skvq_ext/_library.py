"""Loads the compiled operator library, once."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def _path() -> Path:
    """_C.so beside this file, or what SKVQ_LIBRARY names: another build of it, for tests."""
    asked = os.environ.get("SKVQ_LIBRARY")
    if asked:
        path = Path(asked).resolve()
        if not path.is_file():
            raise ImportError(
                f"skvq_ext: SKVQ_LIBRARY={asked} is not a file. Name a built operator library, or "
                "unset the variable to load the one of this package."
            )
        return path
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        raise ImportError(
            f"skvq_ext: the compiled library {path.name} is not in {path.parent}. Python probably "
            "imports the source folder instead of an installed package: run "
            "`pip install --no-build-isolation -e .` in the project root."
        )
    return path


torch.ops.load_library(str(_path()))
