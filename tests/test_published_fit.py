"""Groups, reorder files and clip ratios of the published method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hf_models import make_model, make_tokens

from skvq_ext.published import Published
from skvq_ext.published.clip import RATIOS, search_layer
from skvq_ext.published.packing import LEVELS
from skvq_ext.published.quantizer import fake_quantize
from skvq_ext.published.reorder import ReorderError, cluster, neighbours
from skvq_ext.published.reorder_file import read_reorder_file
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.published.statistics import FitError, LayerStatistics, Sample, collect
from skvq_ext.rope import Rope, RopeError

SCHEME = "k2-v2-g16-w32-reorder-pre_rope-clip-sink5-fp8"
LAYERS, CHANNELS = 2, 128


def ranges(*sizes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shuffled channels of clearly different ranges: smallest, largest, kind of each."""
    kinds = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0))]
    jitter = 0.01 * torch.rand(2, len(kinds), generator=torch.Generator().manual_seed(1))
    return -(10.0**kinds) - jitter[0], 3 * 10.0**kinds + jitter[1], kinds


def test_channels_of_like_range_form_groups_however_uneven() -> None:
    low, high, kinds = ranges(40, 7, 1)
    found = cluster(low, high, 16, seed=0)
    assert found.permutation.dtype == found.edges.dtype == torch.int16
    parts = found.permutation.long().split(found.edges.long().diff().tolist())
    assert sorted(len(part) for part in parts) == [1, 7, 40]
    for part in parts:
        assert len(kinds[part].unique()) == 1
        assert (part.diff() > 0).all(), "stable: channels of a group stay in order"


def test_the_same_seed_gives_the_same_groups() -> None:
    generator = torch.Generator().manual_seed(2)
    low, high = -torch.rand(256, generator=generator), torch.rand(256, generator=generator)
    first, again = cluster(low, high, 16, seed=3), cluster(low, high, 16, seed=3)
    assert torch.equal(first.permutation, again.permutation)
    assert torch.equal(first.edges, again.edges)
    assert len(first.edges) == 256 // 16 + 1 and first.edges[-1] == 256


def test_dead_channels_make_fewer_groups() -> None:
    low, high = torch.zeros(64), torch.zeros(64)
    low[3] = -1.0
    found = cluster(low, high, 8, seed=0)
    assert sorted(found.edges.long().diff().tolist()) == [1, 63]


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ReorderError, match="g48 does not divide the 64 channels"):
        neighbours(64, 48)
    with pytest.raises(ReorderError, match="g65 is more than the 64 channels"):
        cluster(torch.zeros(64), torch.ones(64), 65, seed=0)
    with pytest.raises(ReorderError, match=r"40000 channels .* int16, up to 32767"):
        neighbours(40000, 100)


def reorder_content(layers: int = LAYERS, channels: int = CHANNELS) -> dict[str, Any]:
    """As calibration.py of the original writes it; K and V have edges of their own."""
    generator = torch.Generator().manual_seed(4)

    def order() -> torch.Tensor:
        return torch.randperm(channels, generator=generator)

    edges = torch.tensor([0, 5, 100, channels]), torch.tensor([0, 64, 65, channels])
    return {
        "reorder_indices": [(order(), order()) for _ in range(layers)],
        "cluster_st_inds": [edges for _ in range(layers)],
    }


def test_a_reorder_file_of_the_original_is_read(tmp_path: Path) -> None:
    content = reorder_content()
    torch.save(content, tmp_path / "rod.pt")
    found = read_reorder_file(tmp_path / "rod.pt", LAYERS, CHANNELS)
    for layer, pair in enumerate(found):
        for side, grouping in enumerate(pair):
            order = content["reorder_indices"][layer][side]
            assert torch.equal(grouping.permutation.long(), order)
            assert torch.equal(grouping.edges.long(), content["cluster_st_inds"][layer][side])
            assert torch.equal(grouping.clip, torch.ones(3))


def broken(name: str) -> Any:
    content = reorder_content()
    k, v = content["reorder_indices"][1]
    edges_k, edges_v = content["cluster_st_inds"][1]
    if name == "statistics":
        return {"min": {}, "max": {}}
    if name == "list":
        return [1, 2]
    if name == "layers":
        return reorder_content(layers=3)
    if name == "model":
        return reorder_content(channels=256)
    if name == "twice":
        content["reorder_indices"][1] = (k.clone().fill_(3), v)
    if name == "edges":
        content["cluster_st_inds"][1] = (edges_k, torch.tensor([0, 70, 65, CHANNELS]))
    if name == "short":
        content["cluster_st_inds"][1] = (edges_k[:-1], edges_v)
    if name == "floats":
        content["reorder_indices"][1] = (k.float(), v)
    if name == "lonely":
        content["reorder_indices"][1] = (k,)
    return content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("statistics", r"holds 'reorder_indices' and 'cluster_st_inds', this one \['max', 'min'\]"),
        ("list", "this one <class 'list'>"),
        ("layers", "'reorder_indices' has 3 layers, the model has 2 layers"),
        ("model", "layer 0, K: 256 channels, the model has 128"),
        ("twice", r"layer 1, K: 'reorder_indices' is not a permutation of 0 \.\. 127"),
        ("edges", "layer 1, V: 'cluster_st_inds' must rise from 0 to 128"),
        ("short", "layer 1, K: 'cluster_st_inds' must rise from 0 to 128"),
        ("floats", r"layer 1, K: reorder_indices is torch.float32 \[128\], not a vector"),
        ("lonely", "layer 1, K: reorder_indices is not a pair of tensors"),
    ],
)
def test_reorder_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, message: str) -> None:
    torch.save(broken(name), tmp_path / "rod.pt")
    with pytest.raises(ReorderError, match=message):
        read_reorder_file(tmp_path / "rod.pt", LAYERS, CHANNELS)


class Trap:
    """What a malicious file would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("trapped"),))


def test_files_that_are_none_and_files_with_code(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReorderError, match="no reorder file at"):
        read_reorder_file("nowhere.pt", LAYERS, CHANNELS)
    Path("noise.pt").write_bytes(b"no zip, no pickle")
    with pytest.raises(ReorderError, match=r"noise\.pt is not a reorder file"):
        read_reorder_file("noise.pt", LAYERS, CHANNELS)
    torch.save(reorder_content() | {"more": Trap()}, "trap.pt")
    with pytest.raises(ReorderError, match=r"trap\.pt is not a reorder file .* more than tensors"):
        read_reorder_file("trap.pt", LAYERS, CHANNELS)
    assert not Path("trapped").exists()


def test_ranges_are_those_of_keys_before_rope_over_all_tokens() -> None:
    model, ids = make_model("qwen3"), make_tokens(300)
    seen: list[torch.Tensor] = []
    norm = model.model.layers[1].self_attn.k_norm
    hook = norm.register_forward_hook(lambda module, args, out: seen.append(out.detach()[0]))
    try:
        rope = Rope.of(model)
        seen.clear()
        found = collect(model, ids, PublishedScheme.parse("k2-v2-g16-w32-pre_rope"), rope)[1]
    finally:
        hook.remove()
    keys = torch.cat(seen).flatten(1)
    torch.testing.assert_close(found.low["k"], keys.amin(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.high["k"], keys.amax(0), rtol=0, atol=1e-4)
    assert found.samples == []  # nothing is searched


def layer_of(one_sided: bool = False) -> tuple[LayerStatistics, PublishedScheme]:
    """Two KV heads of 16 channels, four query heads, two stretches of text."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layer = LayerStatistics(output=normal(24, 64), scale=0.25)
    for _ in range(2):
        k, v = normal(160, 32), normal(160, 32)
        if one_sided:
            for x in (k, v):
                x[:, :8] = 5 + 2 * torch.rand(160, 8, generator=generator)
        queries = 2 * normal(4, 14, 16)
        layer.samples.append(Sample(k, v, queries, torch.arange(90, 160, 5)))
    scheme = PublishedScheme("2", "1.5", 8, window=16, sinks=3, meta="fp8", clip=None)
    return layer, scheme


def output_error(
    layer: LayerStatistics, scheme: PublishedScheme, clip: torch.Tensor, side: str
) -> float:
    """Squared error of the module's output, one query at a time in float64."""
    total = 0.0
    for sample in layer.samples:
        rows = {"k": sample.k, "v": sample.v}
        bits = scheme.k if side == "k" else scheme.v
        packed = torch.cat(
            [
                fake_quantize(part, ratio, LEVELS[bits], "fp8")
                for part, ratio in zip(rows[side].split(8, 1), clip, strict=True)
            ],
            dim=1,
        )
        for place, position in enumerate(sample.at.tolist()):
            outs = []
            for read in (rows, rows | {side: packed}):
                k, v = (x[: position + 1].double().clone() for x in (read["k"], read["v"]))
                exact = torch.arange(position + 1)
                exact = (exact < scheme.sinks) | (position - exact < scheme.window)
                k[exact], v[exact] = (
                    sample.k[: position + 1][exact].double(),
                    sample.v[: position + 1][exact].double(),
                )
                heads = []
                for head in range(4):
                    part = slice(16 * (head // 2), 16 * (head // 2) + 16)
                    query = sample.queries[head, place].double() * layer.scale
                    heads.append(torch.softmax(k[:, part] @ query, 0) @ v[:, part])
                outs.append(layer.output.double() @ torch.cat(heads))
            total += float((outs[1] - outs[0]).square().sum())
    return total


def found_clips(layer: LayerStatistics, scheme: PublishedScheme) -> dict[str, torch.Tensor]:
    same = neighbours(32, 8)
    k, v = search_layer(layer, (same, same), scheme, None, 0, 0)
    return {"k": k.clip, "v": v.clip}


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_clip_search_lowers_the_error_of_the_output(one_sided: bool) -> None:
    layer, scheme = layer_of(one_sided)
    for side, clip in found_clips(layer, scheme).items():
        assert set(clip.tolist()) <= {float(np.float32(ratio)) for ratio in RATIOS}
        found = output_error(layer, scheme, clip, side)
        single = [
            output_error(layer, scheme, torch.full((4,), ratio), side) for ratio in RATIOS[::2]
        ]
        assert found <= min(single) * (1 + 1e-5)
        assert found < 0.95 * single[0], "no clip is a candidate and can be beaten"
        # Nothing is left to gain by one step of one group.
        for group in range(4):
            for step in (0.04, -0.04):
                other = clip.clone()
                other[group] = (other[group] + step).clamp(RATIOS[-1], 1.0)
                assert found <= output_error(layer, scheme, other, side) * (1 + 1e-5)


def test_one_sided_groups_of_v_are_hardly_clipped() -> None:
    """About zero, a clip moves all of them; of K a shift of all tokens would not matter."""
    layer, scheme = layer_of(one_sided=True)
    clip = found_clips(layer, scheme)["v"]
    assert float(clip[0]) > 0.95


def test_where_nothing_is_packed_nothing_is_clipped() -> None:
    layer, scheme = layer_of()
    same = neighbours(32, 8)
    k, v = search_layer(layer, (same, same), scheme, None, 0, sliding_window=16)
    assert torch.equal(k.clip, torch.ones(4)) and torch.equal(v.clip, torch.ones(4))


def test_fitting_is_deterministic_and_says_what_it_did() -> None:
    model, ids, steps = make_model("llama"), make_tokens(600), []
    step = lambda name, done, total: steps.append((done, total))  # noqa: E731
    first = Published.fit(model, ids, SCHEME, step=step)
    again = Published.fit(model, ids[0], SCHEME)
    assert steps == [(1, 2), (2, 2)]
    for ours, theirs in zip(first.plan.layers, again.plan.layers, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.permutation, b.permutation) and torch.equal(a.edges, b.edges)
            assert torch.equal(a.clip, b.clip)
    assert first.packed and first.chunk == 64
    assert first.name == f"SKVQ as published, {SCHEME}"
    assert first.protocol == "window 32, 5 sinks, 64 tokens at a time; keys before RoPE"


def test_one_ratio_for_all_and_no_reorder() -> None:
    found = Published.fit(make_model("llama"), make_tokens(64), "k4-v2-g32-w32-clip0.92")
    for k, v in found.plan.layers:
        assert torch.equal(k.clip, torch.full((4,), 0.92)) and torch.equal(v.clip, k.clip)
        assert torch.equal(k.permutation.long(), torch.arange(128))
        assert k.edges.tolist() == [0, 32, 64, 96, 128]
    assert found.bits == (4 + 2) / 2 + 32 / 32
    assert found.protocol.endswith("keys after RoPE")


def test_groups_of_a_file_are_taken(tmp_path: Path) -> None:
    torch.save(reorder_content(), tmp_path / "rod.pt")
    scheme = "k2-v1.5-g32-w32-reorder-pre_rope-clip0.9-fp8"
    found = Published.fit(
        make_model("llama"), make_tokens(64), scheme, reorder_file=tmp_path / "rod.pt"
    )
    k, v = found.plan.layers[1]
    assert k.edges.tolist() == [0, 5, 100, 128] and v.edges.tolist() == [0, 64, 65, 128]
    assert torch.equal(v.permutation.long(), reorder_content()["reorder_indices"][1][1])
    # 2 bits: 5, 95, 28 channels in 2, 24, 7 bytes; 1.5: 64, 1, 63 in 13, 1, 13; 6 bytes of FP8.
    assert found.bits == pytest.approx(8 * (33 + 6 + 27 + 6) / 256)
    with pytest.raises(ReorderError, match=r"a reorder file was given, but .* does not reorder"):
        Published.fit(
            make_model("llama"), make_tokens(64), "k2-v2-g32-w32", reorder_file=tmp_path / "rod.pt"
        )


def test_texts_and_models_that_cannot_be_fitted_are_refused() -> None:
    model = make_model("llama")
    with pytest.raises(FitError, match=r"\[1, 90\]: .* one text of 101 tokens at least, of which"):
        Published.fit(model, make_tokens(90), SCHEME)
    with pytest.raises(FitError, match=r"\[2, 400\]: fitting reads one text"):
        Published.fit(model, make_tokens(400, batch_size=2), SCHEME)
    broken = make_model("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(FitError, match="the V of layer 1 hold NaN or infinity"):
        Published.fit(broken, make_tokens(300), "k2-v2-g32-w32")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    plain = hf.OPTForCausalLM(hf.OPTConfig(vocab_size=97, word_embed_proj_dim=32, **sizes))
    with pytest.raises(RopeError, match="without pre_rope"):
        Published.fit(plain, make_tokens(300), SCHEME)
