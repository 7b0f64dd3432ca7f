"""What a GPU allows a tile, and what the machine code takes of it: predictions, to be put beside measurements."""

from __future__ import annotations

from dataclasses import dataclass

from sass_build import Facts
from sass_loop import TileCost

TILE_TOKENS = 64
WARP = 32


@dataclass(frozen=True)
class Gpu:
    """Rates of one multiprocessor and clock.

    Lanes a clock: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions". Bandwidth: what large
    copies reach, about nine tenths of the data sheet (A100 80 GB 2.04, H100 SXM 3.35, H200 4.8 TB/s). Clock: sustained.
    hmma_clocks of m16n8k16: 2048 products at 1024 a clock (A100, data sheet), and on Hopper at 62.9 % of 2048 a clock,
    which is what mma.sync reaches there (arXiv 2402.13499, section 4).
    """

    name: str
    arch: str
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # Hz
    hmma_clocks: float
    fma_lanes: int
    issue: int = 4  # warp instructions a clock
    alu_lanes: int = 64
    imad_lanes: int = 64
    special_lanes: int = 16
    shared_bytes: int = 128

    @property
    def bytes_per_clock(self) -> float:
        return self.bandwidth / self.multiprocessors / self.clock


GPUS = (
    Gpu("A100", "80", 1.84e12, 108, 1.41e9, 2.0, 64),
    Gpu("H100", "90", 3.0e12, 132, 1.755e9, 1.59, 128),
    Gpu("H200", "90", 4.3e12, 132, 1.755e9, 1.59, 128),
)


@dataclass(frozen=True)
class Prediction:
    """Clocks of one multiprocessor for a token of one KV head, by what could be the limit."""

    gpu: str
    memory: float
    issue: float
    alu: float
    fma: float
    tensor: float
    shared: float

    @property
    def binding(self) -> str:
        limits = {
            n: getattr(self, n) for n in ("memory", "issue", "alu", "fma", "tensor", "shared")
        }
        return max(limits, key=lambda name: limits[name])

    def share(self, limit: str) -> float:
        """Clocks of a limit over those that the bytes alone take."""
        return float(getattr(self, limit)) / self.memory


def predict(gpu: Gpu, cost: TileCost, facts: Facts) -> Prediction:
    def lanes(pipe: str, rate: int) -> float:
        return cost.pipes.get(pipe, 0.0) * WARP / rate / TILE_TOKENS

    loaded = sum(int(width) * WARP * count for width, count in cost.shared_loads.items())
    return Prediction(
        gpu=gpu.name,
        memory=facts.record_bytes / TILE_TOKENS / gpu.bytes_per_clock,
        issue=cost.instructions / gpu.issue / TILE_TOKENS,
        alu=lanes("alu", gpu.alu_lanes),
        fma=lanes("fma", gpu.fma_lanes) + lanes("imad", gpu.imad_lanes),
        tensor=cost.hmma * gpu.hmma_clocks / TILE_TOKENS,
        shared=loaded / gpu.shared_bytes / TILE_TOKENS,
    )
