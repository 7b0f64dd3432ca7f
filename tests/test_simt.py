"""The CUDA kernels executed by the emulator of tests/simt, with and without sanitizers (docs/simt.md)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from native_build import ROOT, configured_and_built

CUDA = ROOT / "csrc" / "cuda"
KINDS = ("plain", "asan", "tsan")
# Order of threads, time at which copies arrive, seed.
FIRST = ("in-order", "late", 1)
SCHEDULES = (
    FIRST,
    ("reverse", "early", 1),
    ("random", "random", 2),
    ("random", "late", 3),
    ("warp-greedy", "early", 4),
)
Schedule = tuple[str, str, int]

RACE = r"ThreadSanitizer: data race"
POISON = r"AddressSanitizer: use-after-poison"
OVERFLOW = r"AddressSanitizer: heap-buffer-overflow"
WRONG = r": wrong numbers"


def by_emulator(text: str) -> dict[str, str]:
    return dict.fromkeys(KINDS, f"emulator: .*{text}")


# The broken kernels of tests/simt/broken: which kind of build notices, by what words. Kinds that are not named miss it.
BROKEN = {
    "divergent_barrier": by_emulator(
        r"divergent barrier: .* barriers\.cpp:\d+ while 64 threads wait"
    ),
    "skipped_barrier": by_emulator(r"returns while 64 threads wait in __syncthreads"),
    "early_return": by_emulator(r"returns while 40 threads wait in __syncthreads"),
    "missing_barrier": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "scratch_reused": {"tsan": RACE},
    "deadlock": by_emulator(
        r"deadlock: .*\n  warp 0 lanes ffffffdf wait in __syncthreads at barriers\.cpp:\d+\n"
        r"  warp 0 lanes 00000020 wait in mbarrier\.try_wait of parity 0 at barriers\.cpp:\d+\n"
    ),
    "blocks_write_one_word": {"tsan": RACE},
    "sum_without_atomic": {"tsan": RACE},
    "missing_threadfence": {"tsan": RACE},
    "mask_without_caller": by_emulator(r"mask fffffff7 does not name the calling lane"),
    "masks_differ": by_emulator(r"divergent warp: .* for lanes ffffffff while lanes 00000001 wait"),
    "shuffle_under_condition": by_emulator(r"returns while lanes 0000ffff wait for it in __shfl"),
    "shuffle_at_two_sites": by_emulator(r"divergent warp: .*while lanes 0000ffff wait"),
    "shuffle_from_outside": by_emulator(r"lane 0 reads lane 16, which mask 0000ffff does not name"),
    "shuffle_with_a_lane_gone": by_emulator(r"returns while lanes 7fffffff wait for it"),
    "matrix_product_by_half_a_warp": by_emulator(r"names lanes 0000ffff, which have returned"),
    "missing_syncwarp": {"plain": WRONG, "asan": WRONG, "tsan": RACE},
    "shuffle_instead_of_syncwarp": {"tsan": RACE},
    "missing_wait": {"plain": WRONG, "asan": POISON, "tsan": WRONG},
    "wait_for_too_few": {"plain": WRONG, "asan": POISON, "tsan": WRONG},
    "missing_barrier_after_wait": {"tsan": RACE},
    "refill_too_early": {"tsan": RACE},
    "copies_never_waited_for": by_emulator(r"never waited for the cp\.async at copies\.cpp"),
    "copies_overlap": {"asan": r"emulator: .*a copy to this destination is under way"},
    "misaligned_destination": by_emulator(r"is not aligned to 16 bytes"),
    "misaligned_source": by_emulator(r"thread \(17, 0, 0\).* is not aligned to 16 bytes"),
    "copy_past_shared": by_emulator(r"thread \(127, 0, 0\).* not in the shared memory"),
    "copy_to_global": by_emulator(r"the destination is not in the shared memory"),
    "copy_from_past_the_end": {"asan": r"emulator: block \(2, .*the source is out of bounds"},
    "bulk_missing_wait": {"plain": WRONG, "asan": POISON, "tsan": RACE},
    "bulk_wrong_parity": {"plain": WRONG, "asan": POISON, "tsan": RACE},
    "bulk_parity_of_the_next_phase": by_emulator(
        r"deadlock: (.*\n)+.*mbarrier 0: phase 1, 1 of 1 arrivals missing"
    ),
    "bulk_too_few_bytes": by_emulator(
        r"deadlock: (.*\n)+.*mbarrier 0: .* 0 of 1 arrivals missing, 64 bytes missing"
    ),
    "bulk_refill_too_early": {"plain": WRONG, "asan": POISON, "tsan": RACE},
    "bulk_copies_overlap": {"plain": r"emulator: .*more arrivals", "asan": POISON, "tsan": RACE},
    "bulk_never_waited_for": by_emulator(r"nobody has waited for the cp\.async\.bulk at bulk\.cpp"),
    "bulk_misaligned": by_emulator(r"is not aligned to 16 bytes"),
    "bulk_odd_size": by_emulator(r"72 bytes are no multiple of 16"),
    "bulk_past_shared": by_emulator(r"the destination is not in the shared memory"),
    "barrier_init_unseen": {"tsan": RACE},
    "barrier_written_over": {"plain": r"emulator: .*was written over", "tsan": RACE},
    "too_many_arrivals": by_emulator(r"thread \(2, 0, 0\).* more arrivals than 2"),
    "global_read_past_the_end": {"asan": OVERFLOW},
    "global_write_before_the_start": {"asan": OVERFLOW},
    "shared_read_past_the_end": {"asan": OVERFLOW},
    "dynamic_shared_write_past_the_end": {"asan": OVERFLOW},
    "one_array_into_the_next": {"asan": r"runtime error: index 128 out of bounds"},
    "shift_by_32": {"asan": r"runtime error: shift exponent 32 is too large"},
    "misaligned_vector": {"asan": r"runtime error: .* misaligned address"},
    "shared_read_before_written": dict.fromkeys(KINDS, WRONG),
    "dynamic_shared_read_before_written": dict.fromkeys(KINDS, WRONG),
}

# Faults planted in the kernels that are in use (tests/simt/plants.h), and the words by which the cases find them.
PLANTED = {
    "no_wait": r"CHECK\( largest_difference.* is NOT correct",
    "wrong_parity": r"nobody has waited for the cp\.async\.bulk at ring\.cuh",
    "fragment_order": r"CHECK\( largest_difference.* is NOT correct",
    "read_past_end": r"cp\.async\.bulk at ring\.cuh:\d+: the source is out of bounds",
    "write_past_end": OVERFLOW,
}

SUITES = [
    re.search(r'TEST_SUITE_BEGIN\("(\w+)"\)', source.read_text()).group(1)  # type: ignore[union-attr]
    for source in [
        *(ROOT / "tests" / "cpp" / f"test_{name}.cpp" for name in ("append", "attention")),
        *sorted((ROOT / "tests" / "simt").glob("test_*.cpp")),
    ]
]


# The suites that look closest at the kernels of a source.
CLOSEST = {
    "append.cu": "append_kernels",
    "combine.cu": "attention,decode_kernels",
    "decode.cu": "attention,decode_kernels",
    "heads.cu": "row_kernels",
    "merge.cu": "row_kernels",
    "pages.cu": "row_kernels",
    "rows.cu": "row_kernels",
}


def included(path: Path) -> set[Path]:
    """A kernel source with the headers of csrc/cuda that it includes at any depth."""
    found = {path}
    for name in re.findall(r'^#include "cuda/([\w.]+)"', path.read_text(), re.M):
        if name != "cuda.h":
            found |= included(CUDA / name)
    return found


def barrier_sites() -> dict[str, str]:
    """Every place in the kernels that waits for other threads or for a copy, as file:line, with suites.

    Not those that a comment calls superfluous, and that are there for whoever reads or changes one function.
    """
    call = re.compile(r"\b(__syncthreads|__syncwarp|ptx::barrier_wait)\(")
    suites: dict[Path, list[str]] = {}
    for source, suite in CLOSEST.items():
        for path in included(CUDA / source):
            suites.setdefault(path, []).append(suite)
    return {
        f"{path.name}:{number}": ",".join(dict.fromkeys(suites[path]))
        for path in sorted(CUDA.glob("*.cu*"))
        if path.name != "ptx.cuh"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if call.search(line.split("//")[0]) and "what follows synchronizes too" not in line
    }


@pytest.fixture(scope="session")
def programs() -> Path:
    folder = configured_and_built() / "tests" / "simt"
    if not list(folder.glob("simt_tests_plain")):
        pytest.skip("the emulator needs an x86-64 processor and GCC")
    return folder


@cache
def without_randomization() -> list[str]:
    """GCC's ThreadSanitizer does not start where the kernel spreads addresses too far."""
    setarch = shutil.which("setarch")
    if setarch and subprocess.run([setarch, "-R", "true"], capture_output=True).returncode == 0:
        return [setarch, "-R"]
    return []


def run(
    program: Path, *arguments: str, schedule: Schedule = FIRST, skip: str | None = None
) -> subprocess.CompletedProcess[str]:
    if not program.exists():
        pytest.skip(f"{program.name} was not built: the compiler has not got this sanitizer")
    environment = {
        **os.environ,
        "SKVQ_SIMT_ORDER": schedule[0],
        "SKVQ_SIMT_ASYNC": schedule[1],
        "SKVQ_SIMT_SEED": str(schedule[2]),
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    }
    environment.pop("SKVQ_SIMT_SKIP", None)
    if skip is not None:
        environment["SKVQ_SIMT_SKIP"] = skip
    prefix = without_randomization() if "tsan" in program.name else []
    return subprocess.run(
        [*prefix, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        check=False,
    )


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def assert_passes(done: subprocess.CompletedProcess[str]) -> None:
    output = output_of(done)
    assert done.returncode == 0, output[-6000:]
    assert re.search(r"test cases:\s+([1-9]\d*) \|\s+\1 passed", output), output[-6000:]


# ---- the emulator ----


@pytest.mark.parametrize("kind", KINDS)
def test_emulator(programs: Path, kind: str) -> None:
    assert_passes(run(programs / f"simt_selftest_{kind}"))


def test_no_broken_kernel_is_missed(programs: Path) -> None:
    names = run(programs / "simt_broken_plain", "--list").stdout.split()
    assert sorted(names) == sorted(BROKEN)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_without_the_bug_are_right(programs: Path, kind: str, schedule: Schedule) -> None:
    done = run(programs / f"simt_broken_{kind}", "--right", schedule=schedule)
    lines = output_of(done).splitlines()
    assert lines == [f"{line.split(':')[0]}: right" for line in lines]
    assert len(lines) == len(BROKEN)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in BROKEN.items() for kind in kinds]
)
def test_bug_is_noticed(programs: Path, name: str, kind: str) -> None:
    done = run(programs / f"simt_broken_{kind}", name)
    assert done.returncode != 0
    assert re.search(BROKEN[name][kind], output_of(done)), output_of(done)[-6000:]


# ---- the kernels ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("suite", SUITES)
def test_kernels(programs: Path, suite: str, schedule: Schedule) -> None:
    assert_passes(run(programs / "simt_tests_plain", f"--test-suite={suite}", schedule=schedule))


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("suite", SUITES)
def test_kernels_with_address_sanitizer(programs: Path, suite: str, schedule: Schedule) -> None:
    assert_passes(run(programs / "simt_tests_asan", f"--test-suite={suite}", schedule=schedule))


@pytest.mark.parametrize("suite", SUITES)
def test_kernels_have_no_races(programs: Path, suite: str) -> None:
    """One schedule: which threads race depends on barriers, not on who came first."""
    assert_passes(run(programs / "simt_tests_tsan", f"--test-suite={suite}"))


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(kind, schedule) for kind in KINDS for schedule in SCHEDULES[: 1 if kind == "tsan" else 2]],
)
def test_decode_for_gpus_without_bulk_copies(programs: Path, kind: str, schedule: Schedule) -> None:
    program = programs / f"simt_tests_{kind}_async"
    assert_passes(run(program, "--test-suite=decode_kernels", schedule=schedule))


def test_decode_with_ordinary_halves_for_operands(programs: Path) -> None:
    program = programs / "simt_tests_plain_normal"
    assert_passes(run(program, "--test-suite=attention,decode_kernels"))


# ---- faults in the kernels ----


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found(programs: Path, name: str) -> None:
    done = run(programs / f"simt_planted_{name}", "--test-suite=attention,decode_kernels")
    assert done.returncode != 0
    assert re.search(PLANTED[name], output_of(done)), output_of(done)[-6000:]


@pytest.mark.parametrize(("site", "suites"), barrier_sites().items())
def test_every_barrier_is_needed(programs: Path, site: str, suites: str) -> None:
    """Left out, the cases must show a race, a thread that returns too early, or wrong numbers."""
    for program in ("simt_tests_tsan", "simt_tests_tsan_async"):
        done = run(programs / program, f"--test-suite={suites}", skip=site)
        if done.returncode != 0:
            words = rf"{RACE}|is NOT correct|test case (THREW|CRASHED)"
            assert re.search(words, output_of(done)), output_of(done)[-6000:]
            return
    pytest.fail(f"nothing notices that {site} is left out: is it superfluous, or not tested?")
