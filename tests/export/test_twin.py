"""The float32 twin of a bfloat16 graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from safetensors.torch import save_file

from mdm.export.graphs import build_graph, plan_graphs
from mdm.export.precision import make_precision
from mdm.export.truth import Point, Truth
from mdm.export.twin import write_twin
from mdm.export.weights import Checkpoint, Weights
from mdm.reference import load_config
from mdm.reference.checkpoint import build_model

FAMILIES = {"mdm": "step_joint_guided", "dim": "step_image_guided"}
OPSET = 22


class Pair(NamedTuple):
    """A graph in bfloat16, its twin, and the same graph in float32 over the rounded weights."""

    spec: Any
    truth: Truth
    half: Path
    twin: Path
    rounded: Path


def write_graph(folder: Path, name: str, checkpoint: Checkpoint, config: Any, precision: str) -> Any:
    folder.mkdir()
    kinds = make_precision(precision)
    weights = Weights(checkpoint, kinds.activations)
    weights.verbatim = False  # rounded weights do not stand in the checkpoint
    spec = next(s for s in plan_graphs(config, [config.image_size], []) if s.name == name)
    built = build_graph(spec, config, weights, kinds, OPSET)
    weights.write_derived(folder)
    weights.place(built.model, built.stored)
    (folder / "graph.onnx").write_bytes(built.model.SerializeToString())
    return built


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]
) -> Pair:
    folder, config = tmp_path_factory.mktemp("twin"), load_config(tiny(family=request.param))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        state = build_model(config).state_dict()
        for tensor in state.values():
            tensor.normal_(std=0.2)
    save_file(state, folder / "model.safetensors")
    checkpoint = Checkpoint(folder / "model.safetensors", config)
    built = write_graph(folder / "bf16", FAMILIES[request.param], checkpoint, config, "bf16")
    checkpoint.rounded = frozenset(s.key for s in built.stored.values() if s.dtype == "bfloat16")
    write_graph(folder / "fp32", FAMILIES[request.param], checkpoint, config, "fp32")
    write_twin(folder / "bf16" / "graph.onnx", folder / "twin.onnx")
    graphs = (folder / "bf16" / "graph.onnx", folder / "twin.onnx", folder / "fp32" / "graph.onnx")
    return Pair(built.spec, Truth(checkpoint, config), *graphs)


def types_in(model: ModelProto) -> Iterator[int]:
    """Of all tensors, casts and declared values, in functions and nested bodies too."""
    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)
        yield from (info.type.tensor_type.elem_type for info in function.value_info)


def of_graph(graph: GraphProto) -> Iterator[int]:
    infos = (*graph.input, *graph.output, *graph.value_info)
    yield from (info.type.tensor_type.elem_type for info in infos)
    yield from (tensor.data_type for tensor in graph.initializer)
    yield from of_nodes(graph.node)


def of_nodes(nodes: Any) -> Iterator[int]:
    node: NodeProto
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype"):
                yield attribute.i
            if attribute.HasField("t"):
                yield attribute.t.data_type
            if attribute.HasField("g"):
                yield from of_graph(attribute.g)
            for graph in attribute.graphs:
                yield from of_graph(graph)


def test_no_bfloat16_is_left(pair: Pair) -> None:
    before = list(types_in(onnx.load(pair.half, load_external_data=False)))
    assert before.count(TensorProto.BFLOAT16) == {"dim": 18, "mdm": 15}[pair.truth.config.family]
    after = list(types_in(onnx.load(pair.twin, load_external_data=False)))
    assert len(after) == len(before)
    assert TensorProto.BFLOAT16 not in after


def test_the_weights_keep_their_values(pair: Pair) -> None:
    half, twin = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer} for path in (pair.half, pair.twin)
    )
    assert half.keys() == twin.keys()
    for name, values in half.items():
        if values.dtype.name == "bfloat16":
            assert twin[name].dtype == np.float32
            values = values.astype(np.float32)
        assert values.dtype == twin[name].dtype
        assert np.array_equal(values, twin[name])


def test_the_nodes_are_the_same(pair: Pair) -> None:
    half, twin = (onnx.load(path, load_external_data=False) for path in (pair.half, pair.twin))
    onnx.checker.check_model(pair.twin, full_check=True)
    for ours, theirs in zip(half.graph.node, twin.graph.node, strict=True):
        assert (ours.name, ours.op_type, ours.input, ours.output) == (
            theirs.name, theirs.op_type, theirs.input, theirs.output,
        )  # fmt: skip
    assert [f.name for f in half.functions] == [f.name for f in twin.functions]


def test_the_twin_is_the_float32_graph_over_rounded_weights(
    pair: Pair, figure: Callable[[str, float, float], None]
) -> None:
    inputs = pair.truth.inputs(pair.spec, Point(2, 9 if "text" in pair.spec.modalities else 0))
    outputs = [
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
        for path in (pair.twin, pair.rounded)
    ]
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*outputs, strict=True))
    figure(f"twin of {pair.spec.name} against float32, relative", worst, 1e-5)
    expected = pair.truth.outputs(pair.spec, inputs)
    names = [output.name for output in onnx.load(pair.twin, load_external_data=False).graph.output]
    worst = max(
        float(np.abs(a - expected[name]).max() / np.abs(expected[name]).max())
        for name, a in zip(names, outputs[0], strict=True)
    )
    figure(f"twin of {pair.spec.name} against torch, relative", worst, 1e-4)


NESTED = """
<ir_version: 10, opset_import: ["" : 22, "own" : 1]>
part (float[n] x, bool c) => (float[n] y) {
    h = own.halved (x)
    y = If (c) <
        then_branch = yes () => (float[n] p) { a = Cast <to = 16> (h)  p = Cast <to = 1> (a) },
        else_branch = no () => (float[n] q) { q = Identity (h) }
    >
}
<domain: "own", opset_import: ["" : 22]>
halved (v) => (w) { b = Cast <to = 16> (v)  w = Cast <to = 1> (b) }
"""


def test_functions_and_nested_bodies_are_widened_too(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(NESTED)
    onnx.save(model, tmp_path / "half.onnx")
    write_twin(tmp_path / "half.onnx", tmp_path / "twin.onnx")
    assert list(types_in(model)).count(TensorProto.BFLOAT16) == 2
    assert TensorProto.BFLOAT16 not in types_in(onnx.load(tmp_path / "twin.onnx"))
    run = ort.InferenceSession(tmp_path / "twin.onnx", providers=["CPUExecutionProvider"])
    x = np.array([0.1, 1 / 3], np.float32)
    assert np.array_equal(run.run(None, {"x": x, "c": np.array(True)})[0], x)
