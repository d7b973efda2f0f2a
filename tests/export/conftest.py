"""For the exporter's parts: a graph over tensors of any names and sizes, and its outputs in ONNX Runtime. For whole
exports: tiny checkpoints, and a call that exports one.

def test_sum(blank_graph, run_graph):
    g = blank_graph({"w": torch.ones(3)})
    g.output("y", g.input("x", "float32", ["n"]) + g.weight("w", "float32"), ["n"])
    (y,) = run_graph(g, x=np.zeros(3, np.float32))
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdm.export import export_bundle
from mdm.export.graph import Graph
from mdm.export.precision import make_precision
from mdm.export.weights import Checkpoint, Weights
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.checkpoint import build_model

Tiny = Callable[..., dict[str, Any]]


class Loose:
    """What `Weights` asks of a checkpoint, over tensors that belong to no model."""

    format = "pth"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.found = {name: (shape, "float32") for name, shape in self.expected.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="session")
def blank_graph() -> Callable[..., Graph]:
    def make(tensors: Mapping[str, Tensor] | None = None, precision: str = "fp32", opset: int = 20) -> Graph:
        kinds = make_precision(precision)
        return Graph("part", Weights(cast(Checkpoint, Loose(tensors or {})), kinds.activations), kinds, opset)

    return make


@pytest.fixture
def run_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[np.ndarray]]:
    """run_graph(g, options, x=..., ...): checked, then run. `options` is an ort.SessionOptions."""

    def run(g: Graph, options: Any = None, **inputs: np.ndarray | Tensor) -> list[np.ndarray]:
        folder, model = tmp_path_factory.mktemp("graph"), g.model()
        g.weights.write_derived(folder)
        g.weights.place(model, g.stored)
        onnx.save(model, folder / "part.onnx")
        onnx.checker.check_model(folder / "part.onnx", full_check=True)
        session = ort.InferenceSession(folder / "part.onnx", options, providers=["CPUExecutionProvider"])
        return session.run(None, {name: np.asarray(value) for name, value in inputs.items()})

    return run


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes | None]]:
    """contents(folder): every path below it, with the bytes of a file."""

    def read(folder: Path) -> dict[str, bytes | None]:
        paths = folder.rglob("*")
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}

    return read


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tiny_model: Callable[..., Any]) -> Path:
    """A folder with the checkpoints mdm, keep (which selects tokens) and dim, the tokenizers and configs beside."""
    folder = tmp_path_factory.mktemp("source")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        dim = build_model(load_config(tiny(family="dim")))
    short = {"solver": "dim", "steps": 4, "guidance": 0.4}
    changes: dict[str, dict[str, Any]] = {
        "mdm": {}, "keep": {"keep": 0.5}, "dim": {"family": "dim", "sampler": short},
    }  # fmt: skip
    for name, change in changes.items():
        model = dim if name == "dim" else tiny_model(**change)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(tiny(**change)))
        if name != "dim":
            shutil.copyfile(SHIPPED_TOKENIZER, folder / f"{name}.tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def export(source: Path) -> Callable[..., Path]:
    """export(out, "dim", ...): of that checkpoint, without running the model unless asked."""

    def made(out: Path, name: str = "mdm", checkpoint: Path | None = None, **options: Any) -> Path:
        path = checkpoint or source / f"{name}.safetensors"
        return export_bundle(path, source / f"{name}.json", out, **({"validate": False} | options))

    return made
