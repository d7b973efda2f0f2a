"""Whole numbers computed from shapes, against ONNX's own reference of each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mdm.tools.plan.folding import MOST, Numbers, as_tensor, fold, of_tensor

node = helper.make_node
A, B = np.array([7, 64, 130, 5]), np.array([64, 64, 3, 1])


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Add", [A, B], {}),
        ("Sub", [A, B], {}),
        ("Mul", [A, ints(3)], {}),
        ("Div", [A, B], {}),
        ("Mod", [-A, B], {}),
        ("Mod", [A, B], {}),
        ("Neg", [A], {}),
        ("Concat", [A, B], {"axis": 0}),
        ("Gather", [A, ints(3, 0)], {"axis": 0}),
        ("Gather", [A, np.array(-1)], {"axis": 0}),
        ("Slice", [A, ints(1), ints(3)], {}),
        ("Slice", [A, ints(-2), ints(2**62), ints(0)], {}),
        ("Slice", [A, ints(0), ints(-1), ints(0), ints(1)], {}),
        ("Unsqueeze", [np.array(5), ints(0)], {}),
        ("Squeeze", [ints(5), ints(0)], {}),
        ("Squeeze", [ints(5)], {}),
        ("Cast", [A], {"to": TensorProto.INT64}),
        ("Identity", [A], {}),
    ],
)
def test_as_onnx_computes_it(
    op: str, inputs: list[np.ndarray[Any, Any]], attributes: dict[str, Any], model_of: Callable[..., ModelProto]
) -> None:
    names = [f"i{place}" for place in range(len(inputs))]
    one = node(op, names, ["y"], **attributes)
    stored = [numpy_helper.from_array(value.astype(np.int64), name) for value, name in zip(inputs, names, strict=True)]
    model = model_of([one], {}, ["y"], {"y": "int64"}, stored)
    (expected,) = ReferenceEvaluator(model).run(None, {})
    numbers: dict[str, Numbers] = {}
    for tensor in stored:
        found = of_tensor(tensor)
        assert found is not None
        numbers[tensor.name] = found
    assert fold([one], {}, numbers)
    np.testing.assert_array_equal(numbers["y"].astype(np.int64), expected)
    assert numbers["y"].shape == np.shape(expected)
    assert numpy_helper.to_array(as_tensor("y", numbers["y"])).dtype == np.int64
    assert not fold([one], {}, numbers)  # nothing new


def test_shapes_and_constants() -> None:
    nodes = [
        node("Shape", ["x"], ["all"]), node("Shape", ["x"], ["middle"], start=1, end=-1),
        node("Constant", [], ["one"], value_int=3), node("Constant", [], ["some"], value_ints=[4, 5]),
        node("Constant", [], ["held"], value=numpy_helper.from_array(ints(6))),
        node("Constant", [], ["real"], value_float=1.0), node("Shape", ["unknown"], ["no"]),
    ]  # fmt: skip
    numbers: dict[str, Numbers] = {}
    assert fold(nodes, {"x": (2, 3, 4)}, numbers)
    assert {name: found.tolist() for name, found in numbers.items()} == {
        "all": [2, 3, 4], "middle": [3], "one": 3, "some": [4, 5], "held": [6],
    }  # fmt: skip


@pytest.mark.parametrize(
    "one",
    [
        node("Div", ["a", "zero"], ["y"]),
        node("Div", ["negative", "a"], ["y"]),  # ONNX rounds to 0, Python down
        node("Mod", ["a", "zero"], ["y"]),
        node("Mod", ["negative", "a"], ["y"], fmod=1),
        node("Mul", ["huge", "huge"], ["y"]),  # no int64
        node("Concat", ["a"] * 30, ["y"], axis=0),  # too many
        node("Gather", ["a", "huge"], ["y"]),
        node("Unsqueeze", ["a", "huge"], ["y"]),
        node("Slice", ["a", "zero", "huge", "zero", "two"], ["y"]),
        node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
        node("Add", ["a", "who"], ["y"]),
        node("Add", ["a", "a"], ["y"], domain="other"),
        node("Exp", ["a"], ["y"]),
    ],
)
def test_what_is_not_computed(one: NodeProto) -> None:
    numbers: dict[str, Numbers] = {
        name: np.array(values, object)
        for name, values in {"a": [7, 8, 9], "zero": [0], "two": [2], "negative": [-7], "huge": [2**62]}.items()
    }
    assert not fold([one], {}, numbers)


def test_large_and_broken_tensors_are_not_read() -> None:
    assert of_tensor(numpy_helper.from_array(np.zeros(MOST + 1, np.int64))) is None
    assert of_tensor(TensorProto(data_type=TensorProto.INT64, dims=[4], raw_data=b"1")) is None
    assert of_tensor(TensorProto(data_type=TensorProto.INT64, dims=[-4])) is None
    assert of_tensor(numpy_helper.from_array(np.zeros(2, np.float32))) is None
