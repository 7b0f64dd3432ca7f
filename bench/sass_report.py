"""Figures of bench/sass_budget.py as text."""

from __future__ import annotations

from typing import Any

Entries = dict[str, dict[str, Any]]
PIPE_COLUMNS = (
    *("alu", "fma", "imad", "tensor", "shared load", "special", "transpose"),
    *("other memory", "uniform", "control"),
)


def rows_to_text(rows: list[list[str]]) -> str:
    """Columns as wide as they must be, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table(found: Entries, budget: Entries) -> str:
    """What was found beside the budget, and what that predicts."""
    rows = [
        [
            "instance",
            "instr/tile",
            "budget",
            *PIPE_COLUMNS,
            "HMMA",
            "LDS.128",
            "regs",
            "shared",
            "spill",
        ]
    ]
    for name, entry in found.items():
        before = budget.get(name)
        rows.append(
            [
                name,
                f"{entry['instructions']:.0f}",
                "-" if before is None else f"{before['instructions']:.0f}",
                *(f"{entry['pipes'].get(pipe, 0):.0f}" for pipe in PIPE_COLUMNS),
                str(entry["hmma"]),
                f"{entry['shared_loads'].get('16', 0):.0f}",
                str(entry["registers"]),
                str(entry["static_shared"] + entry["dynamic_shared"]),
                str(entry["spill_stores"] + entry["local"]),
            ]
        )
    return f"{rows_to_text(rows)}\n\n{predictions(found)}"


def predictions(found: Entries) -> str:
    """Clocks of a multiprocessor for a token of one KV head. The largest of a row is the limit that is predicted."""
    rows = [
        [
            "clocks/token-head",
            "GPU",
            "bytes",
            "issue",
            "ALU",
            "FMA",
            "tensor",
            "shared",
            "issue/bytes",
            "limit",
        ]
    ]
    for name, entry in found.items():
        for gpu, clocks in entry["clocks_per_token"].items():
            limits = {k: clocks[k] for k in ("memory", "issue", "alu", "fma", "tensor", "shared")}
            rows.append(
                [
                    name,
                    gpu,
                    *(f"{v:.2f}" for v in limits.values()),
                    f"{clocks['issue'] / clocks['memory']:.0%}",
                    max(limits, key=lambda k: limits[k]),
                ]
            )
    return rows_to_text(rows)


RESOURCES_HEAD = """# Resources of the decode kernels

Made by `python bench/sass_budget.py --all --update` with {compiler}. A line is an instance of `csrc/cuda/instances`
with FP8 metadata. Instructions are those of a warp for a tile of 64 tokens, as `bench/sass_budget.py` counts them;
clocks are those of a multiprocessor for a token of one KV head, if issuing instructions or moving bytes were all.

"""
COLUMNS = (
    *("instance", "arch", "registers", "threads", "shared bytes", "stack", "spilled bytes"),
    *("blocks a multiprocessor", "instructions", "16-byte loads", "issue clocks of byte clocks"),
)


def resources_page(budget: dict[str, Any]) -> str:
    """The table of bench/budgets/resources.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, e in budget["instances"].items():
        instance, arch = name.split()
        shares = "; ".join(
            f"{c['issue']:.2f} of {c['memory']:.2f} ({c['issue'] / c['memory']:.0%}, {gpu})"
            for gpu, c in e["clocks_per_token"].items()
        )
        cells = (
            *(
                instance,
                arch,
                e["registers"],
                e["threads"],
                e["static_shared"] + e["dynamic_shared"],
                e["stack"],
            ),
            *(e["spill_stores"] + e["spill_loads"], e["blocks"], round(e["instructions"])),
            *(round(e["shared_loads"].get("16", 0)), shares),
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return RESOURCES_HEAD.format(compiler=budget["compiler"]) + "\n".join(lines) + "\n"
