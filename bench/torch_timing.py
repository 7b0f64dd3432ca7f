"""Times of calls on a CUDA device: events around passes over rotating buffers, as one CUDA graph and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Call = Callable[[], object]

WAIT_CYCLES = 2_000_000  # about a millisecond: long enough to queue a pass behind it


@dataclass(frozen=True)
class Times:
    """Microseconds of one call.

    us, median_us: replayed from a CUDA graph. eager_us: launched by the host, fastest pass, with the pass queued before
    the clock starts. no_graph: why there is no graph; us and median_us are then those of eager launches.
    """

    us: float
    median_us: float
    eager_us: float
    no_graph: str = ""


def passes(enqueue: Call, repetitions: int) -> list[float]:
    """Milliseconds of each of several passes, the device kept busy until a pass is queued."""
    samples = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        enqueue()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return samples


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_calls(calls: Sequence[Call], repetitions: int) -> Times:
    """Times of one of `calls`, which do the same on different buffers.

    Raises: whatever a call raises when it runs by itself.
    """

    def run_all() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    per_call = 1e3 / len(calls)
    eager = [x * per_call for x in passes(run_all, repetitions)]
    try:
        graph = capture(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Times(min(eager), median(eager), min(eager), str(error).splitlines()[0])
    graph.replay()
    replayed = [x * per_call for x in passes(graph.replay, repetitions)]
    return Times(min(replayed), median(replayed), min(eager))


def copy_bandwidth(repetitions: int) -> float:
    """Bytes read and written per second by the fastest copy of a large tensor on this device."""
    count = min(1 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    fastest = min(passes(lambda: target.copy_(source), repetitions))
    return 2 * count / fastest * 1e3
