"""A wheel of this tree runs every task where no PyTorch is, and computes the same to the bit as it does here.

The environment is new and holds what the wheel's own metadata asks for with the extra `cpu`, and what that asks for in
turn, and no more: a dependency that pyproject.toml forgets is missing there. The packages are links to those of this
environment, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

pytest.importorskip("torch", reason="torch (extra export) exports the bundle")
pytest.importorskip("scikit_build_core", reason="scikit-build-core (extra dev) builds the wheel")

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT

ROOT = Path(__file__).parents[1]
PROMPT = "two big red circles on the left"

# argv: the bundle, the file for the latents. Prints the texts.
RUN_EVERY_TASK = f"""
import json, sys
import numpy as np
from mdm.runtime import load

pipeline = load(sys.argv[1], threads=1)
picture = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
made = {{}}
for name, task in pipeline.model.manifest["tasks"].items():
    fields = {{"prompt": {PROMPT!r}}} if task["text"] in ("given", "both") else {{}}
    fields |= {{"picture": picture}} if task["image"] in ("given", "both") else {{}}
    [made[name]] = pipeline.sample(name, steps=3, seed=7, **fields)
np.savez(sys.argv[2], **{{name: result.latents for name, result in made.items()}})
print(json.dumps({{name: result.text for name, result in made.items()}}))
"""

LOOK_AROUND = """
import json
from importlib.util import find_spec
from mdm.plugins.library import cpu_library_path

found = [name for name in ("torch", "onnx", "onnxscript", "pytest", "scikit_build_core") if find_spec(name)]
print(json.dumps([str(cpu_library_path()), find_spec("mdm.runtime").origin, found]))
"""


MDM = "import sys; from mdm.tools.main import main; sys.exit(main(sys.argv[1:]))"
Hold = Callable[[str, float, float], None]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this tree, with the native library."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import scikit_build_core.build as b; b.build_wheel({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (made,) = folder.glob("*.whl")
    assert {"mdm/plugins/libmdm_ort_cpu.so", "mdm/plugins/gpu/kernels.pack"} <= {*zipfile.ZipFile(made).namelist()}
    return made


def closure(requirements: Iterable[str], extra: str) -> set[str]:
    """The distributions that these requirements ask for, and theirs in turn."""
    waiting, seen = [(requirement, extra) for requirement in requirements], set()
    names: set[str] = set()
    while waiting:
        one = waiting.pop()
        wanted = Requirement(one[0])
        if one not in seen and (wanted.marker is None or wanted.marker.evaluate({"extra": one[1]})):
            names.add(wanted.name)
            for further in wanted.extras or {""}:
                waiting += [(requirement, further) for requirement in distribution(wanted.name).requires or ()]
        seen.add(one)
    return names


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    interpreter = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(subprocess.run([interpreter, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    asked = message_from_bytes(zipfile.ZipFile(wheel).read(metadata)).get_all("Requires-Dist") or []
    try:
        names = closure(asked, "cpu")
    except PackageNotFoundError as lacking:
        pytest.skip(f"{lacking.name} is not installed here")
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(installed.locate_file(top)))
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return interpreter


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", tmp_path_factory.mktemp("b") / "tiny.bundle")


def run(python: str | Path, *words: str | Path, folder: Path) -> Any:
    """What it prints, as JSON; isolated from this folder, this checkout and variables that Python heeds."""
    done = subprocess.run([python, "-I", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_the_environment_holds_the_wheel_and_no_pytorch(python: Path, tmp_path: Path) -> None:
    library, runtime, found = run(python, "-c", LOOK_AROUND, folder=tmp_path)
    home = str(python.parents[1])
    assert library.startswith(home)
    assert runtime.startswith(home)
    assert found == []


def test_every_task_computes_the_same_to_the_bit(python: Path, bundle: Path, tmp_path: Path) -> None:
    there = run(python, "-c", RUN_EVERY_TASK, bundle, tmp_path / "there.npz", folder=tmp_path)
    here = run(sys.executable, "-c", RUN_EVERY_TASK, bundle, tmp_path / "here.npz", folder=tmp_path)
    assert there == here
    with np.load(tmp_path / "there.npz") as made, np.load(tmp_path / "here.npz") as expected:
        assert set(made) == set(expected) == set(json.loads((bundle / "manifest.json").read_text())["tasks"])
        assert len(made) == 7
        for name in made:
            assert np.array_equal(made[name], expected[name]), name


def test_the_command_runs_there(python: Path, bundle: Path, tmp_path: Path) -> None:
    mdm = [python.parent / "mdm"]
    doctor = subprocess.run(
        [*mdm, "doctor", bundle, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = {
        one["name"]: one["there"] for one in json.loads(doctor.stdout)["findings"] if one["section"] == "installed"
    }
    assert [name for name in found if not found[name]] == ["torch", "onnx"]
    words = ["generate", bundle, PROMPT, "--steps", "3", "--threads", "1", "--out", "made.png"]
    subprocess.run([*mdm, *words], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "made.png").stat().st_size > 100


def test_the_bundle_is_checked_there(python: Path, bundle: Path, tmp_path: Path, figure: Hold) -> None:
    """By its golden files, and with a report."""
    words = ["check", bundle, "--report", "report", "--json"]
    began = time.monotonic()
    report = run(python, "-c", MDM, *words, folder=tmp_path)
    figure("mdm check without torch, seconds", time.monotonic() - began, 20)
    assert (report["verdict"], report["against"]) == ("PASS", "golden")
    ran = {finding["level"] for finding in report["findings"] if finding["verdict"] == "PASS"}
    assert ran == {"files", "steps", "trajectories", "decoded"}
    made = {path.name for path in (tmp_path / "report").iterdir()}
    assert made == {"report.json", "junit.xml", "report.html", "summary.md"}


def test_the_tensorrt_plugins_are_built_there(python: Path, tmp_path: Path) -> None:
    """From the sources and kernels in the wheel, for whichever TensorRT the headers are of."""
    if "TENSORRT_ROOT" not in os.environ:
        pytest.skip("no headers of TensorRT: TENSORRT_ROOT is not set")
    if shutil.which("cmake") is None:
        pytest.skip("no CMake")
    told = run(python, "-c", MDM, "plugin", "build", "--json", folder=tmp_path)
    assert told["serves"] >= 10
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("libmdm_tensorrt.so", told["bytes"])]


def test_what_needs_pytorch_says_so_there(python: Path, tmp_path: Path) -> None:
    words = [python.parent / "mdm", "evaluate"]
    done = subprocess.run(words, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 3
    assert 'pip install "mdm-deploy[export]"' in done.stderr
    assert len(done.stderr.splitlines()) <= 3
