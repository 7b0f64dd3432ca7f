"""The stages of a check of a GPU, in the order of what they are worth."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_steps import Step, find_tool, junit_reader, last_line, read_findings, read_sanitizer

ROOT = Path(__file__).resolve().parent.parent

# One letter each for the command line.
STAGES = {
    "build": "",
    "unit": "a",
    "correct": "b",
    "sanitize": "c",
    "graphs": "d",
    "bench": "e",
    "peers": "f",
}
# Names of tests that hold "cuda" and need no device.
NO_DEVICE = "not packaging and not ptx and not simt and not rooms and not gpu_check"
SANITIZERS = {
    "memcheck": ("--leak-check", "full"),
    "racecheck": (),
    "synccheck": (),
    "initcheck": (),
}
HEADS = ("--heads", "8", "--ratio", "4")


@dataclass(frozen=True)
class Settings:
    """What the command line chose. work: where steps leave their own files."""

    arch: str
    quick: bool
    build: Path
    work: Path


def parse_stages(text: str) -> list[str]:
    """Names from a list of names or letters, in the order of STAGES. Raises: ValueError."""
    letters = {letter: name for name, letter in STAGES.items() if letter}
    wanted = {letters.get(word, word) for word in text.split(",") if word}
    unknown = wanted - set(STAGES)
    if unknown or not wanted:
        known = ", ".join(
            f"{name} ({letter})" if letter else name for name, letter in STAGES.items()
        )
        raise ValueError(f"stages {sorted(unknown)} are unknown; possible are {known}")
    return [name for name in STAGES if name in wanted]


def build_steps(s: Settings) -> list[Step]:
    """Configures and builds: first what needs no kernel, so that a kernel that does not compile costs little."""
    has_torch = importlib.util.find_spec("torch") is not None
    generator = ("-G", "Ninja") if find_tool("ninja", os.environ) else ()
    jobs = str(os.cpu_count() or 2)
    configure = (
        *("cmake", "-S", str(ROOT), "-B", str(s.build), *generator, "-DCMAKE_BUILD_TYPE=Release"),
        *("-DSKVQ_CUDA=ON", "-DSKVQ_BENCH=ON", "-DSKVQ_TESTS=OFF"),
        *(f"-DSKVQ_TORCH={'ON' if has_torch else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}"),
    )

    def make(name: str, target: str, limit: float) -> Step:
        command = ("cmake", "--build", str(s.build), "--parallel", jobs, "--target", target)
        cache = (s.build / "CMakeCache.txt",)
        return Step("build", name, command, limit, cache, read=failed_line)

    env = {"TORCH_CUDA_ARCH_LIST": s.arch}
    steps = [
        Step("build", "configure", configure, 120, env=env, read=failed_line),
        make("build checks", "bench_checks", 180),
        make("build kernels", "bench_kernels", 420),
    ]
    if has_torch:
        install = (
            "cmake",
            "--install",
            str(s.build),
            "--component",
            "torch",
            "--prefix",
            str(ROOT),
        )
        built = (s.build / "_C.so",)
        steps += [
            make("build operators", "_C", 240),
            Step("build", "install operators", install, 30, built),
        ]
    return steps


def failed_line(status: int, output: str) -> tuple[dict[str, object], str]:
    """The first line with an error, where a build failed."""
    if status == 0:
        return {}, ""
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    return {}, errors[0][:200] if errors else last_line(status, output)


def bench(s: Settings, name: str, limit: float, *options: str) -> Step:
    """One run of bench_cuda."""
    program, results = s.build / "bench" / "bench_cuda", s.work / f"{name.replace(' ', '-')}.json"
    reps = ("--reps", "10" if s.quick else "20")
    command = (str(program), *options, *reps, "--json", str(results))
    return Step("bench", name, command, limit, (program,), results=results)


def first_figures(s: Settings) -> list[Step]:
    """What a decode step costs where it matters most."""
    contexts = "4096,32768,65536" if s.quick else "4096,16384,32768,65536,131072"
    anchors = (
        "--op",
        "decode",
        "--scheme",
        "k2-v2,k2-v1.5",
        "--context",
        contexts,
        "--batch",
        "1,8",
    )
    fixed = (
        "--op",
        "decode,append,flush",
        "--scheme",
        "k2-v2",
        "--context",
        "4096",
        "--batch",
        "1,16",
    )
    packing = ("--op", "quantize", "--scheme", "k2-v2,k2-v1.5", "--context", "32768,131072")
    return [
        bench(s, "anchors", 90, *anchors, *HEADS, "--split"),
        bench(s, "fixed cost", 60, *fixed, *HEADS, "--graph"),
        bench(s, "packing", 60, *packing, *HEADS),
    ]


def sweeps(s: Settings) -> list[Step]:
    """Every axis by itself, around one shape."""
    if s.quick:
        return []
    middle = ("--op", "decode", "--context", "65536", "--batch", "4")
    schemes = "k4-v4,k4-v2,k3-v2,k3:1/2+2-v1.5,k4:1/4+2-v2,k8-v4"
    return [
        bench(s, "formats", 60, *middle, "--scheme", schemes, *HEADS),
        bench(s, "groups", 60, *middle, "--group", "32,64,128", *HEADS),
        bench(s, "heads", 60, *middle, "--heads", "8,32", "--ratio", "1,8", "--scheme", "k2-v2"),
        bench(s, "queries", 60, *middle, "--q-len", "1,2,4,8", "--dtype", "bf16,f16", *HEADS),
        bench(s, "head dims", 60, *middle, "--head-dim", "64,256", "--group", "64", *HEADS),
    ]


def unit_checks(s: Settings) -> Step:
    """Instructions and memory of the device."""
    program, results = s.build / "bench" / "unit_checks", s.work / "unit-checks.json"
    command = (str(program), "--json", str(results))
    return Step("unit", "unit checks", command, 60, (program,), results=results, read=read_findings)


def device_check(s: Settings, stage: str, name: str, limit: float, *options: str) -> Step:
    """One run of device_check."""
    program, results = s.build / "bench" / "device_check", s.work / f"{name.replace(' ', '-')}.json"
    command = (str(program), *options, "--json", str(results))
    return Step(stage, name, command, limit, (program,), results=results, read=read_findings)


def pytest(s: Settings, stage: str, name: str, limit: float, words: str) -> Step:
    """The tests whose names hold `words`."""
    junit = s.work / f"{name.replace(' ', '-')}.xml"
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    command = (
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers),
        *("-k", f"{words} and {NO_DEVICE}", f"--junitxml={junit}", "tests"),
    )
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    needs = (ROOT / "skvq_ext" / "_C.so",)
    return Step(stage, name, command, limit, needs, read=junit_reader(junit), env=env)


def sanitizers(s: Settings) -> list[Step]:
    """A few cases of every kernel under each tool of compute-sanitizer."""
    program = s.build / "bench" / "device_check"
    steps = []
    for tool, options in SANITIZERS.items():
        # A graph of many launches says nothing new; memory is left alone where reads of it are looked for.
        small = ("--small", "--only", "append,decode,tensors")
        poison = ("--no-poison",) if tool == "initcheck" else ()
        command = (
            *("compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"),
            *(str(program), *small, *poison),
        )
        limit = 45 if s.quick else 120
        steps.append(
            Step(
                "sanitize",
                tool,
                command,
                limit,
                (program,),
                "compute-sanitizer",
                read=read_sanitizer,
            )
        )
    return steps


def peers(s: Settings) -> Step:
    """Beside full precision by others."""
    results, limit = s.work / "peers.json", 90 if s.quick else 240
    command = (
        *(sys.executable, str(ROOT / "bench" / "peers.py"), "--json", str(results)),
        *("--budget", str(limit - 20), *(("--quick",) if s.quick else ())),
    )
    env = {"PYTHONPATH": str(ROOT)}

    def read(status: int, output: str) -> tuple[dict[str, object], str]:
        if "No module named" in output and status != 0:
            return {}, f"skipped: {last_line(status, output)}"
        return {}, "" if status == 0 else last_line(status, output)

    return Step("peers", "peers", command, limit, results=results, read=read, env=env)


def all_steps(s: Settings) -> list[Step]:
    """Everything, what is worth most first: a run may end at any time."""
    checks = ("decode", "graph", "tensors", "append")
    configure, build_checks, *build_rest = build_steps(s)
    return [
        configure,
        build_checks,
        unit_checks(s),
        *build_rest,
        *(
            device_check(
                s, "graphs" if part == "graph" else "correct", f"device {part}", 120, "--only", part
            )
            for part in checks
        ),
        *first_figures(s),
        pytest(s, "graphs", "graph tests", 60 if s.quick else 120, "cuda and graph"),
        peers(s),
        *sanitizers(s),
        pytest(s, "correct", "device tests", 60 if s.quick else 240, "cuda"),
        *sweeps(s),
    ]
