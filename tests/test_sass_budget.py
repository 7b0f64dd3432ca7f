"""Counting what a tile costs in machine code, and the budgets that are committed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import sass_budget  # noqa: E402
from sass_budget import ARCHS, BUDGET, LIMITS, RESOURCES, Measured, faults_of  # noqa: E402
from sass_build import Facts, Instance, ToolError, Usage, all_instances, find_tool, usage_of  # noqa: E402
from sass_limits import GPUS, predict  # noqa: E402
from sass_loop import (  # noqa: E402
    Function,
    NoLoopError,
    Region,
    TileCost,
    locate_region,
    packed_loop,
    parse_listing,
    tile_cost,
)
from sass_report import resources_page, table  # noqa: E402

# Lines of a decode kernel as `nvdisasm -gi -c` prints them, most of them left out: a loop over packed tiles (.L_x_10)
# with a part that rarely runs, and a loop over full-precision rows (.L_x_30), which has LDSM.
EXCERPT = """
	.section	.text._ZN4skvq4cuda13attend_kernelE,"ax",@progbits
_ZN4skvq4cuda13attend_kernelE:
.text._ZN4skvq4cuda13attend_kernelE:
	//## File "/src/csrc/cuda/decode_kernel.cuh", line 166
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_10:
	//## File "/src/csrc/cuda/ptx.cuh", line 282 inlined at "/src/csrc/cuda/ring.cuh", line 96
	//## File "/src/csrc/cuda/ring.cuh", line 96 inlined at "/src/csrc/cuda/decode_kernel.cuh", line 5
        /*0010*/                   LDS.128 R12, [R130+0x80] ;
        /*0020*/                   LDS.64 R24, [R130+0x78] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
	//## File "/src/csrc/cuda/packed.cuh", line 2
        /*0040*/                   LOP3.LUT R68, R12, 0x30003, RZ, 0xc0, !PT ;
        /*0050*/                   HMMA.16816.F32 R68, R68, R18, RZ ;
        /*0060*/                   HMMA.16816.F32 R68, R72, R20, R68 ;
        /*0070*/               @P0 BRA `(.L_x_11) ;
	//## File "/src/csrc/cuda/sums.cuh", line 4 inlined at "/src/csrc/cuda/packed.cuh", line 8
	//## File "/src/csrc/cuda/packed.cuh", line 8
        /*0080*/                   FMUL R35, R51.reuse, 4 ;
        /*0090*/                   FMUL R36, R51, 4 ;
.L_x_11:
	//## File "/src/csrc/cuda/decode_kernel.cuh", line 9
        /*00a0*/                   NEWOP R1, R2 ;
        /*00b0*/              @!P1 BRA `(.L_x_10) ;
.L_x_30:
        /*00c0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*00d0*/                   HMMA.16816.F32 R68, R4, R20, R68 ;
        /*00e0*/               @P2 BRA `(.L_x_30) ;
        /*00f0*/                   EXIT ;
"""
SUMS = """// raise
void raise(
    int x) {  // with a brace { in a comment
  x *= 2;
}
"""


def excerpt(text: str = EXCERPT) -> Function:
    (function,) = parse_listing(text)
    return function


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "sums.cuh").write_text(SUMS)
    return tmp_path


RARE = Region("raise", "csrc/cuda/sums.cuh", r"void raise\(", 0.25, "a test")


def test_a_listing_is_read_with_labels_and_inlined_lines() -> None:
    function = excerpt()
    assert function.name == "_ZN4skvq4cuda13attend_kernelE" and len(function.code) == 16
    first = function.code[function.labels[".L_x_10"]]
    assert (first.name, first.opcode, first.pipe) == ("LDS.128", "LDS", "shared load")
    assert first.frames == (("/src/csrc/cuda/ptx.cuh", 282), ("/src/csrc/cuda/ring.cuh", 96))
    assert function.code[4].frames == (("/src/csrc/cuda/packed.cuh", 2),)
    assert function.code[3].predicate == "!PT"


def test_the_loop_over_packed_tiles_is_the_one_without_matrix_loads() -> None:
    loop = packed_loop(excerpt())
    assert (loop[0].address, loop[-1].address) == (0x10, 0xB0)
    with pytest.raises(NoLoopError, match="one loop with HMMA and without LDSM, found 0"):
        packed_loop(excerpt(EXCERPT.replace("LDS.128", "LDSM.16")))
    with pytest.raises(NoLoopError, match="found 2"):
        packed_loop(excerpt(EXCERPT.replace("LDSM.16.M88.4", "LDS.128")))


def test_instructions_are_weighted_by_their_place_in_the_source(source: Path) -> None:
    lines = locate_region(RARE, source)
    assert (lines.first, lines.last) == (4, 5)
    cost = tile_cost(excerpt(), [lines], [], products=2)
    assert cost.instructions == 9 + 2 * 0.25
    assert cost.pipes["fma"] == 0.5 and cost.pipes["tensor"] == 2 and cost.pipes["shared load"] == 3
    assert cost.shared_loads == {"16": 1, "8": 1} and cost.unknown == ["NEWOP"]
    assert cost.rare == {"raise": 2} and cost.parts == {"rest": cost.instructions}


def test_a_loop_that_was_unrolled_does_several_tiles(source: Path) -> None:
    lines = [locate_region(RARE, source)]
    once, twice = (tile_cost(excerpt(), lines, [], products=n) for n in (2, 1))
    assert twice.instructions == once.instructions / 2
    with pytest.raises(NoLoopError, match="2 HMMA in the loop, a tile takes 3"):
        tile_cost(excerpt(), lines, [], products=3)


def test_local_memory_is_counted_everywhere() -> None:
    assert tile_cost(excerpt(EXCERPT.replace("EXIT", "STL [R1], R2")), [], [], 2).local == 1


def test_a_place_that_is_gone_is_an_error(source: Path) -> None:
    with pytest.raises(NoLoopError, match=r"has nothing like 'void lower' \(raise\): the weights"):
        locate_region(replace(RARE, opening="void lower"), source)


def test_resources_come_from_the_tools() -> None:
    resources = " Function _Z1k:\n  REG:155 STACK:8 SHARED:2176 LOCAL:0 CONSTANT[0]:864 TEXTURE:0\n"
    ptxas = "ptxas info    : 8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
    assert usage_of(resources, ptxas) == Usage(155, 8, 2176, 12, 16)
    with pytest.raises(ToolError, match="resources of one kernel, found 2"):
        usage_of(resources * 2, ptxas)


# ---- Budgets ----


def measured(instructions: float = 600.0, **changes: Any) -> Measured:
    cost = TileCost(
        instructions, {"alu": 343.0}, {}, {}, 64, {"16": 10.0}, changes.pop("local", 0), []
    )
    usage = replace(Usage(150, 0, 2000, 0, 0), **changes)
    facts = Facts(128, 4352, 64, 128, 52224, 3)
    return Measured(Instance("Instance<128, 128, K2, V2>"), "90", facts, usage, cost)


def budget(instructions: float) -> dict[str, Any]:
    return {"instances": {"K2-V2-g128-d128 sm_90": {"instructions": instructions}}}


def test_what_stays_within_its_budget_passes() -> None:
    assert faults_of(measured(), budget(600)) == []
    assert faults_of(measured(617), budget(600)) == []
    assert faults_of(measured(500), budget(600)) == []


@pytest.mark.parametrize(
    ("found", "before", "message"),
    [
        (measured(619), 600, "619 warp instructions a tile, the budget is 600: 3.2% more, 3% are"),
        (measured(701), 700, "701 warp instructions a tile, at most 700 are allowed"),
        (measured(spill_stores=4, spill_loads=8), 600, "spills 4 bytes of registers, reads 8 back"),
        (measured(stack=16), 600, "uses local memory: 0 instructions, 16 bytes of stack"),
        (measured(local=2), 600, "uses local memory: 2 instructions"),
    ],
)
def test_what_breaks_its_budget_is_named(found: Measured, before: float, message: str) -> None:
    (fault,) = faults_of(found, budget(before))
    assert fault.startswith("K2-V2-g128-d128 sm_90: ") and message in fault


def test_an_instance_without_budget_is_a_fault() -> None:
    (fault,) = faults_of(measured(), {"instances": {}})
    assert fault.endswith("is not in bench/budgets/sass.json: add it with --update")


def test_predictions_follow_from_the_rates() -> None:
    """By hand: 642 instructions are 642 / 4 / 64 clocks, 4352 bytes 68 a token at 12.95 bytes a clock."""
    h100 = next(g for g in GPUS if g.name == "H100")
    found = measured(642)
    clocks = predict(h100, found.cost, found.facts)
    assert clocks.issue == pytest.approx(2.508, abs=1e-3)
    assert clocks.memory == pytest.approx(5.25, abs=1e-2)
    assert clocks.alu == pytest.approx(2.68, abs=1e-2)
    assert clocks.tensor == pytest.approx(1.59)
    assert clocks.shared == pytest.approx(10 * 16 * 32 / 128 / 64)


def test_figures_are_printed_beside_their_budget() -> None:
    found = measured()
    text = table({found.key: found.as_json()}, budget(612)["instances"])
    assert "600" in text and "612" in text and "H100" in text and "H200" in text


def test_committed_budgets_cover_what_is_built_and_agree() -> None:
    committed = json.loads(BUDGET.read_text())
    want = {f"{i.name} sm_{arch}" for i in all_instances() for arch in ARCHS}
    assert want == set(committed["instances"]), "python bench/sass_budget.py --all --update"
    for (name, arch), limit in LIMITS.items():
        assert committed["instances"][f"{name} sm_{arch}"]["instructions"] <= limit
    for entry in committed["instances"].values():
        assert (
            entry["local"] == entry["spill_stores"] == entry["spill_loads"] == entry["stack"] == 0
        )
        assert entry["unknown"] == []
    assert RESOURCES.read_text() == resources_page(committed)


def tools_missing() -> str:
    try:
        for tool in ("nvcc", "nvdisasm", "cuobjdump"):
            find_tool(tool)
    except ToolError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(tools_missing()), reason=tools_missing() or "tools are there")
def test_kernels_are_within_their_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    status = sass_budget.main(["--check", "--instance", "K2-V(2|1_5)-g128-d128", "--arch", "90"])
    printed = capsys.readouterr()
    assert status == 0, printed.err + printed.out
    assert "K2-V2-g128-d128 sm_90" in printed.out


def test_an_unknown_instance_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert sass_budget.main(["--instance", "K1-V1"]) == 2
    assert "no instance is called 'K1-V1'; there are " in capsys.readouterr().err
