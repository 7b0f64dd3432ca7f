"""bench/end_to_end.py and bench/overhead.py on a small model: every side decodes, and what is written is true."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hf_models import make_model, make_tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import end_to_end
import overhead
from hf_caches import PLAIN, Peer, cache_bytes, fill, fill_packed, prefill
from transformers import DynamicCache

SCHEME = "k2-v1.5-ghead-w16-sink2-fp8"
NOT_THERE = Peer("quanto", "no_such_module", "no-such-package", 4)


def test_every_side_has_a_row_and_what_is_missing_says_why() -> None:
    work = end_to_end.Workload(context=200, steps=3)
    model, ids = make_model("llama"), make_tokens(200)
    rows = end_to_end.measure(model, ids, [work], [SCHEME], peers=[NOT_THERE])
    plain, packed, missing = rows
    assert [row["side"] for row in rows] == [PLAIN, f"skvq {SCHEME}", NOT_THERE.name]
    assert missing["skipped"].endswith("not installed: pip install no-such-package")
    assert plain["tokens"] == packed["tokens"] == 3
    assert plain["cache_bytes"] == 2 * 2 * 200 * 2 * 64 * 4 > packed["cache_bytes"]
    assert plain["share_of_our_operators"] == 0 < packed["share_of_our_operators"] < 1
    assert {"skvq::append", "skvq::decode_attention"} <= packed["profile"].keys()
    (name,) = end_to_end.ratios(rows)
    assert name == f"{SCHEME}_200_vs_DynamicCache"
    end_to_end.show("a table", rows)


@torch.no_grad()
def test_a_filled_cache_is_a_prefilled_one() -> None:
    model, ids = make_model("llama"), make_tokens(151)
    rows = prefill(model, ids[:, :150], 64, lambda tokens: None)
    sides = [
        fill(PLAIN, DynamicCache(config=model.config), rows),
        fill_packed(model, SCHEME, rows, exact=True),
    ]
    for side in sides:
        model.set_attn_implementation(side.attention)
        found = model(ids[:, 150:], past_key_values=side.cache).logits
        fresh = type(side.cache)(**new_cache(model, side.attention))
        model(ids[:, :150], past_key_values=fresh)
        expected = model(ids[:, 150:], past_key_values=fresh).logits
        # Prefilled in chunks and at once: the order of sums, and the few codes that it turns.
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
        assert cache_bytes(side.cache) > 0


def new_cache(model, attention: str) -> dict[str, object]:
    """Arguments of an empty cache of the kind that goes with an attention implementation."""
    if attention == "sdpa":
        return {"config": model.config}
    return {"model_or_config": model, "scheme": SCHEME, "exact": True}


def test_operators_and_python_add_up_to_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "STEPS", 2)
    with torch.inference_mode():
        sides = overhead.measure(rounds=2)
    found = overhead.summary(sides)
    assert found["cache"] == pytest.approx(found["cache_operators"] + found["cache_python"])
    assert all(len(side.us) == 2 and min(side.us) > 0 for side in sides.values())
