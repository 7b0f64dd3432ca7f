"""Rows, ratios and tables of bench/cpu_peers.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cpu_problem import CpuProblem
from cpu_timing import Side
from rich import box
from rich.table import Table

PEERS = ("torch", "llama_f16", "llama_q8_0", "llama_q4_0")
COLUMNS = ("side", "median ms", "min ms", "calls", "MB", "GB/s", "% of read")


@dataclass(frozen=True)
class Measured:
    """The sides of one problem after their turns, and why others are not among them."""

    problem: CpuProblem
    sides: list[Side]
    skipped: dict[str, str]

    @property
    def bandwidth(self) -> float:
        """Bytes per second of reading memory: of the side that does nothing else."""
        side = next(side for side in self.sides if side.name == "read")
        return side.bytes_moved / side.fastest

    def best(self, peer: str) -> Side | None:
        """The fastest of a peer's sides: torch's formulations, or llama.cpp's layouts of one type."""
        found = (side for side in self.sides if side.rivals == peer)
        return min(found, key=lambda side: side.median, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """One of every side, and one that says why for those that are missing."""
        key = self.problem.key
        missing = [
            {"problem": key, "side": name, "skipped": why} for name, why in self.skipped.items()
        ]
        return [*map(self._row, self.sides), *missing]

    def _row(self, side: Side) -> dict[str, Any]:
        rate = side.bytes_moved / side.fastest
        return {
            **{"problem": self.problem.key, "side": side.name, **asdict(self.problem)},
            **{"median_s": side.median, "min_s": side.fastest},
            **{"calls": max(1, len(side.seconds)), "copies": side.copies},
            **{"bytes": side.bytes_moved, "gb_per_s": rate / 1e9},
            **{"percent_of_read": 100 * rate / self.bandwidth, "error_vs_fp32": side.error},
        }

    def ratios(self, of: str = "median") -> dict[str, float | None]:
        """How many times longer each peer takes than each of ours; None where the peer is missing.

        of: "median" or "fastest".
        """
        best = {peer: self.best(peer) for peer in PEERS}
        best["torch_best"] = best.pop("torch")
        return {
            f"{ours.scheme}_{self.problem.key}{ours.mode}_vs_{peer}": None
            if other is None
            else getattr(other, of) / getattr(ours, of)
            for ours in self.sides
            if ours.scheme
            for peer, other in best.items()
        }

    def table(self) -> Table:
        """The same for people, with the times of each as multiples of ours; a star is with the best of a peer."""
        best = [self.best(peer) for peer in PEERS]
        p, ours = self.problem, [side for side in self.sides if side.scheme and not side.mode]
        title = f"{p.key}: {p.batch} x {p.context} tokens, {p.num_q_heads}/{p.num_kv_heads} heads of {p.head_dim}, "
        title += f"{p.threads} thread{'s' if p.threads > 1 else ''}"
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for index, column in enumerate((*COLUMNS, *(f"x {side.name}" for side in ours))):
            made.add_column(column, justify="right" if index else "left", no_wrap=True)
        for side in self.sides:
            r = self._row(side)
            times = [f"{1e3 * r[name]:.3f}" for name in ("median_s", "min_s")]
            numbers = [f"{r['calls']}", f"{r['bytes'] / 1e6:.1f}", f"{r['gb_per_s']:.2f}"]
            numbers.append(f"{r['percent_of_read']:.0f}")
            if side.name != "read":
                numbers += [f"{side.median / one.median:.2f}" for one in ours]
            star = " *" if side in best else ""
            made.add_row(side.name + star, *times, *numbers)
        return made
