"""What a tile costs in the decode kernels, from their machine code: no GPU needed.

    python bench/sass_budget.py                      # instances that stand for the rest, sm_80 and sm_90
    python bench/sass_budget.py --check              # fails on spills, local memory, or a tile that costs more
    python bench/sass_budget.py --all --update       # rewrites bench/budgets
    python bench/sass_budget.py --instance 'K2-V2-g(64|128)-d128' --arch 90 --json -

Each instance is compiled by itself (about 15 s of a core). Counted are the warp instructions of the loop over packed
tiles, each weighted with how often it runs a tile (REGIONS). bench/budgets/sass.json holds the figures to compare with,
bench/budgets/resources.md the same for people. Needs nvcc, and from PyPI nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sass_build import (
    ROOT,
    Facts,
    Instance,
    ToolError,
    Usage,
    all_instances,
    compile_instance,
    compiler_version,
    listing,
    read_facts,
)
from sass_limits import GPUS, predict
from sass_loop import Lines, NoLoopError, Region, TileCost, locate_region, parse_listing, tile_cost
from sass_report import resources_page, table

BUDGETS = ROOT / "bench" / "budgets"
BUDGET, RESOURCES = BUDGETS / "sass.json", BUDGETS / "resources.md"
TOLERANCE = 0.03
ARCHS = ("80", "90")
# These stand for the rest: every way of reading codes, every group size once, a wide head.
USUAL = (
    *("K2-V2-g128-d128", "K2-V1_5-g128-d128", "K2-V2-g64-d128", "K2-V2-g32-d128"),
    *("K3-V2-g128-d128", "K4-V4-g128-d128", "K3Half2-V1_5-g128-d128", "K2-V2-g128-d256"),
)
# Warp instructions a tile may cost at most, whatever the budget says.
LIMITS = {("K2-V2-g128-d128", "90"): 700.0, ("K2-V1_5-g128-d128", "90"): 950.0}

REGIONS = (
    Region(
        "restricted tile",
        "csrc/cuda/decode_kernel.cuh",
        r"if \([^{]*tile < [\w.]*plain\.begin",
        0.0,
        "only tiles that a sliding window cuts, and options that change logits",
    ),
    Region(
        "raised reference",
        "csrc/cuda/sums.cuh",
        r"void raise_reference",
        0.0,
        "only where a logit exceeds all before it by the headroom",
    ),
    Region(
        "page look-up",
        "csrc/cuda/decode_kernel.cuh",
        r"if \(looked_up == kWarp\)",
        1.0 / 32.0,
        "32 pages at once",
    ),
    Region(
        "fp16 metadata",
        "csrc/cuda/packed_tiles.cuh",
        r"if \(fp16\)",
        0.0,
        "the budget is that of FP8 metadata",
    ),
)
PARTS = (
    Region("logits", "csrc/cuda/packed_tiles.cuh", r"void tile_logits", 1.0, ""),
    Region("values", "csrc/cuda/packed_tiles.cuh", r"void tile_values", 1.0, ""),
    Region("copies", "csrc/cuda/ring.cuh", r"struct AsyncRing", 1.0, ""),
    Region("copies", "csrc/cuda/ring.cuh", r"struct BulkRing", 1.0, ""),
    Region("pages", "csrc/cuda/decode_kernel.cuh", r"struct RecordQueue", 1.0, ""),
)


@dataclass(frozen=True)
class Measured:
    """One instance for one architecture."""

    instance: Instance
    arch: str
    facts: Facts
    usage: Usage
    cost: TileCost

    @property
    def key(self) -> str:
        return f"{self.instance.name} sm_{self.arch}"

    def as_json(self) -> dict[str, Any]:
        cost = asdict(self.cost)
        for name in ("pipes", "parts", "shared_loads"):
            cost[name] = {k: round(v, 2) for k, v in sorted(cost[name].items())}
        cost["instructions"] = round(self.cost.instructions, 2)
        gpus = [gpu for gpu in GPUS if gpu.arch == self.arch]
        predicted = {
            gpu.name: {
                k: round(v, 3)
                for k, v in asdict(predict(gpu, self.cost, self.facts)).items()
                if k != "gpu"
            }
            for gpu in gpus
        }
        return {**cost, **asdict(self.usage), **asdict(self.facts), "clocks_per_token": predicted}


def measure(
    instance: Instance,
    arch: str,
    facts: Facts,
    folder: Path,
    regions: tuple[list[Lines], list[Lines]],
) -> Measured:
    """Compiles an instance and counts."""
    cubin, usage = compile_instance(instance, arch, folder)
    functions = [f for f in parse_listing(listing(cubin)) if "attend_kernel" in f.name]
    if len(functions) != 1:
        raise NoLoopError(f"{cubin.name}: expected one attend_kernel, found {len(functions)}")
    rare, parts = regions
    return Measured(
        instance, arch, facts, usage, tile_cost(functions[0], rare, parts, facts.products)
    )


def measure_all(instances: Sequence[Instance], archs: Sequence[str], jobs: int) -> list[Measured]:
    regions = [locate_region(r, ROOT) for r in REGIONS], [locate_region(r, ROOT) for r in PARTS]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        facts = read_facts(list(instances), folder)
        work = [(i, arch) for i in instances for arch in archs]
        return list(pool.map(lambda w: measure(w[0], w[1], facts[w[0]], folder, regions), work))


def faults_of(found: Measured, budget: dict[str, Any]) -> list[str]:
    """Why an instance may not stay as it is."""
    faults = []
    usage, cost = found.usage, found.cost
    if usage.spill_stores or usage.spill_loads:
        faults.append(
            f"spills {usage.spill_stores} bytes of registers, reads {usage.spill_loads} back"
        )
    if cost.local or usage.stack:
        faults.append(f"uses local memory: {cost.local} instructions, {usage.stack} bytes of stack")
    limit = LIMITS.get((found.instance.name, found.arch))
    if limit is not None and cost.instructions > limit:
        faults.append(
            f"{cost.instructions:.0f} warp instructions a tile, at most {limit:.0f} are allowed"
        )
    before = budget["instances"].get(found.key)
    if before is None:
        faults.append("is not in bench/budgets/sass.json: add it with --update")
    elif cost.instructions > before["instructions"] * (1 + TOLERANCE):
        more = cost.instructions / before["instructions"] - 1
        faults.append(
            f"{cost.instructions:.0f} warp instructions a tile, the budget is {before['instructions']:.0f}: "
            f"{more:.1%} more, {TOLERANCE:.0%} are tolerated. Make it cheaper, or accept it with --update"
        )
    return [f"{found.key}: {fault}" for fault in faults]


def read_budget() -> dict[str, Any]:
    if not BUDGET.exists():
        return {"compiler": None, "tolerance": TOLERANCE, "instances": {}}
    budget: dict[str, Any] = json.loads(BUDGET.read_text(encoding="utf-8"))
    return budget


def update(measured: Sequence[Measured], budget: dict[str, Any], compiler: str) -> None:
    """Rewrites the committed files; instances that were not measured now stay, those that are gone go."""
    names = {i.name for i in all_instances()}
    instances = {k: v for k, v in budget["instances"].items() if k.split()[0] in names}
    instances |= {m.key: m.as_json() for m in measured}
    new = {
        "compiler": compiler,
        "tolerance": TOLERANCE,
        "weights": {r.name: f"{r.weight:.5g}: {r.because}" for r in REGIONS},
        "instances": dict(sorted(instances.items())),
    }
    BUDGETS.mkdir(exist_ok=True)
    BUDGET.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    RESOURCES.write_text(resources_page(new), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--instance", help="regular expression; default: a few that stand for the rest"
    )
    parser.add_argument("--all", action="store_true", help="every instance of csrc/cuda/instances")
    parser.add_argument("--arch", action="append", help="80, 90, ...; may be repeated")
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 where a budget is broken"
    )
    parser.add_argument("--update", action="store_true", help="make what is found the budget")
    parser.add_argument("--json", metavar="FILE", help="all figures; - for standard output")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> list[Instance]:
    instances = all_instances()
    if options.all:
        return instances
    if options.instance:
        chosen = [i for i in instances if re.fullmatch(options.instance, i.name)]
    else:
        chosen = [i for i in instances if i.name in USUAL]
    if not chosen:
        names = ", ".join(i.name for i in instances)
        raise ToolError(f"no instance is called {options.instance!r}; there are {names}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        measured = measure_all(choose(options), options.arch or ARCHS, options.jobs)
        compiler = compiler_version()
    except (ToolError, NoLoopError) as error:
        print(f"sass_budget: {error}", file=sys.stderr)
        return 2
    budget = read_budget()
    figures = {"compiler": compiler, "instances": {m.key: m.as_json() for m in measured}}
    if options.json == "-":
        print(json.dumps(figures, indent=1))
    else:
        print(table(figures["instances"], budget["instances"]))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.update:
        update(measured, budget, compiler)
        budget = read_budget()
    if not options.check:
        return 0
    if budget["compiler"] != compiler:
        print(f"the budget was made by {budget['compiler']}, this is {compiler}", file=sys.stderr)
    faults = [fault for m in measured for fault in faults_of(m, budget)]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
