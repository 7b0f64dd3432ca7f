"""What only a GPU's backend has: workspaces, streams, graphs; and models that run on it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from cache_cases import Case
from devices import CUDA, EMULATED, Device, get_device
from layer_oracle import HEADS, QUERY_HEADS, assert_same_state, make_layer, rows, state_of
from test_decode import check
from torch import Tensor

from skvq_ext import RecordFormat, ops
from skvq_ext.layer_cache import LayerCache

FORMAT = RecordFormat("2", "1.5", 128, "fp8", 64)
INSTANCES = [] if CUDA is None else CUDA["instances"]


@pytest.fixture
def gpu() -> Device:
    return get_device("cuda")


def read_instance(text: str, meta: str) -> RecordFormat:
    """A format as build_info names it."""
    found = re.fullmatch(r"k([\d.:/+]+)-v([\d.:/+]+)-g(\d+) at head_dim (\d+)", text)
    assert found, text
    group, head_dim = int(found[3]), int(found[4])
    return RecordFormat(found[1], found[2], group % 256, meta, head_dim)  # ghead is group 0


@pytest.mark.skipif(CUDA is None, reason="no CUDA kernels in this build")
@pytest.mark.parametrize("instance", INSTANCES)
def test_every_kernel_that_is_named_is_there(instance: str) -> None:
    fmt = replace(read_instance(instance, "fp16"), arrangement="mma")
    place = "cpu" if EMULATED else "cuda"
    ops.check_decode_format(fmt.args, fmt.head_dim, torch.float16, place)


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize(("meta", "q_heads"), [("fp8", 20), ("fp16", 2)])
def test_every_kernel_reads_what_the_codes_say(
    instance: str, meta: str, q_heads: int, device: Device
) -> None:
    case = Case(read_instance(instance, meta), device)
    k, v = case.rows(170), case.rows(170)
    case.append(k, v)
    check(case, k, v, case.rows(1, q_heads), 169)


def test_one_workspace_serves_every_step(device: Device) -> None:
    own, shared = Case(FORMAT, device), Case(FORMAT, device)
    q = own.rows(1, 8)
    size = ops.decode_workspace_bytes(q, None, own.cache, own.fmt.args, window=own.window)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device.name)
    for tokens in (40, 200, 1, 1, 64):
        k, v = own.rows(tokens), own.rows(tokens)
        own.append(k, v)
        shared.append(k, v)
        pairs = zip(own.attend(q), shared.attend(q, workspace=workspace), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        again = ops.decode_workspace_bytes(q, None, own.cache, own.fmt.args, window=own.window)
        assert again == size, "it depends on shapes only"


def fed_alike(gpu: Device, **options: object) -> tuple[LayerCache, LayerCache]:
    """Two layers that hold the same 60 tokens."""
    first, second = (make_layer(device=gpu, max_len=900, **options) for _ in range(2))
    k = rows(60 * first.batch_size, HEADS, seed=1, device=gpu)
    for layer in (first, second):
        layer.append(k, k)
    return first, second


@pytest.mark.parametrize("sliding_window", [0, 100])
def test_a_graph_of_a_step_follows_growing_lengths(sliding_window: int, gpu: Device) -> None:
    """One graph, replayed across many tiles that complete on the way."""
    plain, captured = fed_alike(gpu, batch_size=2, sliding_window=sliding_window)
    k, q = (rows(2, heads, seed=3, device=gpu) for heads in (HEADS, QUERY_HEADS))
    warm, _ = fed_alike(gpu, batch_size=2, sliding_window=sliding_window)
    warm.append(k, k)
    warm.attend(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.append(k, k)
        out, lse = captured.attend(q)
    assert captured.lengths == [60, 60], "capturing runs nothing"
    for seed in range(300):
        k.copy_(rows(2, HEADS, seed=seed, device=gpu))
        q.copy_(rows(2, QUERY_HEADS, seed=1000 + seed, device=gpu))
        graph.replay()
        plain.append(k, k)
        expected, expected_lse = plain.attend(q)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert captured.lengths == plain.lengths == [360, 360]
    assert_same_state(state_of(captured), state_of(plain))


def test_work_goes_to_the_current_stream(gpu: Device) -> None:
    """Behind a long kernel of another stream, so that the default stream would be too early."""
    plain, other = fed_alike(gpu)
    k, q = (rows(n, heads, seed=3, device=gpu) for n, heads in ((200, HEADS), (1, QUERY_HEADS)))
    plain.append(k, k)
    expected, _ = plain.attend(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late_k, late_q = torch.zeros_like(k), torch.zeros_like(q)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_k.copy_(k)
        late_q.copy_(q)
        other.append(late_k, late_k)
        out, _ = other.attend(late_q)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_the_device_of_the_tensors_counts(gpu: Device) -> None:
    first, second = (Case(FORMAT, gpu) for _ in range(2))
    k, v, q = first.rows(200), first.rows(200), first.rows(1, 4)
    second.cache = ops.CacheTensors(*(x.to("cuda:1") for x in second.cache))
    first.append(k, v)
    second.append(k.to("cuda:1"), v.to("cuda:1"))
    out, _ = second.attend(q.to("cuda:1"))
    assert torch.equal(out.cpu(), first.attend(q)[0].cpu())


def test_a_page_that_is_not_there(gpu: Device) -> None:
    """Nobody looks at page tables on the host: appending drops the tile, attending shows NaN."""
    case, whole = Case(FORMAT, gpu), Case(FORMAT, gpu)
    case.cache.page_table[0, 1] = -1
    k, v, q = case.rows(300), case.rows(300), case.rows(1, 4)
    for each in (case, whole):
        each.append(k, v)
    tiles = case.cache.page_table[0, [0, 2, 3]].long()
    assert torch.equal(case.cache.pages[tiles], whole.cache.pages[tiles])
    assert case.attend(q)[0].isnan().any() and not whole.attend(q)[0].isnan().any()
    case.cache.page_table[0, 1] = 10**6
    assert case.attend(q)[0].isnan().any()


def fed(model: torch.nn.Module, ids: Tensor, cache: object, steps: int = 16) -> Tensor:
    """Logits of the last `steps` tokens, fed one by one, float32 on the CPU."""
    with torch.no_grad():
        model(ids[:, :-steps], past_key_values=cache)
        parts = ids[:, -steps:].split(1, dim=1)
        logits = [model(part, past_key_values=cache).logits for part in parts]
    return torch.cat(logits, dim=1).float().cpu()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_reads_packed_tiles_in_the_dtype_of_its_device(kind: str, device: Device) -> None:
    """Its logits are those of the plain reference; full precision is much farther away."""
    hf = pytest.importorskip("hf_models")
    from transformers import DynamicCache

    from skvq_ext.hf import SkvqHFCache

    scheme = "k2-v1.5-ghead-w16-sink2-fp8"
    model, ids = hf.make_model(kind), hf.make_tokens(230)
    model.set_attn_implementation("eager")
    wanted = fed(model, ids, hf.ReferenceCache(model, scheme))
    full = fed(model, ids, DynamicCache(config=model.config))
    model, there = model.to(device.name, device.dtype), ids.to(device.name)
    cache = SkvqHFCache(model, scheme)
    found = fed(model, there, cache)
    assert cache.lengths == [230]
    assert (found - wanted).std() < (full - wanted).std() / 4
