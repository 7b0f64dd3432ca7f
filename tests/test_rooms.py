"""The rooms of the house and the only directions between them (docs/layout.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}

# room -> rooms whose headers it may include
ALLOWED = {
    "include": {"include"},
    "csrc/core": {"include", "csrc/core"},
    "csrc/cpu": {"include", "csrc/core", "csrc/cpu"},
    "csrc/cuda": {"include", "csrc/core", "csrc/cuda"},
    "csrc/torch": {"include", "csrc/core", "csrc/cpu", "csrc/cuda", "csrc/torch"},
    "tests/cpp": {"include", "csrc/core", "csrc/cpu", "csrc/cuda", "tests/cpp"},
    "tests/simt": {"include", "csrc/core", "csrc/cpu", "csrc/cuda", "tests/cpp", "tests/simt"},
    "tests/ptx": {"include", "csrc/core", "csrc/cuda", "tests/ptx"},
    "bench": {"include", "csrc/core", "csrc/cpu", "csrc/cuda", "bench"},
}
# The one file that knows who compiles the kernels: nvcc, or a host compiler for the emulator.
PLATFORM, EMULATOR = "csrc/cuda/platform.cuh", "tests/simt"
INCLUDE_ROOTS = ("include", "csrc", "tests", ".")
FRAMEWORK = re.compile(r"^(torch/|ATen/|c10/|pybind11/|Python\.h)")
TOOLKIT = re.compile(r"^(cuda|cooperative_groups|cub/|cute/|mma\.h)")
# The programs at the outer edge may use everything; only they, the adapter and calibration know
# transformers.
OUTER_EDGE = {"cli.py", "generation.py", "models.py", "perplexity.py", "report.py"}
OUTER_ROOMS = {"evaluate", "baselines", "published", "lm_eval"}
KNOWS_TRANSFORMERS = {"hf", "observe.py", "calibrate", *OUTER_EDGE, *OUTER_ROOMS}
PYTHON_ROOMS = ("skvq_ext", "tests", "bench", "demo", "examples")
MAX_LINES = 400
MAX_FUNCTION = 60


def cxx_files() -> list[Path]:
    found = {p for room in ALLOWED for p in (ROOT / room).rglob("*") if p.suffix in CXX_SUFFIXES}
    return sorted(p for p in found if "third_party" not in p.parts)


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str | None:
    name = name_of(path)
    return next((room for room in ALLOWED if name.startswith(room + "/")), None)


def code_of(path: Path) -> str:
    """C++ text without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)


def resolve(path: Path, include: str) -> Path | None:
    candidates = (path.parent / include, *(ROOT / root / include for root in INCLUDE_ROOTS))
    return next((c.resolve() for c in candidates if c.is_file()), None)


def imports_of(path: Path) -> set[str]:
    """Dotted names a Python file imports, at any depth; relative imports made absolute."""
    names: set[str] = set()
    package = name_of(path.parent).replace("/", ".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_the_tree_is_there() -> None:
    assert cxx_files(), "no C++ found: this test would pass on nothing"
    assert python_files("skvq_ext")


@pytest.mark.parametrize("path", cxx_files(), ids=name_of)
def test_includes_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    assert room is not None
    for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
        target = resolve(path, include)
        if target is not None and (other := room_of(target)) is not None:
            allowed = ALLOWED[room] | ({EMULATOR} if name_of(path) == PLATFORM else set())
            assert other in allowed, f"{room} may not include {include} of {other}"
        elif FRAMEWORK.match(include):
            assert room == "csrc/torch", f"only csrc/torch may include <{include}>"
        elif TOOLKIT.match(include):
            assert room in {"csrc/cuda", "csrc/torch", "tests/simt", "tests/ptx", "bench"}, include


@pytest.mark.parametrize("path", cxx_files(), ids=name_of)
def test_inline_assembly_lives_in_one_file(path: Path) -> None:
    """One for GPUs and one for AVX2; the emulator of tests/simt changes stacks, for which C++ has no words."""
    homes = {"csrc/cuda/ptx.cuh", "csrc/cpu/simd_avx2.h", "tests/simt/switch.h"}
    if name_of(path) not in homes:
        assert not re.search(r"\b(asm|__asm__)\b", code_of(path))


@pytest.mark.parametrize("path", cxx_files(), ids=name_of)
def test_host_code_throws_instead_of_dying(path: Path) -> None:
    if (room_of(path) or "").startswith(("include", "csrc")):
        found = re.findall(r"(?<![\w:])(?:std::)?(assert|exit|abort|_Exit)\s*\(", code_of(path))
        assert not found, "errors are exceptions with what, found, why and what to do"


@pytest.mark.parametrize("path", [*cxx_files(), *python_files(*PYTHON_ROOMS)], ids=name_of)
def test_files_stay_small(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines < MAX_LINES, f"{lines} lines; cut it where its parts have names of their own"


@pytest.mark.parametrize("path", python_files(*PYTHON_ROOMS), ids=name_of)
def test_functions_stay_small(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < MAX_FUNCTION, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", python_files("skvq_ext", "demo"), ids=name_of)
def test_one_module_spells_the_ops(path: Path) -> None:
    if name_of(path) != "skvq_ext/ops.py":
        assert not re.search(r"\bops\.skvq\b", path.read_text()), "call skvq_ext.ops instead"


@pytest.mark.parametrize("path", python_files("skvq_ext"), ids=name_of)
def test_python_imports_follow_the_arrows(path: Path) -> None:
    parts = path.relative_to(ROOT / "skvq_ext").parts
    imported = imports_of(path)
    if parts[0] not in KNOWS_TRANSFORMERS:
        assert not {n for n in imported if n.split(".")[0] == "transformers"}
    command = parts[-1] == "command.py"  # a piece of cli.py, kept where its subject is
    if parts[0] not in {"hf", *OUTER_EDGE, *OUTER_ROOMS} and not command:
        assert not {n for n in imported if n.startswith("skvq_ext.hf")}
        outer = {f"skvq_ext.{name.removesuffix('.py')}" for name in OUTER_EDGE - {"report.py"}}
        assert not imported & outer


def test_the_reference_computes_nothing_with_the_ops() -> None:
    """Sizes come from the one definition; what is computed is computed independently."""
    path = ROOT / "skvq_ext" / "reference.py"
    allowed = {"skvq_ext.ops", "skvq_ext.ops.format_table"}
    assert {n for n in imports_of(path) if n.startswith("skvq_ext.ops")} <= allowed
    assert not {n for n in imports_of(path) if "cache" in n}


def test_nothing_is_pickled() -> None:
    for path in python_files("skvq_ext", "demo"):
        assert not imports_of(path) & {"pickle", "joblib", "shelve"}, name_of(path)
        text = path.read_text()
        if name_of(path) == "skvq_ext/published/reorder_file.py":  # what the original writes
            text = text.replace("weights_only=True", "").replace("torch.load(", "", 1)
            assert "weights_only=True" in path.read_text()
        assert not re.search(r"\btorch\.(save|load)\(", text), name_of(path)
