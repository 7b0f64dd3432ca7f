"""Small models with something to calibrate on, and a search that takes a moment only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import VOCAB, make_model, make_tokens
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from skvq_ext.calibrate import calibrate, rotation, transforms
from skvq_ext.hf import SkvqHFCache
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

BUDGET = Scheme.parse("bits2.3-g64-w32-sink3")
PAIRS = [("2", "1.5"), ("3", "2")]
_FEW = ("hadamard", "centre-balance-hadamard", "balance-principal", "balance-learned")


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """One transform of each kind, and a few steps of descent."""
    few = {name: transforms.CANDIDATES[name] for name in _FEW}
    monkeypatch.setattr(transforms, "CANDIDATES", few)
    monkeypatch.setattr(rotation, "_STEPS", 6)


def make_lively(seed: int = 0) -> Any:
    """A Llama whose keys have a mean and channels of very different size, as in real models."""
    model = make_model("llama", seed, spread=0.15)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            sizes = (1.5 * torch.randn(2, 32, 1, generator=dice)).exp2().repeat(1, 2, 1)
            layer.self_attn.k_proj.weight *= sizes.reshape(128, 1)
            layer.self_attn.q_proj.weight /= sizes.repeat_interleave(2, 0).reshape(256, 1) / 2
    return model


def make_phi3() -> Any:
    """Its queries, keys and values come from one projection."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval()


def run(model: Any, scheme: Scheme = BUDGET, ids: Tensor | None = None, **options: Any) -> Plan:
    """A plan of the model, from 200 tokens read twice."""
    if scheme.bits is not None:
        options.setdefault("formats", PAIRS)
    options = {"progress": False, "max_tokens": 400} | options
    return calibrate(model, make_tokens(200)[0] if ids is None else ids, scheme, **options)


def divergence(model: Any, plan: Plan, seed: int = 2) -> float:
    """KL divergence in nats per token of what comes next on an unseen text, read from the cache."""
    ids = make_tokens(250, seed=seed)
    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        cache = SkvqHFCache(model, plan=plan, exact=True)
        parts = ids.split(plan.scheme.rollback + 1, 1)  # such chunks see what single steps see
        off = torch.cat([model(part, past_key_values=cache).logits[0] for part in parts])
    return float((exact.exp() * (exact - off.double().log_softmax(-1))).sum(-1).mean())
