"""For the exporter's parts: a graph over tensors of any names and sizes, and its outputs in ONNX Runtime.

def test_sum(blank_graph, run_graph):
    g = blank_graph({"w": torch.ones(3)})
    g.output("y", g.input("x", "float32", ["n"]) + g.weight("w", "float32"), ["n"])
    (y,) = run_graph(g, x=np.zeros(3, np.float32))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from mdm.export.graph import Graph
from mdm.export.precision import make_precision
from mdm.export.weights import Checkpoint, Weights


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
