"""What surrounds the code: the build's decisions, versions, and documents that must not lie."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from setuptools import Distribution, Extension
from typer.main import get_command

import skvq_ext
from skvq_ext import cli
from skvq_ext.ops import format_table
from skvq_ext.published.scheme import PublishedScheme
from skvq_ext.scheme import Scheme

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*.md")])


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it builds nothing unless it is the main program."""
    spec = importlib.util.spec_from_file_location("skvq_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that looks like a CUDA toolkit."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def test_cuda_is_chosen_by_toolkit_and_switch(build: ModuleType, toolkit: Path) -> None:
    home, nothing = {"CUDA_HOME": str(toolkit), "PATH": ""}, {"PATH": ""}
    on_path = {"PATH": str(toolkit / "bin")}
    found = f"nvcc at {toolkit}/bin/nvcc"
    assert build.decide_cuda(home) == build.decide_cuda(on_path) == ("AUTO", found)
    assert build.decide_cuda(home | {"SKVQ_CUDA": "1"}) == ("ON", found)
    assert build.decide_cuda(home | {"SKVQ_CUDA": "0"}) == ("OFF", "SKVQ_CUDA=0")
    assert build.decide_cuda(nothing) == ("OFF", "no nvcc in PATH (CUDA_HOME is not set)")


def test_a_broken_cuda_home_is_not_papered_over(build: ModuleType, toolkit: Path) -> None:
    """CUDA_HOME without nvcc does not fall back to whatever nvcc PATH may offer."""
    env = {"CUDA_HOME": "/nowhere", "PATH": str(toolkit / "bin")}
    assert build.decide_cuda(env) == ("OFF", "no nvcc in CUDA_HOME=/nowhere")
    with pytest.raises(SystemExit, match="there is no nvcc in CUDA_HOME=/nowhere"):
        build.decide_cuda(env | {"SKVQ_CUDA": "1"})


def test_asking_for_cuda_fails_loudly(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no nvcc in PATH"):
        build.decide_cuda({"SKVQ_CUDA": "1", "PATH": ""})
    with pytest.raises(SystemExit, match="use 0, 1 or auto"):
        build.decide_cuda({"SKVQ_CUDA": "yes", "PATH": ""})


def configure(folder: Path, cuda: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of CMake for a build without torch."""
    words = ["cmake", "-S", ROOT, "-B", folder, f"-DSKVQ_CUDA={cuda}", "-DSKVQ_TORCH=OFF"]
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_toolkit_that_cannot_compile(toolkit: Path, tmp_path: Path) -> None:
    """AUTO says why and builds for the CPU; ON is an error."""
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'error: no cuda_runtime.h'\nexit 1\n")
    home = {"CUDA_HOME": str(toolkit), "CUDACXX": str(toolkit / "bin" / "nvcc")}
    status, output = configure(tmp_path / "auto", "AUTO", **home)
    assert status == 0
    why = "nvcc cannot build a program (error: no cuda_runtime.h; all of it in"
    assert "skvq: no CUDA kernels in this build: " in output and why in output
    status, output = configure(tmp_path / "on", "ON", **home)
    assert status != 0
    assert "SKVQ_CUDA=ON, but" in output and "error: no cuda_runtime.h" in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("9.0", "skvq: CUDA kernels for 90-real, by nvcc"),
        ("7.0 8.0,9.0+PTX", "skvq: CUDA kernels for 80-real, 90-real, 90-virtual, by nvcc"),
        ("7.0 8.0,9.0+PTX", "skvq: not built for 70-real: unknown to this nvcc, or older than 80"),
        ("7.5", "can compile for none of 75-real"),
        ("Hopper", 'TORCH_CUDA_ARCH_LIST holds "Hopper"; write compute capabilities'),
    ],
)
def test_architectures_are_those_torch_would_take(tmp_path: Path, wanted: str, built: str) -> None:
    _, output = configure(tmp_path, "ON", TORCH_CUDA_ARCH_LIST=wanted)
    assert built in re.sub(r"\s+", " ", output)


def test_wheels_know_the_platform_but_not_the_python(build: ModuleType) -> None:
    extension = Extension(build.EXTENSION, sources=[])
    distribution = Distribution({"name": "skvq_ext", "ext_modules": [extension]})
    wheel = build.PlatformWheel(distribution)
    wheel.finalize_options()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none") and platform != "any"
    assert build.CMakeBuild(distribution).get_ext_filename(build.EXTENSION) == "skvq_ext/_C.so"


def test_setup_stays_thin() -> None:
    assert (ROOT / "setup.py").read_text().count("\n") < 120


def test_versions_agree() -> None:
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    cmake = re.search(r"project\(skvq_ext VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert stated and cmake
    assert stated[1] == cmake[1] == skvq_ext.__version__


def test_the_package_is_typed_and_licensed() -> None:
    assert (ROOT / "skvq_ext" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_format_table_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "layout.md").read_text()
    section = page.split("<!-- formats:")[1].split("\n\n")[1]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines()[2:]]
    table = format_table()
    assert [row[0].strip("`") for row in rows] == [code["name"] for code in table["codes"]]
    for row, code in zip(rows, table["codes"], strict=True):
        assert int(row[1]) == code["levels"]
        assert float(row[3]) == code["bits"]
        assert int(row[4]) == code["bits"] * table["tile_tokens"] * 128 / 8


def test_supported_sizes_are_those_of_the_code() -> None:
    words = (ROOT / "docs" / "layout.md").read_text()
    table = format_table()
    listed = ", ".join(str(d) for d in table["head_dims"][:-1])
    assert f"`head_dim` is {listed} or {table['head_dims'][-1]}" in words
    assert f"groups are {', '.join(str(g) for g in table['groups'])} or" in words


def _shell_lines() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                command = line.removeprefix("$ ").split("#")[0].strip()
                if command:
                    yield path.name, command


def test_documented_commands_exist() -> None:
    """Options and subcommands of `skvq`, targets of make, files of scripts."""
    group = get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for name, line in _shell_lines():
        words = line.split()
        while words and "=" in words[0]:
            words = words[1:]
        program = words[0].rsplit("/", 1)[-1]
        if program == "make":
            assert words[1] in targets, f"{name}: {line}"
            seen += 1
        elif program == "skvq":
            command = group.commands.get(words[1])
            assert command is not None, f"{name}: {line}"
            known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            used = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
            assert used <= {*known, "-", "--help"}, f"{name}: {line}"
            seen += 1
        for word in words[1:]:
            if re.fullmatch(r"[\w/.-]+\.(py|txt|sh)", word):
                assert (ROOT / word).is_file(), f"{name}: {line}"
    assert seen >= 6


def test_documented_schemes_can_be_read() -> None:
    for path in DOCUMENTS:
        for kind, scheme in re.findall(
            r"(published:)?\b(k[\d.]+(?::\d/\d\+[\d.]+)?-v[\d.]+[\w.:/+-]*)", path.read_text()
        ):
            (PublishedScheme if kind else Scheme).parse(scheme.rstrip("-."))


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_examples_of_the_readme_run(tmp_path: Path) -> None:
    """Every Python block that needs no download, one after the other, each on its own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    runnable = [block for block in blocks if "from_pretrained" not in block]
    assert len(blocks) > len(runnable) > 0
    for block in blocks:
        compile(block, "README.md", "exec")
    for number, block in enumerate(runnable):
        script = tmp_path / f"block{number}.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_headline_is_honest() -> None:
    """Sizes the documents state for head_dim 128."""
    for scheme, size in (("k2-v2-g128", 4352), ("k2-v1.5-g128", 3968)):
        assert Scheme.parse(scheme).record_format(128).record_bytes == size
