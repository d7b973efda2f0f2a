"""The shape of the project: which folder may import which, what the wheel holds, what stands at the top."""

from __future__ import annotations

import ast
import fnmatch
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest

from mdm.plugins.errors import EnvironmentLackError
from mdm.runtime import require_engine

ROOT = Path(__file__).resolve().parent.parent

# floor -> the other floors it may import
ALLOWED = {
    "plugins": set(),
    "runtime": {"plugins"},
    "reference": {"plugins"},
    "export": {"plugins", "runtime", "reference"},
    "tools": {"plugins", "runtime", "reference", "export"},
}
TOP_LEVEL = {*ALLOWED, "tests", "pyproject.toml", "README.md", "LICENSE"}
TOP_LEVEL |= {".ci", ".git", ".gitignore", ".gitattributes"}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """The dotted name of everything an import statement anywhere in a source asks for."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def faults(floor: str, source: str, package: str) -> list[str]:
    """The imports in a source of this floor that the design does not allow."""
    found = []
    for module in imported_modules(source, package):
        first, second, *_ = [*module.split("."), ""]
        beside = first in ALLOWED  # "import reference": works in a checkout only
        above = first == "mdm" and second not in {floor, *ALLOWED[floor]}
        heavy = floor == "runtime" and first in {"torch", "onnx", "onnxscript"}
        if beside or above or heavy:
            found.append(module)
    return found


@pytest.mark.parametrize("floor", ALLOWED)
def test_floors_import_only_what_lies_below(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    found = {}
    for file in files:
        package = ".".join(("mdm", *file.parent.relative_to(ROOT).parts))
        found[str(file)] = faults(floor, file.read_text(), package)
    assert {file: bad for file, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("floor", "source"),
    [
        ("plugins", "import mdm.runtime"),
        ("runtime", "from mdm import reference"),
        ("runtime", "def f():\n    import torch.nn as nn"),
        ("runtime", "from onnx import helper"),
        ("reference", "from mdm.runtime.solver import table"),
        ("reference", "from ..tools import main"),
        ("plugins", "from .. import runtime"),
        ("export", "from mdm.tools.main import main"),
        ("tools", "import reference.dim"),
    ],
)
def test_a_forbidden_import_is_found(floor: str, source: str) -> None:
    assert faults(floor, source, f"mdm.{floor}")


IMPORT = """
import sys, time
start = time.process_time()
import mdm.runtime
print(time.process_time() - start, *{name.partition(".")[0] for name in sys.modules})
"""


def test_importing_the_runtime_is_quick_and_loads_nothing_heavy(figure: Callable[[str, float, float], None]) -> None:
    """CPU time of the import alone, without Python's own start; the least of a few, for others use this machine too."""
    seconds = []
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        spent, *loaded = run.stdout.split()
        seconds.append(float(spent))
        assert "mdm" in loaded
        assert (
            set(loaded) & {"torch", "onnx", "onnxscript", "onnxruntime", "click", "rich", "PIL", "sentencepiece"}
            == set()
        )
    figure("import of mdm.runtime, seconds of CPU time", min(seconds), 0.35)


def test_a_missing_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm.runtime.ort.find_spec", lambda name: None)
    with pytest.raises(EnvironmentLackError, match=r"(?s)mdm-deploy\[cpu\].*mdm-deploy\[gpu\]") as caught:
        require_engine()
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_an_engine_is_enough() -> None:
    require_engine()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names inside a wheel of this tree, built as on a machine without a compiler: without the native part."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core (extra dev) builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import scikit_build_core.build as b; b.build_wheel({str(folder)!r})"
    lacking = {**os.environ, "CXX": "/nowhere/c++"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=lacking, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_every_module_and_its_data(wheel_names: list[str]) -> None:
    expected = set()
    for floor in ALLOWED:
        expected.add(f"mdm/{floor}/py.typed")
        expected |= {f"mdm/{file.relative_to(ROOT)}" for file in (ROOT / floor).rglob("*.py")}
    assets = [file for file in (ROOT / "reference" / "assets").rglob("*") if file.is_file()]
    expected |= {f"mdm/{file.relative_to(ROOT)}" for file in assets}
    expected |= plugin_sources()
    assert expected - set(wheel_names) == set()


def plugin_sources() -> set[str]:
    """Of the TensorRT plugins in C++: `mdm plugin build` compiles them on the machine that has TensorRT's headers."""
    files = [file for folder in ("tensorrt", "gpu") for file in (ROOT / "plugins" / folder).rglob("*")]
    native = {file for file in files if file.suffix in (".cpp", ".h", ".map") or file.name == "CMakeLists.txt"}
    return {f"mdm/{file.relative_to(ROOT)}" for file in {*native, ROOT / "plugins" / "contract.cmake"}}


def test_the_wheel_holds_nothing_else(wheel_names: list[str]) -> None:
    scripts = {f"mdm/{file.relative_to(ROOT)}" for file in (ROOT / "tools").iterdir() if file.suffix == ""}
    assert {"mdm/tools/demo", "mdm/tools/test"} <= scripts
    assert scripts & set(wheel_names) == set()
    assert [n for n in wheel_names if not n.startswith(("mdm/", "mdm_deploy-"))] == []
    assert "mdm/__init__.py" not in wheel_names
    # What an ONNX Runtime on the CPU takes is compiled when the wheel is made: its sources stay out.
    native = {n for n in wheel_names if n.endswith((".cpp", ".h", ".map", ".cmake", "CMakeLists.txt"))}
    assert native == plugin_sources()
    assert [n for n in wheel_names if n.endswith((".sh", ".pyc", ".so"))] == []
    assert {n.split("/")[1] for n in wheel_names if n.startswith("mdm/")} == set(ALLOWED)


def test_the_top_level_holds_only_what_the_design_names() -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    made = [line.strip("/") for line in lines if line and not line.startswith("#")]
    names = {path.name for path in ROOT.iterdir()}
    assert {n for n in names - TOP_LEVEL if not any(fnmatch.fnmatch(n, pattern) for pattern in made)} == set()
