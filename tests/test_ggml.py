"""llama.cpp's attention as bench/ggml.py calls it: the libraries, where they are installed, against float64."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import ggml  # noqa: E402
from cpu_peer_backends import llama_kind  # noqa: E402
from cpu_problem import CpuProblem, Data  # noqa: E402
from peer_cases import attention, relative, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def _needs_llama() -> None:
    """Skips a test where llama.cpp is not there, with the reason that the benchmark gives."""
    try:
        ggml.load()
    except ImportError as error:
        pytest.skip(f"{ggml.PACKAGE}: {error}")


def as_stored(x: Tensor, kind: str) -> Tensor:
    """Numbers after a round trip through a type of ggml, by the gguf package."""
    if kind == "f16":
        return x.half().double()
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType(ggml.TYPES[kind])
    return torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), number), number)).double()


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("kind", list(ggml.TYPES))
@pytest.mark.parametrize(("batch", "context", "threads"), [(2, 96, 1), (1, 640, 1), (1, 640, 2)])
def test_ggml_is_attention(
    kind: str, by_head: bool, batch: int, context: int, threads: int
) -> None:
    """Over numbers as they are stored: K and V in their type, queries in the one that products of K take."""
    p = CpuProblem(batch, context, 8, 2, "bf16", 64)
    data = Data(p)
    cache = ggml.Attention(batch, context, 8, 2, 64, kind=kind, by_head=by_head)
    cache.set_queries(data.queries)
    k, v = tokens(p)
    for start, stop in ((0, 50), (50, context)):
        cache.fill(start, k[:, start:stop], v[:, start:stop])
    stored = [as_stored(x, kind) for x in (k, v)]
    wanted = attention(as_stored(data.queries, "f16" if kind == "f16" else "q8_0"), *stored)
    # f16: sums of V in half precision, `context` roundings each of at most 2**-11 of a partial sum that is no larger
    # than the result in the mean square; the others sum in float32
    limit = math.sqrt(context) * 2**-11 if kind == "f16" else 1e-4
    assert relative(cache.attend(threads), wanted) < limit
    copied = cache.copy()
    del cache
    assert relative(copied.attend(threads), wanted) < limit
    assert llama_kind(p, kind, by_head).moved == 2 * copied.tensor_bytes + 2 * p.question_bytes()


def test_ggml_refuses_what_its_asserts_would_end() -> None:
    with pytest.raises(ValueError, match="q4_0 has blocks of 32 values, which do not divide 80"):
        ggml.Attention(1, 64, 4, 2, 80, kind="q4_0")
    with pytest.raises(ValueError, match="3 KV heads do not divide 4 query heads"):
        ggml.Attention(1, 64, 4, 3, 64, kind="f16")
    cache = ggml.Attention(1, 64, 4, 2, 64, kind="f16")
    x = torch.zeros(1, 32, 2, 64)
    with pytest.raises(ValueError, match="40 \\+ 32 tokens do not fit into 64"):
        cache.fill(40, x, x)
    with pytest.raises(ValueError, match="do not fit"):
        cache.fill(0, x[..., :32], x[..., :32])
