"""Loads the compiled operator library, once."""

from __future__ import annotations

from pathlib import Path

import torch

_PATH = Path(__file__).with_name("_C.so")

if not _PATH.exists():
    raise ImportError(
        f"skvq_ext: the compiled library {_PATH.name} is not in {_PATH.parent}. Python probably imports the source "
        "folder instead of an installed package: run `pip install --no-build-isolation -e .` in the project root."
    )
torch.ops.load_library(str(_PATH))
