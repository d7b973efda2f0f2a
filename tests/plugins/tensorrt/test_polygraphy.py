"""NVIDIA's polygraphy on our graphs, in the rig: with our plugins by `mdm plugin polygraphy`, without them by itself.

What an engine computes is not seen here: `polygraphy run --trt` is held to fail for want of a GPU, and of nothing else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mdm.plugins.contract import DOMAIN
from mdm.tools.main import main

from .test_cpp_plugin import library_for_rig
from .test_fitness import exported, write_model

OURS = "import sys; from mdm.tools.main import main; sys.exit(main(['plugin', 'polygraphy', *sys.argv[1:]]))"
PLAIN = "import sys; from polygraphy.tools import main; sys.exit(main())"
LAYERS = ("--display-as=trt", "--show", "layers")
Polygraphy = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """With its weights beside it."""
    folder = tmp_path_factory.mktemp("models")
    bundle = exported(write_model(folder / "tiny", tiny(state=16, head=32)), folder / "bundle", "fp16")
    return bundle / "denoise_image.onnx"


@pytest.fixture
def polygraphy(rig: dict[str, str], tmp_path: Path) -> Polygraphy:
    """polygraphy(*words): what it prints; it ends with `code`. `by`: ours, or polygraphy itself."""

    def ask(*words: str | Path, code: int = 0, by: str = OURS) -> str:
        command = [sys.executable, "-c", by, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=rig, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == code, said[-2000:]
        return said

    return ask


def shapes(model: Path, batch: int) -> list[str]:
    inputs = onnx.load(model, load_external_data=False).graph.input
    dims = {i.name: [d.dim_value or batch for d in i.type.tensor_type.shape.dim] for i in inputs}
    return [f"{name}:[{','.join(map(str, sizes))}]" for name, sizes in dims.items()]


def plugins(said: str) -> int:
    assert "---- 4 Network Input(s) ----" in said
    return said.count("[Op: LayerType.PLUGIN_V3]")


def ours(model: Path) -> int:
    return sum(node.domain == DOMAIN for node in onnx.load(model, load_external_data=False).graph.node)


def test_inspect_shows_our_plugins(polygraphy: Polygraphy, model: Path) -> None:
    assert plugins(polygraphy("inspect", "model", model, *LAYERS)) == ours(model) > 0
    assert plugins(polygraphy("inspect", "model", model, *LAYERS, by=PLAIN)) == 0


def test_inspect_with_the_library(polygraphy: Polygraphy, model: Path) -> None:
    """Which polygraphy itself opens without a word, and TensorRT does not see: why our command reads --plugins."""
    words = ["inspect", "model", model, *LAYERS, "--plugins", library_for_rig()]
    assert plugins(polygraphy(*words)) == ours(model)
    assert plugins(polygraphy(*words, by=PLAIN)) == 0


def test_run_on_onnx_runtime(polygraphy: Polygraphy, model: Path) -> None:
    """By the bodies, on numbers of its own choice."""
    said = polygraphy("run", model, "--onnxrt", "--validate", "--input-shapes", *shapes(model, 3), by=PLAIN)
    assert "PASSED | Output: eps is valid" in said
    assert "eps [dtype=float32, shape=(3, 16, 12)]" in said


def test_run_on_tensorrt_lacks_a_gpu_alone(polygraphy: Polygraphy, model: Path, tmp_path: Path) -> None:
    """Options, plugins, parser, profile and builder are done with by then."""
    words: list[str | Path] = ["run", model, "--trt", "--onnxrt", "--strongly-typed", "-v", "--save-engine", "engine"]
    for name, batch in (("min", 1), ("opt", 2), ("max", 4)):
        words += [f"--trt-{name}-shapes", *shapes(model, batch)]
    said = polygraphy(*words, "--input-shapes", *shapes(model, 2), code=1)
    assert said.count("Successfully created plugin: Mamba") == ours(model)
    assert "z [min=[1, 16, 12], opt=[2, 16, 12], max=[4, 16, 12]]" in said
    assert "Finished engine building" in said
    assert (tmp_path / "engine").stat().st_size > 100_000
    errors = re.findall(r"^\[(?:E|!)\] (.*)", said, re.MULTILINE)
    assert errors
    wanted = ("Cuda Runtime", "CUDA", "Could not deserialize engine", "FAILED | Runtime")
    assert [error for error in errors if not any(text in error for text in wanted)] == []


def test_what_is_no_library(polygraphy: Polygraphy, model: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins.so").write_text("not a library")
    said = polygraphy("inspect", "model", model, "--plugins", "plugins.so", code=3)
    assert "does not take plugins.so\nexpected a library of plugins (getCreators)" in said
    assert "Error: nowhere.so: No such file" in polygraphy("inspect", "model", model, "--plugins", "nowhere.so", code=2)


def test_without_polygraphy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert main(["plugin", "polygraphy", "--help"]) == 3
    assert 'pip install "mdm-deploy[tensorrt]"' in capsys.readouterr().err
