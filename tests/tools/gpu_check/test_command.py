"""`python tools/gpu_check` as a stranger starts it: from the checkout, with torch, Triton and numpy alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.contract import SELECTIVE_SCAN
from mdm.plugins.gpu.counts import CHIPS
from mdm.plugins.gpu.variants import Plan
from mdm.tools.gpu_check import __main__ as command
from mdm.tools.gpu_check.about import About
from mdm.tools.gpu_check.cases import Case, selective
from mdm.tools.gpu_check.measure import Ceilings, Time
from mdm.tools.gpu_check.runners import Buffers, SourceRunner
from mdm.tools.gpu_check.sanitize import Sanitized

ROOT = Path(__file__).parents[3]
# torch, Triton and numpy, and what these import.
NEEDED = (
    "torch", "torchgen", "functorch", "triton", "numpy", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
    "fsspec", "filelock",
)  # fmt: skip
# What every part of it imports, in a process where mdm and its dependencies are not installed.
IMPORT_ALL = f"""
import runpy, sys
from pathlib import Path
names = runpy.run_path({str(ROOT / "tools/gpu_check/__main__.py")!r})["make_names"]()
from importlib import import_module
for file in sorted(Path({str(ROOT / "tools/gpu_check")!r}).glob("[a-z]*.py")):
    import_module("mdm.tools.gpu_check." + file.stem)
import mdm.plugins
print(Path(mdm.plugins.__file__).parent == Path(names.name) / "mdm" / "plugins", "click" in sys.modules)
"""


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment for `python -S`: the site is a folder of links to what a GPU machine has."""
    folder = tmp_path_factory.mktemp("site")
    for name in NEEDED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin)
        path = path.parent if path.name == "__init__.py" else path
        (folder / path.name).symlink_to(path)
    libraries = Path(str(distribution("numpy").locate_file("numpy.libs")))
    if libraries.exists():
        (folder / "numpy.libs").symlink_to(libraries)
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def start(bare: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)


def test_it_imports_no_more_than_it_may(bare: dict[str, str]) -> None:
    done = start(bare, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("chip", CHIPS)
def test_counts(bare: dict[str, str], chip: str) -> None:
    done = start(bare, "tools/gpu_check", "--counts", chip)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert CHIPS[chip].name in lines[0]
    [place] = [i for i, line in enumerate(lines) if line.startswith("| SSD B2 L1064 H64 P64 N128 bf16")]
    assert lines[place].split("|")[2].strip() == "floor"
    assert lines[place + 1].split("|")[2].strip() == "ours"
    if chip == "H200":
        assert lines[place].split("|")[-3:-1] == ["     11.2 ", "   memory "]


def test_an_unknown_chip(bare: dict[str, str]) -> None:
    done = start(bare, "tools/gpu_check", "--counts", "H300")
    assert done.returncode == 2
    assert done.stderr == "Error: there is no chip 'H300' in the counts\nknown: H200, A100, RTX4090, Orin\n"


def test_without_a_driver(bare: dict[str, str], tmp_path: Path) -> None:
    """Where there is a GPU, its driver's library is hidden: the name is looked up, so an empty file stands for it."""
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    hidden = {**bare, "LD_LIBRARY_PATH": str(tmp_path)}
    done = start(hidden, "tools/gpu_check", "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stderr.startswith("Error: no NVIDIA driver: libcuda.so.1 cannot be loaded\nfound: ")
    assert len(done.stderr.splitlines()) == 3
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_wrong_word(bare: dict[str, str]) -> None:
    done = start(bare, "tools/gpu_check", "--part", "everything")
    assert done.returncode == 2
    assert "invalid choice: 'everything'" in done.stderr


@pytest.fixture
def small_gpu(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> SourceRunner:
    """Triton's interpreter in the place of a GPU, one tiny scan in the place of all, and a stopwatch that makes up."""
    case = Case(SELECTIVE_SCAN, "float32", selective(1, 5, 16), has=7)
    time = Time(10.0, 9.0, 11.0, 20)

    class Watch:
        def time(self, call: Any) -> Time:
            call()
            return time

    here = "mdm.tools.gpu_check"
    about = About("Tiny GPU", 132, (9, 0), 1.98e9, "today", "python tools/gpu_check", {}, {})
    for name, stand_in in {
        "mdm.plugins.gpu.driver.Driver": lambda: None,
        "torch.cuda.is_available": lambda: True,
        f"{here}.runners.open_pack": lambda pack: interpreter,
        f"{here}.about.look": lambda runner, words: about,
        f"{here}.cases.small": lambda count=None: [case],
        f"{here}.sanitize.sanitize": lambda out, words, left: [Sanitized("memcheck", False, True, "is not here")],
        f"{here}.measure.Stopwatch": Watch,
        f"{here}.measure.ceilings": lambda watch: Ceilings(4e12, 4e14, time),
        f"{here}.times.TIMED": (case,),
        f"{here}.times.rivals_of": lambda case: (),
    }.items():
        monkeypatch.setattr(name, stand_in)
    return interpreter


def test_all_parts_in_one_call(small_gpu: SourceRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--cases", "1", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    written = (tmp_path / "gpu_check.md").read_text()
    assert told.out == f"{written}\nwrote {tmp_path}/gpu_check.md {tmp_path}/gpu_check.json\n"
    for title in (
        "# GPU check: Tiny GPU",
        "1 runs of 1 scans",
        "* memcheck: not run",
        "## Ceilings",
        "## Times",
        "## Goals",
    ):
        assert title in written
    assert "s  times: selective_scan float32" in told.err


def test_one_part(small_gpu: SourceRunner, tmp_path: Path) -> None:
    assert command.main(["--part", "times", "--out", str(tmp_path)]) == 0
    written = (tmp_path / "gpu_check.md").read_text()
    assert ("## Times" in written, "float64" in written) == (True, False)


def test_a_wrong_kernel_ends_with_1(small_gpu: SourceRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(plan: Plan, buffers: Buffers) -> None:
        buffers["y"].zero_()

    monkeypatch.setattr(small_gpu, "launch", wrong)
    assert command.main(["--part", "verify", "--cases", "1", "--out", str(tmp_path)]) == 1
    assert "error 1, at most 1e-06 expected" in (tmp_path / "gpu_check.md").read_text()
