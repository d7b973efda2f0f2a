"""Types and sizes of every tensor: against what ONNX Runtime computes, and where nothing can be known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import open_bundle
from mdm.runtime.tensorrt.profiles import PROFILES, shapes_of
from mdm.tools.plan.plan import read_model
from mdm.tools.plan.tensors import infer

node = helper.make_node
Models = Callable[..., ModelProto]


@pytest.mark.parametrize(
    ("name", "graph", "changes"),
    [
        ("mdm-tiny", "step_joint_guided", {}),
        ("mdm", "step_turn_guided", {"keep": 0.5}),
        ("mdm", "step_text", {"scan": "parallel", "width": 64, "groups": 2}),
        ("dim", "step_image_guided", {}),
        ("mdm-tiny", "decode_image", {}),
    ],
)
def test_every_tensor_is_as_onnx_runtime_makes_it(
    exported: Callable[..., Path], tmp_path: Path, name: str, graph: str, changes: dict[str, object]
) -> None:
    bundle = open_bundle(exported(name, "fp32", **changes))
    folder = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    model = read_model(bundle, graph)
    sizes = {i: three[2] for i, three in shapes_of(bundle.manifest, graph, PROFILES["latency"]).items()}
    inferred = infer(model, sizes)
    assert inferred.fault == ""
    names = [output for one in model.graph.node for output in one.output]
    known = {spec.name for spec in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    onnx.save(model, folder / "all.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(folder / "all.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": bool}
    given = {i.name: np.zeros(sizes[i.name], kinds[i.type]) for i in session.get_inputs()}
    for spec, found in zip(session.get_outputs(), session.run(None, given), strict=True):
        assert inferred.tensors[spec.name] == (str(found.dtype), found.shape), spec.name
    assert len(names) > 15


def test_quotients_and_remainders_are_followed(model_of: Models) -> None:
    """A body cuts tokens into chunks: ONNX alone does not know the sizes behind this Reshape."""
    stored = [
        helper.make_tensor("four", TensorProto.INT64, [1], [4]),
        helper.make_tensor("rest", TensorProto.INT64, [1], [-1]),
    ]
    nodes = [
        node("Shape", ["x"], ["tokens"], start=1, end=2), node("Div", ["tokens", "four"], ["chunks"]),
        node("Concat", ["chunks", "four", "rest"], ["sizes"], axis=0), node("Reshape", ["x", "sizes"], ["y"]),
        node("Shape", ["y"], ["again"], start=2, end=3), node("Concat", ["again", "rest"], ["flat"], axis=0),
        node("Reshape", ["y", "flat"], ["z"]),
    ]  # fmt: skip
    model = model_of(nodes, {"x": ["batch", "tokens"]}, ["z"], initializers=stored)
    before = model.SerializeToString()
    found = infer(model, {"x": (6, 8)}).tensors
    assert (found["y"], found["z"]) == (("float32", (2, 4, 6)), ("float32", (6, 8)))
    assert model.SerializeToString() == before


def test_what_only_a_run_knows(model_of: Models) -> None:
    model = model_of([node("NonZero", ["x"], ["where"]), node("Cast", ["where"], ["y"], to=1)], {"x": [4]}, ["y"])
    found = infer(model, {"x": (4,)}).tensors
    assert found["where"] == ("int64", None)
    assert found["y"].bytes is None


def test_types_that_do_not_fit_are_said(model_of: Models) -> None:
    model = model_of(
        [node("Add", ["x", "h"], ["y"]), node("Relu", ["y"], ["z"])], {"x": [4], "h": [4]}, ["z"], {"h": "float16"}
    )
    inferred = infer(model, {"x": (4,), "h": (4,)})
    assert "inconsistent type" in inferred.fault
    assert inferred.tensors["z"].shape == (4,)


@pytest.mark.parametrize("dims", [[-3], [2**62, 2**62]])
def test_sizes_that_no_tensor_has(model_of: Models, dims: list[int]) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    found = infer(model_of([node("Relu", ["w"], ["y"])], {}, ["y"], initializers=[weight]), {}).tensors
    assert found["w"].bytes is None


@pytest.mark.parametrize(
    ("sizes", "said"), [({}, "has no such input"), ({"x": (1, 2)}, "says 2 dimensions, the file 1")]
)
def test_inputs_that_are_not_the_manifests(model_of: Models, sizes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        infer(model_of([node("Relu", ["x"], ["y"])], {"x": [4]}, ["y"]), sizes)


def test_what_is_no_onnx(model_of: Models) -> None:
    broken = model_of([node("Reshape", ["x"], ["y"])], {"x": [4]}, ["y"])
    with pytest.raises(InputError, match="ONNX cannot infer its types and shapes"):
        infer(broken, {"x": (4,)})
