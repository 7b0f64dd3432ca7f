"""Settings shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch
from devices import NAMES, Device, get_device

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=NAMES)
def device(request: pytest.FixtureRequest) -> Device:
    """Every device whose kernels a test should run."""
    return get_device(request.param)
