"""Generation from the packed cache in transformers, held against plain rows and single runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_models import KINDS, ReferenceCache, make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache

from skvq_ext.hf import SkvqHFCache, enable

PACKED = "k2-v1.5-ghead-w16-sink2-fp8"
# Of logits with a standard deviation near 0.7. Sums in another order make a few of the codes round
# the other way; one tile read packed that should not be, or not read so, gives 0.1 and more.
CLOSE = {"atol": 2e-3, "rtol": 0.0}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def exact_cache(model: Any, scheme: str = PACKED) -> SkvqHFCache:
    """Read in fp32, so that the order of sums is all that may differ from one way to the next: where
    queries are rounded for integer products, a sum in another order makes some round the other way."""
    return SkvqHFCache(model, scheme, exact=True)


def generate(model: Any, ids: Tensor, cache: Any, new: int = 70, **options: Any) -> Any:
    """Greedy generation with logits; sequences and logits [batch, new, vocab]."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    if out.logits is not None:
        out.logits = torch.stack(out.logits, dim=1)
    return out


def steps(model: Any, ids: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    """Logits of ids fed in forwards of these sizes, [batch, columns, vocab]."""
    parts = ids.split(sizes, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def assert_same_generation(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)


def test_the_reference_cache_packs_something() -> None:
    """Otherwise the comparisons below would show nothing."""
    model, ids = eager(make_model("llama")), make_tokens(200)
    full = model(ids[:, :199], past_key_values=(cache := DynamicCache(config=model.config)))
    full = model(ids[:, 199:], past_key_values=cache).logits
    reference = ReferenceCache(model, PACKED)
    model(ids[:, :199], past_key_values=reference)
    assert (model(ids[:, 199:], past_key_values=reference).logits - full).abs().max() > 0.1


@each_kind
def test_packed_generation_is_what_the_reference_says(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(150)
    expected = generate(eager(model), ids, ReferenceCache(model, PACKED))
    cache = exact_cache(model)
    assert_same_generation(generate(model, ids, cache), expected)
    assert cache.lengths == [cache.get_seq_length()] == [219]


@each_kind
def test_while_nothing_is_packed_it_is_full_precision(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(150)
    expected = generate(eager(model), ids, DynamicCache(config=model.config))
    found = generate(model, ids, exact_cache(model, "k2-v1.5-ghead-w200"))
    assert_same_generation(found, expected)


@each_kind
def test_eight_bits_are_close_to_full_precision(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(210)
    sizes = [150] + [1] * 60
    expected = steps(eager(model), ids, DynamicCache(config=model.config), sizes)
    cache = exact_cache(model, "k8-v8-g32-w16-sink2-fp16")
    found = steps(model, ids, cache, sizes)
    assert (found - expected).abs().max() < 0.03 * expected.std()
    top = expected.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.06 * expected.std()
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@each_kind
def test_integer_products_add_less_than_a_tenth_of_what_the_codes_cost(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(400)
    sizes = [150] + [1] * 250
    full, exact, integer = (
        steps(enable(model), ids, cache, sizes)[0, 150:]
        for cache in (
            DynamicCache(config=model.config),
            exact_cache(model),
            SkvqHFCache(model, PACKED),
        )
    )
    # Of the tokens' errors the median: a mixture of experts may send a token elsewhere.
    added, codes = (x.square().mean(-1).sqrt().median() for x in (integer - exact, exact - full))
    assert added < codes / 10


def pad_left(prompts: list[Tensor]) -> dict[str, Tensor]:
    longest = max(p.shape[1] for p in prompts)
    pads = [longest - p.shape[1] for p in prompts]
    rows = [torch.nn.functional.pad(p, (n, 0)) for p, n in zip(prompts, pads, strict=True)]
    mask = [torch.arange(longest)[None] >= n for n in pads]
    return {"ids": torch.cat(rows), "attention_mask": torch.cat(mask).long()}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 90}], ids=["whole", "chunks"])
def test_a_left_padded_batch_equals_single_runs(kind: str, options: dict[str, int]) -> None:
    model = make_model(kind)
    prompts = [make_tokens(n, seed=n) for n in (150, 31, 99)]
    cache = exact_cache(model)
    batch = generate(model, **pad_left(prompts), cache=cache, **options)
    assert cache.get_seq_length() == 219 and cache.lengths == [219, 100, 168]
    for b, prompt in enumerate(prompts):
        single_cache = exact_cache(model)
        if options:  # where chunks end decides what is read packed
            short = 150 - prompt.shape[1]
            sizes = [n for n in (90 - short, min(60, prompt.shape[1])) if n > 0]
            logits = steps(model, prompt, single_cache, sizes)[:, -1]
            torch.testing.assert_close(batch.logits[b, :1], logits, **CLOSE)
            continue
        single = generate(model, prompt, single_cache)
        assert torch.equal(batch.sequences[b, 150:], single.sequences[0, prompt.shape[1] :])
        torch.testing.assert_close(batch.logits[b], single.logits[0], **CLOSE)
        assert single_cache.lengths == [cache.lengths[b]]


def test_a_second_padded_turn_equals_single_runs() -> None:
    """Padding in the middle: turns of different lengths in one running batch."""
    model = make_model("llama")
    turns = [[make_tokens(n, seed=n) for n in sizes] for sizes in [(120, 60), (9, 33), (100, 20)]]
    cache = exact_cache(model)
    singles = [exact_cache(model) for _ in range(2)]
    mask = torch.ones(2, 0, dtype=torch.long)
    for turn in turns:
        padded = pad_left(turn)
        mask = torch.cat([mask, padded["attention_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -padded["ids"].shape[1] :]
        found = model(
            padded["ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
        for b, (own, single) in enumerate(zip(turn, singles, strict=True)):
            expected = model(own, past_key_values=single).logits[0]
            torch.testing.assert_close(found[b, -own.shape[1] :], expected, **CLOSE)
    assert cache.lengths == [229, 113]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_beam_search_equals_the_reference(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(150, batch_size=2)
    options = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "new": 40}
    expected = generate(eager(model), ids, ReferenceCache(model, PACKED), **options)
    cache = exact_cache(model)
    found = generate(model, ids, cache, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **CLOSE)
    assert cache.batch_size == 8


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_generation_equals_greedy(kind: str, how: str) -> None:
    model, ids = make_model(kind), make_tokens(12).repeat(1, 3)
    greedy = generate(model, ids, exact_cache(model), new=140)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 8, "eos_token_id": 1000}  # never
    if how == "assistant":
        assistant = copy.deepcopy(model)
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.01)
        options = {"assistant_model": assistant}
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    cache = exact_cache(model)
    found = generate(model, ids, cache, new=140, **options)
    # Early 5.x releases may write a few tokens more than they were asked for.
    assert torch.equal(found.sequences[:, : 36 + 140], greedy.sequences)
    assert len(calls) < 140, "no draft was ever taken"
    assert cache.lengths == [found.sequences.shape[1] - 1]


@each_kind
def test_a_short_chunk_equals_single_steps(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(280)
    single = steps(model, ids, exact_cache(model), [150] + [1] * 130)
    chunks = steps(model, ids, exact_cache(model), [150, 65, 64, 1])
    torch.testing.assert_close(chunks, single, **CLOSE)


@each_kind
def test_a_long_chunk_sees_itself_exactly_and_what_came_before_packed(kind: str) -> None:
    model, ids = make_model(kind), make_tokens(420)
    sizes = [130, 120, 170]
    expected = steps(eager(model), ids, ReferenceCache(model, PACKED), sizes)
    found = steps(enable(model), ids, exact_cache(model), sizes)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_generation_goes_on_where_it_stopped() -> None:
    model, ids = make_model("llama"), make_tokens(150)
    expected = generate(model, ids, exact_cache(model), new=60)
    cache = exact_cache(model)
    first = generate(model, ids, cache, new=30)
    second = generate(model, first.sequences, cache, new=30)
    assert torch.equal(second.sequences, expected.sequences)


def test_crop_reset_and_copies() -> None:
    model, ids = make_model("gemma3"), make_tokens(300)
    sizes = [150] + [1] * 100
    straight = exact_cache(model)
    expected = steps(model, ids[:, :250], straight, sizes)
    cache = exact_cache(model)
    steps(model, ids[:, :230], cache, sizes[:81])
    steps(model, make_tokens(50, seed=5), cache, [50])
    cache.crop(-50)
    cache.crop(0)
    assert cache.get_seq_length() == 230 and cache.lengths == [230]
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        found = steps(model, ids[:, 230:250], one, [1] * 20)
        torch.testing.assert_close(found, expected[:, 230:], **CLOSE)
    cache.crop(230)  # as older releases of transformers count
    assert cache.lengths == [230] and twin.lengths == [250]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory()["total"] == 0
    both = steps(model, ids[:, :160].repeat(2, 1), cache, sizes[:11])
    torch.testing.assert_close(both[1], expected[0, :160], **CLOSE)
    cache.crop(-160)
    assert cache.get_seq_length() == 0


def test_sequences_can_be_selected_and_repeated() -> None:
    model = make_model("mistral")
    ids, more = make_tokens(200, batch_size=3), make_tokens(90, batch_size=3, seed=9)
    order = [2, 0, 0, 1, 1]
    cache = exact_cache(model)
    model(ids, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 2, 3, 4, 5, 5]))
    cache.batch_select_indices(torch.tensor([0, 1, 2, 3, 4]))
    assert cache.batch_size == 5
    found = steps(model, more[order], cache, [30] * 3)
    for b, sequence in enumerate(order):
        single = exact_cache(model)
        model(ids[sequence : sequence + 1], past_key_values=single)
        expected = steps(model, more[sequence : sequence + 1], single, [30] * 3)
        torch.testing.assert_close(found[b], expected[0], **CLOSE)
