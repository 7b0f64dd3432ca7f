"""The simulated cache: who sees what and when, against plain rows, the packed cache and its reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_models import KINDS, ReferenceCache, make_model, make_tokens
from torch import Tensor

from skvq_ext.baselines.cache import CHUNK, Rule, SimulatedCache
from skvq_ext.baselines.coding import BaselineError, Coded, Pair, PerToken
from skvq_ext.evaluate.method import FullPrecision, Packed
from skvq_ext.geometry import Geometry
from skvq_ext.hf import SkvqHFCache
from skvq_ext.plan import DEFAULT_EXPONENTS
from skvq_ext.scheme import Scheme

SCHEME = "k2-v2-g32-w20-sink3-fp8-identity"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Marker:
    """Replaces every row by its negative and writes down what it was asked."""

    def __init__(self) -> None:
        self.tiles: list[tuple[int, int, int]] = []  # layer, start, tokens
        self.queries: list[tuple[int, int, int, int]] = []  # layer, first, queries, kv_len

    def code(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Coded, Coded]:
        self.tiles.append((layer, start, k.shape[1]))
        return Coded(-k, 3.0 * k.numel()), Coded(-v, 1.0 * v.numel())

    def watch(self, layer: int, seen: Any) -> None:
        self.queries.append((layer, seen.first, seen.query.shape[1], seen.keys.shape[1]))


def rounding() -> Pair:
    """What the packed cache does without a plan and a transform."""
    return Pair(*(PerToken("2", 32, "fp8", DEFAULT_EXPONENTS[side]) for side in "kv"))


def feed(model: Any, ids: Tensor, cache: Any, cuts: list[int]) -> Tensor:
    """Logits of a text fed in pieces, [num_tokens, vocabulary]."""
    edges = [0, *cuts, ids.shape[1]]
    pieces = [ids[:, start:stop] for start, stop in pairwise(edges)]
    return torch.cat([model(piece, past_key_values=cache).logits[0] for piece in pieces])


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("cuts", [[], [70], [1, 2, 40, 104, 150, 151]], ids=str)
def test_each_token_is_replaced_once_and_the_rest_stays_exact(cuts: list[int], tile: int) -> None:
    model, ids, rule = make_model("llama"), make_tokens(300), Rule(window=20, sinks=3, tile=tile)
    plain = FullPrecision().cache(model)
    feed(model, ids, plain, [])
    marker = Marker()
    cache = SimulatedCache(model, rule, lambda: marker)
    feed(model, ids, cache, cuts)
    count = tile * ((300 - 20 - 3) // tile)
    for side in ("keys", "values"):  # of layer 0: what other layers are given depends on the cache
        rows, exact = (getattr(c.layers[0], side)[0] for c in (cache, plain))
        torch.testing.assert_close(rows[:, :3], exact[:, :3], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            rows[:, 3 : 3 + count], -exact[:, 3 : 3 + count], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(rows[:, 3 + count :], exact[:, 3 + count :], rtol=0, atol=1e-5)
    for layer in (0, 1):
        starts = [start for index, start, _ in marker.tiles if index == layer]
        assert starts == [3 + begin for begin in range(0, count, tile)]
    assert {tokens for _, _, tokens in marker.tiles} == {tile}
    assert cache.bits_per_value == 2.0
    watched = [
        first + row for layer, first, n, _ in marker.queries if layer == 1 for row in range(n)
    ]
    assert watched == list(range(300))


def test_queries_of_a_chunk_stand_on_both_sides_of_a_replacement() -> None:
    """By hand: 20 + 3 + 64 tokens are held when query 86 arrives; it is the first to see the tile."""
    model, ids, marker = make_model("llama"), make_tokens(110), Marker()
    cache = SimulatedCache(model, Rule(20, 3), lambda: marker)
    feed(model, ids, cache, [60])
    assert [(first, n) for layer, first, n, _ in marker.queries if layer == 0] == [
        (0, 60),
        (60, 26),
        (86, 24),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_single_steps_are_those_of_the_reference(kind: str) -> None:
    model, ids = make_model(kind, spread=0.15), make_tokens(120)
    model.set_attn_implementation("eager")
    steps = [70, *range(71, 120)]
    wanted = feed(model, ids, ReferenceCache(model, SCHEME), steps)
    found = feed(model, ids, SimulatedCache(model, Rule(20, 3), rounding), steps)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "chunk"), [("llama", 1), ("llama", 17), *((kind, CHUNK) for kind in KINDS)]
)
def test_chunks_read_what_the_packed_cache_reads(kind: str, chunk: int) -> None:
    model, ids = make_model(kind, spread=0.15), make_tokens(230)
    cuts = [50, *range(50 + chunk, 230, chunk)]
    scheme = Scheme.parse(SCHEME)
    packed = Packed(Geometry.from_config(model.config), scheme, exact=True)
    wanted = feed(model, ids, packed.cache(model), cuts)
    found = feed(model, ids, SimulatedCache(model, Rule(20, 3), rounding), cuts)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    exact = feed(model, ids, FullPrecision().cache(model), cuts)
    assert (found - exact).abs().max() > 0.02  # the comparison is not one of equals


def test_a_long_chunk_after_history_sees_its_own_tokens_as_they_are() -> None:
    model, ids = make_model("llama", spread=0.15), make_tokens(300)
    packed = SkvqHFCache(model, SCHEME, exact=True)
    wanted = feed(model, ids, packed, [100])
    found = feed(model, ids, SimulatedCache(model, Rule(20, 3), rounding), [100])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_other_caches_do_not_notice(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(90)
    model.set_attn_implementation("eager")
    wanted = feed(model, ids, FullPrecision().cache(model), [50])
    SimulatedCache(model, Rule(20, 3), rounding)
    torch.testing.assert_close(
        feed(model, ids, FullPrecision().cache(model), [50]), wanted, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(model(ids).logits[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generation_is_the_steps(kind: str) -> None:
    model, ids = make_model(kind, spread=0.15), make_tokens(100)
    cache = SimulatedCache(model, Rule(20, 3), rounding)
    written = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    logits = feed(
        model, written[:, :-1], SimulatedCache(model, Rule(20, 3), rounding), list(range(100, 129))
    )
    assert written[0, 100:].tolist() == logits[99:].argmax(-1).tolist()


def test_reset_forgets() -> None:
    model, ids, made = make_model("llama"), make_tokens(120), []

    def make() -> Marker:
        made.append(Marker())
        return made[-1]

    cache = SimulatedCache(model, Rule(20, 3), make)
    wanted = feed(model, ids, cache, [100])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.bits_per_value != cache.bits_per_value
    torch.testing.assert_close(feed(model, ids, cache, [100]), wanted)
    assert len(made) == 2 and made[0].tiles == made[1].tiles != []


def test_bfloat16_rows_keep_their_type() -> None:
    model, ids = make_model("llama").to(torch.bfloat16), make_tokens(120)
    cache = SimulatedCache(model, Rule(20, 3), rounding)
    assert feed(model, ids, cache, [100]).dtype == torch.bfloat16
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_wrong_use_is_refused() -> None:
    model, ids = make_model("llama"), make_tokens(20)
    cache = SimulatedCache(model, Rule(20, 3), rounding)
    with pytest.raises(BaselineError, match="a batch of 2"):
        model(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(BaselineError, match="a batch of 3"):
        model.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=2)
    hidden = torch.ones_like(ids)
    hidden[0, 0] = 0
    with pytest.raises(BaselineError, match="knows no padding"):
        model(ids, attention_mask=hidden, past_key_values=cache)
    model(ids, past_key_values=cache)
    for change in (
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(BaselineError):
            change()
    SkvqHFCache(model, SCHEME)  # takes the attention for itself
    with pytest.raises(BaselineError, match="attends with 'skvq'"):
        model(ids, past_key_values=cache)
    with pytest.raises(BaselineError, match="window must be 0 or more, got -1"):
        Rule(-1, 0)


def test_gradients_are_refused() -> None:
    model, ids = make_model("llama"), make_tokens(20)
    with torch.enable_grad(), pytest.raises(BaselineError, match="no gradients"):
        model(ids, past_key_values=SimulatedCache(model, Rule(20, 3), rounding))
