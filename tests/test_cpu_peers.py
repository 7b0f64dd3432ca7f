"""The comparison on a CPU: what its sides compute, who takes part, and what it makes of their times."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cpu_peers  # noqa: E402
import ggml  # noqa: E402
from cpu_machine import describe  # noqa: E402
from cpu_peer_backends import (  # noqa: E402
    PackedCache,
    packed_kind,
    peers,
    scheme_key,
    torch_kind,
)
from cpu_peer_build import Worker, build, plan_copies  # noqa: E402
from cpu_problem import CpuProblem, Data, Reference  # noqa: E402
from cpu_report import Measured  # noqa: E402
from cpu_timing import Side, rotate, still_in, take_turns  # noqa: E402
from peer_cases import attention, relative, tokens  # noqa: E402

from skvq_ext.scheme import Scheme  # noqa: E402

K2V2, K2V15 = Scheme.parse("k2-v2"), Scheme.parse("k2-v1.5")
SMALL = CpuProblem(2, 264, 8, 2, "bf16", 64)
GIGABYTE = 1 << 30
LLAMA = [f"llama_{kind}_by_{by}" for kind in ggml.TYPES for by in ("head", "token")]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- what the sides compute ----


def test_everybody_gets_the_same_tokens_in_chunks() -> None:
    p = CpuProblem(2, 4200, 4, 2, "bf16", 64)
    starts = [start for start, _, _ in Data(p).chunks()]
    assert starts == [0, 2048, 4096], "a chunk has 4096 tokens of all sequences together"
    for first, second in zip(tokens(p), tokens(p), strict=True):
        assert first.shape == (2, 4200, 2, 64)
        assert torch.equal(first, second), "another iterator, the same numbers"


def test_the_reference_is_attention() -> None:
    p = CpuProblem(2, 4200, 4, 2, "bf16", 64)
    data = Data(p)
    reference = Reference(data)
    for _, k, v in data.chunks():
        reference.add(k, v)
    wanted = attention(data.queries, *tokens(p))
    assert reference.error(wanted) < 1e-5
    assert reference.error(1.5 * wanted) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (4, 4)])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_every_formulation_of_torch_is_attention(name: str, q_heads: int, kv_heads: int) -> None:
    p = CpuProblem(2, 264, q_heads, kv_heads, "bf16", 64)
    kind = torch_kind(p, name)
    assert (f"torch_{name}_gqa" in kind.ways) == (q_heads > kv_heads)
    data = Data(p)
    cache: Any = kind.make(data)
    for start, k, v in data.chunks():
        cache.fill(start, k, v)
    assert kind.held == cache.k.nbytes + cache.v.nbytes
    # rounded like the operands, so that only sums and probabilities are left to differ
    wanted = attention(cache.q, *(x.to(cache.dtype) for x in tokens(p)))
    eps = torch.finfo(cache.dtype).eps
    for name, way in kind.ways.items():
        assert relative(way.call(cache), wanted) < max(4 * eps, 1e-6), name
        assert relative(way.call(cache.copy()), wanted) < max(4 * eps, 1e-6), name


def test_ours_reads_what_everybody_gets() -> None:
    """At eight bits the cache is nearly exact; a token or a head at the wrong place would be far off."""
    data = Data(SMALL)
    cache = PackedCache(data, Scheme.parse("k8-v8"))
    for start, k, v in data.chunks():
        cache.fill(start, k, v)
    wanted = attention(data.queries, *tokens(SMALL))
    for exact in (False, True):
        assert relative(cache.attend(exact), wanted) < 0.02
        assert torch.equal(cache.copy().attend(exact), cache.attend(exact))


def test_bytes_of_ours_are_those_of_the_tensors() -> None:
    cache = PackedCache(Data(SMALL), K2V15).tensors
    tail = SMALL.context - 64 * cache.page_table.shape[1]
    rows = 2 * cache.sink_k[:, :1].nbytes * tail  # of K and V, sinks and window
    kind = packed_kind(SMALL, K2V15)
    assert kind.moved == cache.pages.nbytes + rows + SMALL.question_bytes()
    assert kind.held == sum(
        x.nbytes for x in (cache.pages, cache.sink_k, cache.sink_v, cache.ring_k, cache.ring_v)
    )


# ---- who takes part ----


def test_without_llama_there_are_rows_that_say_so_and_no_ratios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    ggml.load.cache_clear()
    try:
        built = build([packed_kind(SMALL, K2V2), *peers(SMALL)], Data(SMALL), 1, GIGABYTE)
        assert describe()["ggml"] == "not installed: pip install llama-cpp-python"
    finally:
        ggml.load.cache_clear()
    assert built.skipped == dict.fromkeys(LLAMA, "not installed: pip install llama-cpp-python")
    built.sides.append(Side("read", lambda _, timed: [1.0] * timed, 10**9, estimate=1.0))
    measured = Measured(SMALL, built.sides, built.skipped)
    rows = {row["side"]: row for row in measured.rows()}
    assert rows["llama_q4_0_by_head"]["skipped"].startswith("not installed")
    ratios = measured.ratios()
    assert ratios["k2v2_g128_264_8x2_d64_b2_vs_llama_q4_0"] is None
    assert ratios["k2v2_g128_264_8x2_d64_b2_vs_torch_best"] > 0


def test_copies_hold_a_working_set_and_fit_into_memory() -> None:
    p = CpuProblem(1, 4096, 8, 2, "bf16", 64)
    kinds = [packed_kind(p, K2V2), torch_kind(p, "bf16"), torch_kind(p, "fp32")]
    copies, skipped, left = plan_copies(kinds, 10_000_000, GIGABYTE)
    assert not skipped and left == GIGABYTE - sum(copies[k.name] * k.held for k in kinds)
    for kind in kinds:
        assert (copies[kind.name] - 1) * kind.moved < 10_000_000 <= copies[kind.name] * kind.moved
    free = 2 * kinds[0].held + kinds[1].held
    copies, skipped, _ = plan_copies(kinds, 2 * kinds[0].moved, free)
    assert copies == {"k2v2_g128": 2, "torch_bf16": 1}
    assert skipped == {"torch_fp32": "needs 0.0 GB of memory and 0.0 GB are free"}


def test_what_does_not_fit_or_computes_something_else_is_left_out() -> None:
    kind = torch_kind(SMALL, "fp32")
    built = build([kind], Data(SMALL), 1, kind.held + kind.ways["torch_fp32_matmul"].scratch)
    assert [side.name[11:] for side in built.sides] == ["rows", "matmul", "matmul_keys"]
    assert "GB are free" in built.skipped["torch_fp32_gqa"]

    class Wrong(type(kind.make(Data(SMALL)))):  # type: ignore[misc]
        """Puts values where keys belong."""

        def fill(self, start: int, k: Tensor, v: Tensor) -> None:
            super().fill(start, v, k)

    def make(data: Data) -> Any:
        return Wrong(data, torch.float32)

    built = build([type(kind)(**{**vars(kind), "make": make})], Data(SMALL), 1, GIGABYTE)
    assert not built.sides
    assert "is no attention over these tokens" in built.skipped["torch_fp32_rows"]


# ---- times ----


def constant(seconds: float) -> Any:
    """A run whose calls take always the same."""
    return lambda _, timed: [seconds] * timed


def test_calls_rotate_over_copies_and_only_some_are_timed() -> None:
    called: list[int] = []

    def call(index: int) -> Tensor:
        called.append(index)
        return torch.zeros(0)

    run = rotate([lambda i=i: call(i) for i in range(3)])
    assert len(run(1, 3)) == 3 and len(run(0, 1)) == 1
    assert called == [0, 1, 2, 0, 1]


def test_rivals_that_are_much_slower_drop_out_and_others_do_not() -> None:
    sides = [
        Side("fast", constant(0.010), 1, rivals="torch"),
        Side("slow", constant(0.025), 1, rivals="torch"),
        Side("hopeless", constant(0.200), 1, rivals="torch"),
        Side("ours", constant(0.500), 1),
    ]
    take_turns(sides, rounds=5, seconds=60, threads=1)
    assert [len(side.seconds) for side in sides] == [10, 3, 0, 5], "fast has two calls in a turn"
    assert [side.median for side in sides] == [0.010, 0.025, 0.200, 0.500]
    assert [side.name for side in still_in(sides, 3.0)] == ["fast", "slow", "ours"]


def test_sides_take_turns_and_stop_in_time() -> None:
    order: list[str] = []

    def side(name: str) -> Side:
        def run(untimed: int, timed: int) -> list[float]:
            order.append(name)
            return [0.2] * timed

        return Side(name, run, 1, estimate=0.2)

    take_turns([side("a"), side("b")], rounds=9, seconds=0, threads=1)
    assert order == ["a", "b", "b", "a", "a", "b"], "three rounds at least, each begun by another"


# ---- keys and ratios ----


def measured(p: CpuProblem, scheme: Scheme) -> Measured:
    name = scheme_key(scheme)
    sides = [
        Side(name + mode, constant(0), 10**6, estimate=estimate, scheme=name)
        for mode, estimate in (("", 0.002), ("_exact", 0.004), ("_avx2", 0.008))
    ]
    sides += [
        Side("torch_fp32_rows", constant(0), 10**8, estimate=0.050, rivals="torch"),
        Side("torch_bf16_rows", constant(0), 10**8, estimate=0.020, rivals="torch"),
        Side("llama_f16_by_token", constant(0), 10**8, estimate=0.090, rivals="llama_f16"),
        Side("llama_f16_by_head", constant(0), 10**8, estimate=0.040, rivals="llama_f16"),
        Side("read", constant(0), 10**9, estimate=0.1),
    ]
    sides[0].seconds = [0.001, 0.002, 0.009]
    return Measured(p, sides, {"llama_q4_0_by_head": "not installed"})


def test_ratios_have_the_names_that_are_promised() -> None:
    p = CpuProblem(1, 32768, 32, 8, "bf16")
    ratios = measured(p, K2V2).ratios()
    assert ratios["k2v2_g128_32k_32x8_d128_vs_torch_best"] == pytest.approx(10)
    assert ratios["k2v2_g128_32k_32x8_d128_vs_llama_f16"] == pytest.approx(20)
    assert ratios["k2v2_g128_32k_32x8_d128_vs_llama_q8_0"] is None
    assert ratios["k2v2_g128_32k_32x8_d128_vs_llama_q4_0"] is None
    assert ratios["k2v2_g128_32k_32x8_d128_exact_vs_torch_best"] == pytest.approx(5)
    assert ratios["k2v2_g128_32k_32x8_d128_avx2_vs_torch_best"] == pytest.approx(2.5)
    fastest = measured(p, K2V2).ratios("fastest")
    assert fastest["k2v2_g128_32k_32x8_d128_vs_torch_best"] == pytest.approx(20)
    p = CpuProblem(8, 512, 32, 32, "bf16", 64, threads=2)
    assert "k2v1.5_g128_512_32x32_d64_b8_t2_vs_torch_best" in measured(p, K2V15).ratios()
    assert scheme_key(Scheme.parse("k4-v4-ghead-fp16")) == "k4v4_ghead_fp16"


def test_rows_and_table_hold_the_same_figures() -> None:
    result = measured(CpuProblem(1, 32768, 32, 8, "bf16"), K2V2)
    rows = {row["side"]: row for row in result.rows()}
    ours = rows["k2v2_g128"]
    assert (ours["median_s"], ours["min_s"], ours["calls"]) == (0.002, 0.001, 3)
    assert ours["gb_per_s"] == pytest.approx(1) and ours["percent_of_read"] == pytest.approx(10)
    assert rows["llama_q4_0_by_head"]["skipped"] == "not installed"
    columns = [list(column.cells) for column in result.table().columns]
    assert columns[0][4] == "torch_bf16_rows *", "the best of torch has a star"
    assert columns[1][0] == "2.000" and columns[7][4] == "10.00"


# ---- the command ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "4k"}, "--context 4k: '4k' is no whole number from 1 on"),
        ({"heads": "32/5"}, "'32/5' is not query heads/KV heads"),
        ({"threads": "0"}, "'0' is no whole number from 1 on, or all"),
        ({"isa": "sse"}, "--isa sse: this build has"),
        ({"scheme": ["k9-v2"]}, "not a tensor format for k"),
        ({"scheme": ["k2-v2-w64"]}, "the caches here have w128 and sink5"),
        ({"context": "100"}, "nothing of so few tokens is packed"),
        ({"json_file": Path("/no/such/folder/x.json")}, "there is no such folder"),
    ],
)
def test_wrong_options_are_one_line(
    options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(cpu_peers.typer.Exit) as stopped:
        cpu_peers.main(**options)
    assert stopped.value.exit_code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("cpu_peers: ") and message in errors and errors.count("\n") == 1


def test_quick_is_what_it_says() -> None:
    first, *others = cpu_peers.plan_problems(True, {})
    assert first.key == "32k_32x8_d128"
    assert {p.key for p in others} == {"512_32x8_d128", "32k_32x8_d64", "32k_32x8_d256"}
    given = cpu_peers.plan_problems(True, {"context": "4096"})
    assert [p.key for p in given] == ["4k_32x8_d128", "4k_32x8_d64", "4k_32x8_d256"]
    assert len(cpu_peers.plan_problems(False, {})) == 4 * 2 * 3 * 2


def test_a_small_run_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    shape = {"context": "256", "heads": "4/2", "head_dim": "64", "batch": "1"}
    cpu_peers.main(**shape, threads="1,2", rounds=1, seconds=0, budget=None, json_file=file)
    report = json.loads(file.read_text())
    machine = report["machine"]
    assert machine["isa"] in machine["skvq_ext"]["cpu_isas"] and machine["cpu"]
    assert machine["torch"] == torch.__version__ and machine["python"] and report["date"]
    assert report["settings"]["schemes"][0] == str(K2V2)
    for scheme in ("k2v2", "k2v1.5"):
        for end in ("d64", "d64_exact", "d64_t2", "d64_t2_exact"):
            assert report["ratios"][f"{scheme}_g128_256_4x2_{end}_vs_torch_best"] > 0
    named = {row["side"] for row in report["rows"]}
    assert {"k2v2_g128", "k2v1.5_g128_exact", "torch_bf16_gqa", "read", *LLAMA} <= named
    cpu_peers.main(**shape, threads="1", budget=-1, json_file=file)
    assert all("budget" in row["skipped"] for row in json.loads(file.read_text())["rows"])


def test_another_instruction_set_takes_its_turns_in_a_process_of_its_own() -> None:
    worker = Worker("portable")
    try:
        built = worker.build(SMALL, [K2V2], 1, GIGABYTE)
        assert not built.skipped
        assert [side.name for side in built.sides] == [
            "k2v2_g128_portable",
            "k2v2_g128_exact_portable",
        ]
        assert [side.mode for side in built.sides] == ["_portable", "_exact_portable"]
        assert all(seconds > 0 for seconds in built.sides[0].run(1, 3))
        here = build([packed_kind(SMALL, K2V2)], Data(SMALL), 1, GIGABYTE).sides[1]
        assert built.sides[1].error == pytest.approx(here.error, rel=1e-3), "the same tokens"
        worker._process.terminate()
        gone = worker.build(SMALL, [K2V2], 1, GIGABYTE)
        assert "the process for portable ended" in gone.skipped["portable"]
    finally:
        worker.close()
