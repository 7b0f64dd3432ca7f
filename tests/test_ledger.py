"""The ledger says what the allocator hands out, and the headline figure holds."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig

from skvq_ext.cache import SkvqCache
from skvq_ext.geometry import Geometry, GeometryError
from skvq_ext.ledger import GEOMETRIES, Ledger, find_geometry
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

HEADLINE = Scheme.parse("k2-v1.5-g128-w128-sink5-fp8")


def test_a_million_tokens_of_a_7b_model() -> None:
    ledger = Ledger(GEOMETRIES["llama-2-7b"], HEADLINE)
    assert ledger.record_bytes == 3968
    assert ledger.bytes_per_token == 63_488
    assert ledger.full_bytes_per_token == 524_288
    row = ledger.at(1_000_000)
    assert row.full_precision == 524_288_000_000
    assert row.total == pytest.approx(63.5e9, rel=5e-3)
    assert row.ratio == pytest.approx(8.25, abs=0.05)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("k2-v2-g128", 2.125), ("k2-v1.5-g128", 1.9375), ("k4-v4-g128", 4.125), ("k3-v3-g128", 3.125)],
)
def test_bits_per_value(scheme: str, bits: float) -> None:
    assert Ledger(GEOMETRIES["llama-3-8b"], Scheme.parse(scheme)).bits_per_value == bits


def test_overhead_at_32k_is_small() -> None:
    """Window, ring, tables and plan on top of the packed bytes of 32k tokens."""
    row = Ledger(GEOMETRIES["llama-2-7b"], HEADLINE).at(32_768)
    assert row.pages <= 63_488 * 32_768
    assert row.plan + row.page_table + row.lengths <= 0.02 * row.pages


@pytest.mark.parametrize("scheme", ["k2-v1.5-g128", "k3:1/2+2-v4-g32-w64-sink0-fp16-rollback0"])
@pytest.mark.parametrize("context", [1, 69, 1000, 4096])
@pytest.mark.parametrize("windows", [(0, 0, 0), (512, 0, 512)])
def test_ledger_is_the_allocator(scheme: str, context: int, windows: tuple[int, ...]) -> None:
    geometry = Geometry(3, 6, 2, 64, sliding_windows=windows)
    parsed = Scheme.parse(scheme)
    cache = SkvqCache(
        geometry.num_layers,
        geometry.num_q_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        scheme=parsed,
        dtype=torch.bfloat16,
        max_len=context,
        sliding_window=windows,
    )
    row, found = asdict(Ledger(geometry, parsed).at(context)), cache.memory()
    for part in ("pages", "page_table", "sinks", "ring", "lengths"):
        assert row[part] == found[part], part
    assert row["total"] == row["plan"] + sum(
        row[part] for part in ("pages", "page_table", "sinks", "ring", "lengths")
    )


def test_plan_is_counted_with_all_that_calibration_uses() -> None:
    geometry = Geometry(3, 6, 2, 64)
    scheme = Scheme.parse("k3:1/2+2-v1.5-g32")
    heads, dim, groups = 2, 64, 2 + 2
    tables = 2 * heads * dim * 12 + heads * dim * 4  # shift, scale and 1 / scale; K is permuted
    small = 2 * groups * 4 + 2 * 4 * 4  # clip and exponents
    hadamard = 2 * dim * dim * 4  # one for K's bands, one for V's
    assert Ledger(geometry, scheme).at(1000).plan == hadamard + 3 * (tables + small)


def test_sliding_layers_stop_growing() -> None:
    ledger = Ledger(GEOMETRIES["gemma-3-1b"], HEADLINE)
    assert ledger.full_bytes_per_token == 4 * 2 * 256 * 2  # 4 of 26 layers see everything
    near, far = ledger.at(100_000), ledger.at(100_000 + 6400)
    assert far.pages - near.pages == 6400 * ledger.bytes_per_token
    assert far.full_precision - near.full_precision == 6400 * ledger.full_bytes_per_token


def test_short_contexts_have_no_pages() -> None:
    row = Ledger(GEOMETRIES["smollm2-135m"], HEADLINE).at(128)
    assert row.pages == 0 and row.sinks + row.ring > 0


def test_dtype_counts_for_full_precision_rows_only() -> None:
    half = Ledger(GEOMETRIES["smollm2-135m"], HEADLINE).at(4096)
    full = Ledger(GEOMETRIES["smollm2-135m"], HEADLINE, torch.float32).at(4096)
    assert full.full_precision == 2 * half.full_precision
    assert full.ring == 2 * half.ring and full.pages == half.pages


def test_explicit_transforms_do_not_matter() -> None:
    scheme = replace(HEADLINE, transform=frozenset({"centre", "balance"}), clip=0.9)
    geometry = GEOMETRIES["smollm2-135m"]
    assert Ledger(geometry, scheme).at(4096) == Ledger(geometry, HEADLINE).at(4096)


def test_find_geometry(tmp_path: Path) -> None:
    assert find_geometry("Llama-2-7B") == Geometry(32, 32, 32, 128)
    assert find_geometry("smollm2") == GEOMETRIES["smollm2-135m"]
    config = Gemma3TextConfig(sliding_window=512)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for source in (tmp_path, tmp_path / "config.json"):
        assert find_geometry(str(source)) == Geometry.from_config(config)


def test_every_named_geometry_has_a_ledger() -> None:
    for name, geometry in GEOMETRIES.items():
        assert Ledger(geometry, HEADLINE).at(8192).ratio > 1, name
        Plan.default(geometry, HEADLINE)


def test_unknown_geometries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=r"no geometry 'llama-9b'.*one of llama-2-7b"):
        find_geometry("llama-9b")
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(GeometryError, match="is not a model configuration in JSON"):
        find_geometry(str(path))
    path.write_text("[]")
    with pytest.raises(GeometryError, match="it holds no JSON object"):
        find_geometry(str(path))
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        Ledger(GEOMETRIES["llama-2-7b"], HEADLINE).at(0)
