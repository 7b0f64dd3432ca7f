"""The published method as a transformers cache: what it reads, what it holds, what it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from hf_models import make_model, make_tokens
from test_published_rope import makers
from torch import Tensor

from skvq_ext.evaluate.method import FullPrecision
from skvq_ext.evaluate.subject import opened
from skvq_ext.perplexity import score
from skvq_ext.published import Published
from skvq_ext.published.packing import LEVELS
from skvq_ext.published.plan import PublishedPlan
from skvq_ext.published.quantizer import fake_quantize
from skvq_ext.published.statistics import FitError
from skvq_ext.reference import packed_len
from skvq_ext.rope import Rope

SCHEME = "k2-v1.5-g16-w32-reorder-pre_rope-clip0.8-sink5-fp8"
SINKS, WINDOW, HEADS, DIM = 5, 32, 2, 64


@cache
def fitted(kind: str, scheme: str = SCHEME) -> tuple[Any, Published]:
    model = makers()[kind]() if kind in ("phi", "phi3", "smollm3") else make_model(kind)
    return model, Published.fit(model, make_tokens(200, seed=9), scheme)


class Rows(hf.cache_utils.DynamicLayer):
    """Plain rows; what is behind the window is rounded, group by group, at every read."""

    def __init__(self, plan: PublishedPlan, rope: Rope | None, index: int) -> None:
        super().__init__()
        self.plan, self.rope, self.index = plan, rope, index

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """One token sees the cache as it then is; the first forward sees itself as it is."""
        first = self.get_seq_length() == 0
        k, v = super().update(keys, values)
        end = (
            0 if first else packed_len(k.shape[2], self.plan.scheme.sinks, self.plan.scheme.window)
        )
        place = slice(self.plan.scheme.sinks, self.plan.scheme.sinks + end)
        return self._read(k, 0, place), self._read(v, 1, place)

    def _read(self, x: Tensor, side: int, place: slice) -> Tensor:
        scheme, grouping = self.plan.scheme, self.plan.layers[self.index][side]
        out, part = x.clone(), x[0, :, place]
        if part.shape[1] == 0:
            return out
        positions = torch.arange(place.start, place.stop)
        rotates = side == 0 and self.rope is not None
        if rotates:
            part = self.rope.unrotate(part, positions, self.index)
        flat = part.transpose(0, 1).reshape(part.shape[1], -1).clone()
        edges, levels = grouping.edges.tolist(), LEVELS[(scheme.k, scheme.v)[side]]
        for group, clip in enumerate(grouping.clip.tolist()):
            channels = grouping.permutation.long()[edges[group] : edges[group + 1]]
            flat[:, channels] = fake_quantize(flat[:, channels], clip, levels, scheme.meta)
        part = flat.view(part.shape[1], part.shape[0], -1).transpose(0, 1)
        out[0, :, place] = self.rope.rotate(part, positions, self.index) if rotates else part
        return out


def reference(model: Any, method: Published) -> hf.Cache:
    rope = Rope.of(model) if method.plan.scheme.pre_rope else None
    layers = [Rows(method.plan, rope, index) for index in range(len(method.plan.layers))]
    windows = method.plan.geometry.sliding_windows
    for layer, window in zip(layers, windows, strict=True):
        layer.is_sliding = window > 0
    return hf.Cache(layers=layers)


@torch.inference_mode()
def feed(model: Any, cache: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits [num_tokens, vocab] of a text fed in forwards of these sizes."""
    outs, first = [], 0
    for size in cuts:
        part = ids[:, first : first + size]
        outs.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[0])
        first += size
    assert first == ids.shape[1]
    return torch.cat(outs)


def run(model: Any, method: Published, ids: Tensor, cuts: list[int]) -> tuple[Tensor, Any]:
    with opened(model, method) as cache:
        return feed(model, cache, ids, cuts), cache


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "mistral", "phi", "phi3", "smollm3"]
)
def test_single_steps_read_what_the_formula_gives(kind: str) -> None:
    model, method = fitted(kind)
    ids, cuts = make_tokens(190), [150] + [1] * 40
    model.set_attn_implementation("eager")
    expected = feed(model, reference(model, method), ids, cuts)
    exact = feed(model, FullPrecision().cache(model), ids, cuts)
    found, _ = run(model, method, ids, cuts)
    torch.testing.assert_close(found[:150], exact[:150], rtol=0, atol=2e-4)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found[150:] - exact[150:]).abs().max() > 0.02, "what is packed must show"


@pytest.mark.parametrize("scheme", [SCHEME, "k4-v3-g32-w32-sink5", "k3-v2-g32-w0-reorder-fp8"])
def test_chunks_read_what_single_steps_read(scheme: str) -> None:
    model, method = fitted("llama", scheme)
    ids = make_tokens(330)
    single, one_by_one = run(model, method, ids, [1] * 330)
    # 64 and less, so that tiles are packed in the middle, at the start and at the end of chunks.
    largest = method.chunk
    assert largest == (63 if "w0" in scheme else 64)
    for cuts in (
        [largest] + [64] * 4 + [74 - largest],
        [37, 1, 64, 31, 64, 33, 60, 40],
        [1, 36, 64, 64, 64, 64, 37],
    ):
        found, chunked = run(model, method, ids, cuts)
        torch.testing.assert_close(found, single, rtol=0, atol=2e-3)
        for ours, theirs in zip(chunked.layers, one_by_one.layers, strict=True):
            for part in ("codes", "scales and zeros"):
                a, b = (torch.cat([t.flatten() for t in x.tensors()[part]]) for x in (ours, theirs))
                different = (a.view(torch.uint8) != b.view(torch.uint8)).float().mean()
                assert a.shape == b.shape and different < 0.02  # keys differ by rounding


def test_bytes_do_not_depend_on_how_rows_arrive() -> None:
    """Equal rows, any cuts: equal bytes, and bytes of old tokens never change."""
    model, method = fitted("llama")
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(1, HEADS, 400, DIM, generator=generator) for _ in range(2))

    def fill(cuts: list[int]) -> list[Tensor]:
        layer, first = method.cache(model).layers[0], 0
        old: list[Tensor] = []
        for size in cuts:
            part = slice(first, first + size)
            keys, values = layer.update(k[:, :, part], v[:, :, part])
            layer.attend(keys, values, lambda rows, k, v: v[:, :, rows].transpose(1, 2))
            now = layer.codes["k"] + layer.codes["v"]
            assert all(any(x is y for y in now) for x in old)
            old, first = now, first + size
        return [
            torch.cat(x).view(torch.uint8) for x in (*layer.codes.values(), *layer.metas.values())
        ]

    cuts = [[400], [1] * 400, [5, 32, 63, 1, 64, 64, 71, 100], [300] + [1] * 100]
    first, *others = [fill(c) for c in cuts]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len(first[0]) == packed_len(400, SINKS, WINDOW) == 320


def test_the_window_and_the_sinks_stay_as_they_came() -> None:
    model, method = fitted("llama")
    for length in (1, 5, 36, 37, 100, 101, 170):
        _, cache = run(model, method, make_tokens(length), [1] * length)
        layer = cache.layers[1]
        exact = feed_keys(model, length)
        packed = packed_len(length, SINKS, WINDOW)
        for name, rows in exact.items():
            assert layer.sinks[name].shape[1] == min(SINKS, length)
            assert layer.recent[name].shape[1] == max(0, length - SINKS - packed)
            if packed == 0:  # else keys of later layers have seen rounded ones
                torch.testing.assert_close(layer.recent[name], rows[:, SINKS:], rtol=0, atol=1e-4)
        assert layer.get_seq_length() == length


def feed_keys(model: Any, length: int) -> dict[str, Tensor]:
    plain = FullPrecision().cache(model)
    feed(model, plain, make_tokens(length), [length])
    return {"k": plain.layers[1].keys[0], "v": plain.layers[1].values[0]}


def test_memory_is_what_was_stated() -> None:
    model, method = fitted("llama")
    length = 1500
    _, cache = run(model, method, make_tokens(length), [length])
    memory, packed = cache.memory(), packed_len(length, SINKS, WINDOW)
    stored = memory["codes"] + memory["scales and zeros"]
    assert stored * 8 / (2 * 2 * packed * HEADS * DIM) == pytest.approx(method.bits)
    # Ternary is 5 to a byte; groups of uneven size end in the middle of one.
    assert (2 + 1.6) / 2 + 1 <= method.bits < 1.2 * ((2 + 1.6) / 2 + 1)
    row = 2 * 2 * HEADS * DIM * 4
    assert memory["sinks"] == SINKS * row and memory["full_precision"] == length * row
    assert memory["window"] == (length - SINKS - packed) * row, "no view keeps the prompt alive"
    assert memory["permutations"] == 2 * 2 * HEADS * DIM * 2
    parts = [value for name, value in memory.items() if name not in ("total", "full_precision")]
    assert memory["total"] == sum(parts)
    cache.reset()
    assert cache.memory()["codes"] == 0 and cache.get_seq_length() == 0


def test_no_dense_rows_are_left_behind_after_a_forward() -> None:
    model, method = fitted("llama")
    _, cache = run(model, method, make_tokens(600), [598, 1, 1])
    layer = cache.layers[0]
    known = {id(t) for tensors in layer.tensors().values() for t in tensors}
    held = [t for t in vars(layer).values() if isinstance(t, Tensor)]
    held += [t for d in vars(layer).values() if isinstance(d, dict) for t in d.values()]
    dense = [t for t in held if isinstance(t, Tensor) and id(t) not in known]
    assert dense == [] and layer.keys is None and layer.values is None


def test_a_text_is_scored_and_continued() -> None:
    model, method = fitted("llama")
    ids = make_tokens(300)
    losses = []
    for chunk in (1, method.chunk):
        with opened(model, method) as cache:
            losses.append(score(model, ids, cache, 0, chunk).losses)
    torch.testing.assert_close(*losses, rtol=0, atol=2e-3)
    with opened(model, method) as cache, torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=70,
            do_sample=False,
        )
    assert written.shape == (1, 370) and cache.layers[0].packed == packed_len(369, SINKS, WINDOW)


def test_a_long_chunk_after_history_sees_itself_as_it_is() -> None:
    model, method = fitted("llama")
    ids = make_tokens(420)
    found, cache = run(model, method, ids, [200, 220])
    rope = Rope.of(model)

    class Late(Rows):
        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            seen = self.get_seq_length()
            k, v = hf.cache_utils.DynamicLayer.update(self, keys, values)
            end = packed_len(seen, SINKS, WINDOW)
            place = slice(SINKS, SINKS + end)
            return self._read(k, 0, place), self._read(v, 1, place)

    late = hf.Cache(layers=[Late(method.plan, rope, index) for index in range(2)])
    model.set_attn_implementation("eager")
    expected = feed(model, late, ids, [200, 220])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert cache.layers[0].packed == packed_len(420, SINKS, WINDOW)


def test_half_precision_models() -> None:
    model = make_model("llama").bfloat16()
    method = Published.fit(model, make_tokens(200, seed=9), SCHEME)
    found, cache = run(model, method, make_tokens(190), [150] + [1] * 40)
    assert found.isfinite().all() and cache.layers[0].recent["k"].dtype == torch.bfloat16
    exact = feed(model, FullPrecision().cache(model), make_tokens(190), [150] + [1] * 40)
    assert (found - exact).abs().max() < 0.5 * exact.abs().max()


def test_what_the_cache_cannot_hold_is_refused() -> None:
    model, method = fitted("llama")
    ids = make_tokens(20, batch_size=2)
    with (
        opened(model, method) as cache,
        pytest.raises(ValueError, match=r"a batch of 2: .* one by"),
    ):
        feed(model, cache, ids, [20])
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, :3] = 0
    with opened(model, method) as cache, pytest.raises(ValueError, match="without padding"):
        model(input_ids=ids[:1], attention_mask=mask, past_key_values=cache)
    cache = method.cache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attends with 'sdpa', which cannot read this cache"):
        feed(model, cache, ids[:1], [20])
    with opened(model, method) as cache, pytest.raises(RuntimeError, match="no gradients flow"):
        model(input_ids=ids[:1], past_key_values=cache)
    for asked in ("crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        with pytest.raises(NotImplementedError):
            getattr(cache.layers[0], asked)(-1)
    with pytest.raises(NotImplementedError):
        cache.layers[0].offload()
    with pytest.raises(FitError, match=r"fitted to another model: .*model_type: 'qwen3' here"):
        method.cache(make_model("qwen3"))


def test_text_does_not_grow_over_a_switch_of_frequencies() -> None:
    model, method = fitted("phi3")
    _, cache = run(model, method, make_tokens(300), [300])  # at once it may be longer
    assert cache.get_seq_length() == 300
    with pytest.raises(ValueError, match="grows over 256 tokens, where this model changes"):
        run(model, method, make_tokens(300), [250, 5, 45])


def test_without_a_cache_the_model_attends_as_usual() -> None:
    model, method = fitted("gemma2")
    ids = make_tokens(60)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        usual = model(input_ids=ids).logits
        method.cache(model)
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, usual, rtol=0, atol=1e-4)
