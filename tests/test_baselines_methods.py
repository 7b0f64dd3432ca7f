"""Each baseline's quantizer against plain arithmetic, and its bits against what would be stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hf_models import make_model, make_tokens
from torch import Tensor

from skvq_ext.baselines.coding import PerChannel, PerToken, extremes
from skvq_ext.baselines.gear import Gear
from skvq_ext.baselines.int_hadamard import Symmetric
from skvq_ext.baselines.kvquant import KeyCoder, Levels, ValueCoder, fit_levels, ranges
from skvq_ext.baselines.oscar import ClippedRows, bit_reversal, covariances, rotation
from skvq_ext.baselines.registry import build
from skvq_ext.baselines.rptq import Clustered, cluster_channels
from skvq_ext.baselines.saliency import Saliency, per_channel, separable
from skvq_ext.baselines.smoothquant import smoothing
from skvq_ext.perplexity import score

HEADS, TOKENS, DIM = 2, 64, 64


def tile(seed: int = 0, spread: float = 1.0) -> Tensor:
    """A tile with a few wide channels, f32 [HEADS, TOKENS, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 + spread * 8.0 * (torch.rand(HEADS, 1, DIM, generator=generator) > 0.9)
    return torch.randn(HEADS, TOKENS, DIM, generator=generator) * scale


def fp16(x: float) -> float:
    return float(np.float16(x))


def rounded(group: np.ndarray, bits: int) -> np.ndarray:
    """Evenly spaced levels from the smallest to the largest, scale and zero kept as fp16."""
    zero = fp16(group.min())
    scale = fp16((float(group.max()) - zero) / (2**bits - 1))
    return np.clip(np.rint((group - zero) / scale), 0, 2**bits - 1) * scale + zero


def close(found: Tensor, wanted: np.ndarray) -> None:
    """Equal but for float32 arithmetic, which may send one number in a thousand to a neighbour."""
    wrong = (found.double() - torch.from_numpy(wanted)).abs() > 1e-4
    assert wrong.double().mean() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_per_token_and_per_channel_are_loops_over_groups(bits: int) -> None:
    x = tile()
    by_token, by_channel = np.empty((2, HEADS, TOKENS, DIM))
    for head in range(HEADS):
        for i in range(64):
            for start in (0, 32):
                place = slice(start, start + 32)
                by_token[head, i, place] = rounded(x[head, i, place].numpy().astype(float), bits)
                by_channel[head, place, i] = rounded(x[head, place, i].numpy().astype(float), bits)
    count = HEADS * TOKENS * DIM
    for coder, wanted in (
        (PerToken(str(bits), 32, "fp16"), by_token),
        (PerChannel(str(bits), 32, "fp16"), by_channel),
    ):
        found = coder(0, x, 0)
        close(found.values, wanted)
        assert found.bits == count * bits + count / 32 * 2 * 16


def test_symmetric_blocks_are_those_of_ggml() -> None:
    """Width 4 against the q4_0 of the gguf package; width 2 by hand."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    x = tile()
    packed = quants.quantize(x.flatten(0, 1).numpy(), GGMLQuantizationType.Q4_0)
    wanted = quants.dequantize(packed, GGMLQuantizationType.Q4_0).reshape(x.shape)
    found = Symmetric(4, 32)(0, x, 0)
    close(found.values, wanted.astype(float))
    assert found.bits == packed.size * 8
    row = torch.tensor([[[1.0, -2.0, 0.4, 0.6]]])
    assert Symmetric(2, 4)(0, row, 0).values.tolist() == [[[1.0, -2.0, 0.0, 1.0]]]
    assert not Symmetric(2, 4)(0, torch.zeros(1, 1, 4), 0).values.any()


def test_smoothing_is_the_formula_of_the_paper() -> None:
    rows, other = tile(), torch.rand(HEADS, DIM) + 0.5
    found = smoothing(rows, other, 0.5)
    for head, channel in ((0, 3), (1, 60)):
        largest = max(abs(v) for v in rows[head, :, channel].tolist())
        wanted = math.sqrt(largest) / math.sqrt(float(other[head, channel]))
        assert float(found[head, 0, channel]) == pytest.approx(wanted, rel=1e-5)
    even = smoothing(rows, other, 1.0)
    assert torch.allclose((rows / even).abs().amax(1), torch.ones(HEADS, DIM))


def test_clusters_are_channels_of_like_range_of_all_heads() -> None:
    generator = torch.Generator().manual_seed(3)
    kind = torch.randint(0, 3, (HEADS * DIM,), generator=generator)
    scale = torch.tensor([10.0, 50.0, 100.0])[kind]
    rows = (torch.rand(400, HEADS * DIM, generator=generator) * 2 - 1) * scale
    clusters = cluster_channels(rows, 3, seed=0)
    found = {tuple(cluster.tolist()) for cluster in clusters}
    assert found == {tuple((kind == k).nonzero()[:, 0].tolist()) for k in range(3)}
    x = rows[:TOKENS].unflatten(1, (HEADS, DIM)).transpose(0, 1)
    coded = Clustered("2", "fp16", (0, 0), (tuple(clusters),))(0, x, 0)
    wanted = np.empty((TOKENS, HEADS * DIM))
    for token in range(TOKENS):
        for cluster in clusters:
            wanted[token, cluster] = rounded(rows[token, cluster].numpy().astype(float), 2)
    close(coded.values.transpose(0, 1).flatten(1), wanted)
    assert coded.bits == TOKENS * (HEADS * DIM * 2 + 3 * 32)


def test_bit_reversal_by_hand() -> None:
    """Of eight: place 0, 4, 2, 6, 1, 5, 3, 7 for the eigenvalues from the largest on."""
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 8.0, 2.0, 6.0])  # order: 1 5 3 7 4 0 6 2
    assert bit_reversal(values).tolist() == [1, 4, 3, 6, 5, 0, 7, 2]


def test_oscar_rotates_by_the_covariance_of_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    strength = torch.tensor([10.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    q = torch.randn(3, 4000, 8, generator=generator, dtype=torch.float64) * strength @ basis.mT
    k, v = torch.randn(2, 50, 8, generator=generator)
    for_keys, for_values = covariances(q.float(), k, v)
    turned = rotation(for_keys).double()
    torch.testing.assert_close(turned @ turned.mT, torch.eye(8).double(), atol=1e-6, rtol=0)
    # Every channel of the rotated space carries the same share of what queries ask for.
    shares = (turned.mT @ for_keys @ turned).diagonal()
    torch.testing.assert_close(shares, shares.mean().expand(8), rtol=1e-4, atol=0)
    weights = torch.tensor([float(k[t].double() @ for_keys @ k[t].double()) for t in range(50)])
    wanted = sum(w * torch.outer(v[t], v[t]) for t, w in enumerate(weights)) / weights.sum()
    torch.testing.assert_close(for_values.float(), wanted.float(), rtol=1e-4, atol=1e-4)


def test_oscar_clips_rows_at_a_quantile_of_their_magnitudes() -> None:
    x = tile()
    found = ClippedRows(PerToken("8", 64, "fp16"), 0.92)(0, x, 0).values
    limits = np.sort(np.abs(x.numpy()), axis=-1)[..., int(0.92 * 64)]
    wanted = np.clip(x.numpy(), -limits[..., None], limits[..., None])
    assert np.abs(found.numpy() - wanted).max() < 0.1  # of 8 bits
    assert np.abs(x.numpy() - wanted).max() > 1


def test_gear_by_hand() -> None:
    """Outliers are exact, the rest is KIVI's backbone plus the best matrix of rank 2."""
    x = tile()
    found = Gear("2", 32, "fp16", rank=2, ends=1, by_channel=True)(0, x, 0)
    for head in range(HEADS):
        matrix = x[head].numpy().astype(float)
        apart = np.zeros((TOKENS, DIM), dtype=bool)
        backbone = np.empty((TOKENS, DIM))
        for channel in range(DIM):
            column = matrix[:, channel]
            apart[[column.argmin(), column.argmax()], channel] = True
            for start in (0, 32):
                place = slice(start, start + 32)
                rest = column[place][~apart[place, channel]]
                middle = (rest.min() + rest.max()) / 2
                filled = np.where(apart[place, channel], middle, column[place])
                backbone[place, channel] = rounded(filled, 2)
        residual = np.where(apart, 0, matrix - backbone)
        u, s, vh = np.linalg.svd(residual)
        wanted = backbone + (u[:, :2] * s[:2]) @ vh[:2]
        wanted[apart] = matrix[apart]
        error = np.abs(found.values[head].numpy() - wanted)
        assert np.median(error) < 2e-3 and (error > 0.02).mean() < 5e-3  # fp16 factors
    count = HEADS * TOKENS * DIM
    assert found.bits == count * 2 + count / 32 * 32 + HEADS * DIM * 2 * 32 + HEADS * 2 * 128 * 16


def test_gear_of_full_rank_is_exact() -> None:
    for by_channel in (True, False):
        x = tile()
        found = Gear("2", 32, "fp16", rank=64, ends=1, by_channel=by_channel)(0, x, 0).values
        assert (found - x).abs().max() < 0.02  # fp16 numbers


def test_extremes_of_vectors() -> None:
    mask = extremes(torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 1)
    assert mask.sum(-1).tolist() == [2, 2]
    assert mask[0].nonzero()[:, 0].tolist() == [1, 3]
    assert not extremes(torch.rand(2, 5), 0).any()


def test_kvquant_keys_by_hand() -> None:
    levels = Levels(torch.tensor([-0.9, -0.2, 0.2, 0.9]), torch.tensor([-1.0, -0.3, 0.1, 0.8]))
    x = tile()
    low, high = ranges(x, 10.0)
    found = KeyCoder(2, (low,), (high,), (levels,))(0, x, 0)
    wanted, apart = np.empty((HEADS, TOKENS, DIM)), 0
    for head in range(HEADS):
        for channel in range(DIM):
            column = x[head, :, channel].numpy()
            least, most = np.quantile(column, 0.05), np.quantile(column, 0.95)
            for token, number in enumerate(column):
                if least <= number <= most:
                    scaled = (number - (least + most) / 2) / ((most - least) / 2)
                    nearest = np.abs(levels.edges.numpy() - scaled).argmin()
                    scaled = float(levels.values[nearest])
                    number = scaled * (most - least) / 2 + (least + most) / 2
                else:
                    apart += 1
                wanted[head, token, channel] = number
    assert (
        np.quantile(np.abs(found.values.numpy() - wanted), 0.999) < 2e-2
    )  # outliers as fp16 keeps them
    assert apart == 8 * HEADS * DIM  # 4 of 64 at each end
    assert found.bits == HEADS * TOKENS * DIM * 2 + apart * 32 + TOKENS * 16


def test_kvquant_values_by_hand() -> None:
    levels = Levels(*(torch.tensor([-0.8, 0.0, 0.3, 1.0]),) * 2)
    x = tile()
    found = ValueCoder(2, 1, (levels,))(0, x, 0)
    rows = x.transpose(0, 1).flatten(1).numpy().astype(float)
    wanted = rows.copy()
    for token in range(TOKENS):
        row = rows[token]
        inner = np.sort(row)[1:-1]
        least, most = fp16(inner[0]), fp16(inner[-1])
        for place, number in enumerate(row):
            if inner[0] <= number <= inner[-1]:
                scaled = (number - (least + most) / 2) / ((most - least) / 2)
                nearest = float(levels.edges[np.abs(levels.edges.numpy() - scaled).argmin()])
                wanted[token, place] = nearest * (most - least) / 2 + (least + most) / 2
    error = np.abs(found.values.transpose(0, 1).flatten(1).numpy() - wanted)
    assert np.quantile(error, 0.999) < 1e-2  # outliers as fp16 keeps them
    assert found.bits == TOKENS * (HEADS * DIM * 2 + 2 * 32 + 2 * 16)


def test_levels_find_the_values_that_occur_and_follow_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([-0.9, -0.55, -0.1, 0.0, 0.2, 0.5, 0.7, 1.0])
    which = torch.randint(0, 8, (4000,), generator=generator)
    x = centres[which] + 1e-3 * torch.randn(4000, generator=generator)
    found = fit_levels(x, None, 3, seed=0)
    assert torch.allclose(found.edges, centres, atol=2e-3) and found.values is found.edges
    spread = torch.rand(4000, generator=generator) * 2 - 1
    heavy = torch.where(spread > 0.5, 100.0, 1.0)
    assert (fit_levels(spread, heavy, 3, 0).edges > 0.5).sum() >= 4


def test_two_bit_levels_keep_mean_and_deviation() -> None:
    """Q-Norm of KVQuant."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    read = fit_levels(x, None, 2, seed=0).round(x)
    assert float(read.std()) == pytest.approx(float(x.std()), rel=1e-3)
    assert float(read.mean()) == pytest.approx(float(x.mean()), abs=1e-4)


def test_salient_tokens_get_the_high_bits() -> None:
    x = tile()
    quantizer = Saliency(("8", "2"), ("8", "2"), 16, 1.0)
    known = quantizer._attended(0, torch.zeros(HEADS, 100, DIM))
    known.weight[5:69] = torch.arange(64) % 4 == 3
    known.queries += 1
    k, v = quantizer.code(0, x, x, 5)
    high = torch.arange(64) % 4 == 3
    for coded in (k, v):
        error = (coded.values - x).abs().mean((0, 2))
        assert error[high].max() < error[~high].min() / 4
    hidden = HEADS * DIM
    assert k.bits == 64 + hidden * (16 * 8 + 48 * 2) + 2 * hidden * 32
    assert v.bits == hidden * (16 * 8 + 48 * 2) + 64 * 32 + 2 * hidden * 16


def test_saliency_quantizers_by_hand() -> None:
    x = tile()
    wanted = np.empty((HEADS, TOKENS, DIM))
    for head in range(HEADS):
        for channel in range(DIM):
            column = x[head, :, channel].numpy().astype(float)
            wanted[head, :, channel] = rounded(column, 2)
    close(per_channel(x, "2").values, wanted)
    divisor = np.sqrt(np.abs(x.numpy()).max(1)).astype(np.float16).astype(float)  # [H, D]
    for token in range(TOKENS):
        row = (x[:, token].numpy() / divisor).reshape(-1)
        wanted[:, token] = rounded(row, 2).reshape(HEADS, DIM) * divisor
    close(separable(x, "2").values, wanted)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("rtn:k2-v2-g16-w20-sink3", 2 + 16 / 16),
        ("rtn:k2-v1.5-g64-w0-sink3", (2 + 1.625) / 2 + 16 / 64),
        ("smoothquant:k3-v2-g32-w20-sink3", 2.5 + 16 / 32),
        ("smoothquant:w20-sink3-fp16-post", 2 + 32 / 64),
        ("rptq:k2-g32-w20-sink3", 2 + 16 / 32),
        ("rptq:k4-v2-g32-w20-sink3-perhead-post", 3 + 16 / 32),
        ("kivi:w20-sink0", 3.0),
        ("kivi:k4-v2-g64-w20-sink3-fp8", 3 + 16 / 64),
        ("int-hadamard:w20-sink3", 4.5),
        ("int-hadamard:k3-v2-w20-sink3", 3.0),
        ("oscar:g64-w20-sink3", 2 + 32 / 64),
        # 2 of 64 keys of a channel and 2 of 128 values of a token apart, (64 + 64) * 2 factors
        ("gear:w20-sink3", 3 + (32 * 2 / 64 + 32 * 2 / 128) / 2 + 16 * 2 * 128 / 4096),
        ("gear:g64-rank1-outliers0-block128-w20-sink3", 2.5 + 16 * (128 + 64) / (128 * 64)),
        # 13 of 64 tokens; K: 2 scales and zeros per channel and tile, V: one per token
        (
            "saliency:w20-sink3",
            2 + 2 * 13 / 64 + (2 * 32 / 64 + 1 / 128 + 32 / 128 + 2 * 16 / 64) / 2,
        ),
    ],
)
def test_bits_are_what_would_be_stored(spec: str, bits: float) -> None:
    model, ids = make_model("llama"), make_tokens(300)
    method = build(spec, model, make_tokens(500, seed=4))
    cache = method.cache(model)
    result = score(model, ids, cache, chunk=method.chunk)
    assert method.bits == pytest.approx(bits, abs=1e-9)
    assert cache.bits_per_value == pytest.approx(bits, abs=1e-9)
    assert not method.packed and "simulated" in method.protocol and math.isfinite(result.nll)


def test_kvquant_counts_the_outliers_that_unseen_text_has() -> None:
    model = make_model("llama")
    method = build("kvquant:k3-v2-w20-sink3-outliers2", model, make_tokens(2000, seed=4))
    cache = method.cache(model)
    score(model, make_tokens(600), cache, chunk=method.chunk)
    least = (3 + 0.02 * 32 + 16 / 128 + 2 + 2 * 32 / 128 + 32 / 128) / 2
    assert least < method.bits < least + 0.2
    assert cache.bits_per_value == pytest.approx(method.bits, abs=0.1)
