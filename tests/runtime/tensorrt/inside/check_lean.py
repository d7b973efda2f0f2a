"""Version-compatible engines where TensorRT's lean runtime is all there is: no builder, no parser, no plugins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdm.runtime import load

from .conftest import build

TASK = {"prompt": "two big red", "steps": 3, "seed": [1, 2], "guidance": 0.0}
NEEDS = ("encode_text", "step_text", "decode_text")
# What a lean runtime's module has of the whole one's names.
LEAN = """
from .context import IExecutionContext
from .engine import EngineInspector, ICudaEngine, Refitter, Runtime
from .enums import (
    DataType, ExecutionContextAllocationStrategy, HardwareCompatibilityLevel, LayerInformationFormat,
    PluginCapabilityType, PluginFieldType, ProfilingVerbosity, TensorFormat, TensorIOMode, TensorLocation,
    TensorRTPhase,
)
from .plan import VERSION as __version__
from .plan import Dims
from .plugins import IPluginRegistry, PluginField, PluginFieldCollection, get_plugin_registry, init_libnvinfer_plugins
from .words import ILogger, Logger

whole = Runtime._refusal
Runtime._refusal = lambda self, about: whole(self, about) or (
    "" if "VERSION_COMPATIBLE" in about["flags"] else "a lean runtime takes version-compatible plans alone"
)
"""
RUN = f"""
import sys
import numpy as np
from mdm.plugins.errors import MdmError
from mdm.runtime import load
try:
    results = load(sys.argv[1], "tensorrt").complete(**{TASK!r})
except MdmError as error:
    sys.exit(f"{{error.exit_code}} {{error}}")
np.save(sys.argv[2], [one.latents for one in results])
assert "tensorrt" not in sys.modules
"""


@pytest.fixture(scope="session")
def lean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For PYTHONPATH."""
    import tensorrt

    folder = tmp_path_factory.mktemp("lean")
    shutil.copytree(Path(tensorrt.__file__).parent, folder / "tensorrt_lean")
    (folder / "tensorrt_lean" / "__init__.py").write_text(LEAN)
    return str(folder)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """What the stand-in takes for our plugins in C++."""
    out = tmp_path / "libmdm.so"
    source = "void* getCreators(int* count) { *count = 0; return 0; }\nvoid setLoggerFinder(void* finder) {}\n"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", out], input=source, text=True, check=True)
    return out


def run(bundle: Path, lean: str, out: Path) -> str:
    """What it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle), str(out)], env={**os.environ, "PYTHONPATH": lean},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == out.is_file(), done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize("by", ["bodies", "library"])
def test_it_loads_and_computes_the_same(by: str, own: Path, lean: str, library: Path, tmp_path: Path) -> None:
    build(own, NEEDS, version_compatible=True, **({"bodies": True} if by == "bodies" else {"library": library}))
    said = run(own, lean, tmp_path / "latents.npy")
    assert not said
    truth = [one.latents for one in load(own, threads=1).complete(**TASK)]  # type: ignore[arg-type]
    if by == "library":  # the native operators, as on the CPU; bodies go about it in another order
        np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), truth)
    else:
        np.testing.assert_allclose(np.load(tmp_path / "latents.npy"), truth, atol=1e-5)


@pytest.mark.parametrize("bodies", [True, False])
def test_an_engine_that_is_not_version_compatible(bodies: bool, own: Path, lean: str, tmp_path: Path) -> None:
    """It is of the same version, GPU and platform, and the lean runtime does not take it."""
    build(own, NEEDS[:1], bodies=bodies)
    said = run(own, lean, tmp_path / "latents.npy")
    assert said.startswith("2 the engine of graph 'encode_text' of bundle "), said
    assert "was built for " in said
    assert "lean" in said.partition("; found ")[2]


def test_an_engine_without_weights(own: Path, lean: str, tmp_path: Path) -> None:
    build(own, NEEDS[:1], version_compatible=True, bodies=True, strip=True)
    said = run(own, lean, tmp_path / "latents.npy")
    assert said.startswith("3 the engine of graph 'encode_text' has no weights, and tensorrt_lean cannot give it any")
    assert said.endswith("or build it without --strip")
