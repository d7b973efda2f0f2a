"""The function bodies and the LinearAttention rewrite: against the definitions, and as files."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mdm.plugins.contract import DOMAIN, OPERATORS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import InputError
from mdm.plugins.functions import TAPS, attach_functions, function_body, operator_model
from mdm.plugins.linear_attention import use_linear_attention
from mdm.tools.bench.operator_inputs import Arrays, operator_inputs
from mdm.tools.bench.ops import fixed

every = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
SIZES = {"B": 2, "L": 70, "D": 48, "H": 6, "P": 20, "N": 24, "G": 2}


def with_numbers(operator: Operator, has: int, inputs: Arrays, dtype: str = "float32") -> onnx.ModelProto:
    return fixed(operator_model(operator, has, dtype), {name: list(value.shape) for name, value in inputs.items()})


@every
def test_function_bodies_against_the_definition(operator: Operator, session: Any, hold: Any, figure: Any) -> None:
    def open_form(case: dict[str, Any], _inputs: Arrays) -> Any:
        if case["L"] > 1064 and operator is SELECTIVE_SCAN:
            return None  # 4160 steps of an ONNX Scan take seconds, and show nothing that 1064 do not
        return session(operator_model(operator, case["has"], case["dtype"], taps=case.get("K", TAPS)))

    hold("function body", operator, open_form, figure)


def test_linear_attention_against_the_recurrence(session: Any, hold: Any, figure: Any) -> None:
    def open_form(case: dict[str, Any], inputs: Arrays) -> Any:
        model = use_linear_attention(with_numbers(SSD_SCAN, case["has"], inputs, case["dtype"]))
        return session(model) if case["B"] else None  # the operator itself refuses an empty batch

    hold("LinearAttention", SSD_SCAN, open_form, figure)


def test_one_file_three_ways(session: Any, figure: Any, off: Any) -> None:
    """The library registered, not registered, and rewritten: the same file, the same result."""
    inputs = operator_inputs(SSD_SCAN, SIZES, 15)
    model = with_numbers(SSD_SCAN, 15, inputs)
    native = session(model, native=True).run(None, inputs)[0]
    body = session(model).run(None, inputs)[0]
    rewritten = use_linear_attention(model)
    assert "LinearAttention" in {node.op_type for node in rewritten.graph.node}
    assert [node.op_type for node in model.graph.node] == [SSD_SCAN.name], "the original is left alone"
    figure("one file: function body against native", off(body, native), 3e-6)
    figure("one file: LinearAttention against native", off(session(rewritten).run(None, inputs)[0], native), 3e-6)


def test_the_registered_library_is_what_runs(session: Any) -> None:
    """A body that computes something else shows who was called."""
    inputs = operator_inputs(SSD_SCAN, SIZES, 0)
    model = operator_model(SSD_SCAN, 0)
    body = helper.make_function(
        DOMAIN, SSD_SCAN.name, ["x", "dt", "A", "Bm", "C"], ["y"],
        [helper.make_node("Neg", ["x"], ["y"])], [helper.make_opsetid("", 20)],
    )  # fmt: skip
    del model.functions[:]
    model.functions.append(body)
    np.testing.assert_array_equal(session(model).run(None, inputs)[0], -inputs["x"])
    assert not np.array_equal(session(model, native=True).run(None, inputs)[0], -inputs["x"])


@every
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bodies_are_valid_onnx_and_shaped(operator: Operator, dtype: str) -> None:
    for has in range(operator.has_all + 1):
        model = operator_model(operator, has, dtype)
        onnx.checker.check_model(model, full_check=True)
        (body,) = model.functions
        assert list(body.input) == [spec.name for spec in operator.present(has)]
        inner = {name for node in body.node for name in node.output} - {"y"}
        assert all(name.startswith(operator.name) for name in inner), "TensorRT has one namespace"
        for node in body.node:
            for attribute in node.attribute:
                assert not attribute.g.initializer, "TensorRT reads these as garbage"
        assert "" not in {name for node in [*body.node, *model.graph.node] for name in node.input}


def test_two_patterns_of_one_operator_do_not_fit_into_a_file() -> None:
    model = operator_model(SSD_SCAN, 1)
    del model.functions[:]
    other = onnx.NodeProto()
    other.CopyFrom(operator_model(SSD_SCAN, 0).graph.node[0])
    other.name = "other"
    model.graph.node.append(other)
    with pytest.raises(ValueError, match="node 'other' is a MambaSsdScan with"):
        attach_functions(model)


def test_a_convolution_of_other_taps_is_another_pattern() -> None:
    model, other = (operator_model(SHORT_CONV, 1, taps=taps) for taps in (4, 3))
    del model.functions[:]
    other.graph.node[0].name, other.graph.node[0].input[1], other.graph.input[1].name = "other", "weight3", "weight3"
    model.graph.node.append(other.graph.node[0])
    model.graph.input.append(other.graph.input[1])
    with pytest.raises(ValueError, match=r"node 'other' is a MambaShortConv with \{'has': 1, 'taps': 3\}"):
        attach_functions(model)


def test_a_body_of_other_taps_than_the_weight_has_is_an_error(session: Any) -> None:
    inputs = operator_inputs(SHORT_CONV, {"B": 1, "L": 6, "D": 5, "K": 3}, 1)
    for taps in (2, 4):
        model = operator_model(SHORT_CONV, 1, taps=taps)
        model.graph.input[1].type.tensor_type.shape.dim[1].Clear()
        with pytest.raises(Exception, match=r"[Ss]plit"):
            session(model).run(None, inputs)


def test_taps_that_no_shape_tells_are_asked_for() -> None:
    model = operator_model(SHORT_CONV, 0)
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "K"
    with pytest.raises(ValueError, match="node 'node': K of its weight 'weight' is not a number in this file"):
        attach_functions(model)


def test_chunk_size_is_a_matter_of_rounding(session: Any, exact: Any, off: Any) -> None:
    inputs = operator_inputs(SSD_SCAN, SIZES, 5)
    expected = exact(SSD_SCAN, inputs)
    for chunk in (1, 16, 70, 256):
        assert off(session(operator_model(SSD_SCAN, 5, chunk_size=chunk)).run(None, inputs)[0], expected) <= 3e-6


def test_linear_attention_wants_numbers() -> None:
    with pytest.raises(InputError, match="node 'node': H of its input 'A' is not a number"):
        use_linear_attention(operator_model(SSD_SCAN, 0))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'float64', expected one of"):
        function_body(SSD_SCAN, 0, "float64")


def test_small_steps_keep_their_digits(session: Any, exact: Any, off: Any, figure: Any) -> None:
    """Steps of 0.001 and less, as trained models have: log(1 + e) as written would lose four digits."""
    inputs = operator_inputs(SELECTIVE_SCAN, SIZES, 0)
    inputs["delta"] = inputs["delta"] - 8
    expected = exact(SELECTIVE_SCAN, inputs)
    figure(
        "steps of 4e-5: function body",
        off(session(operator_model(SELECTIVE_SCAN, 0)).run(None, inputs)[0], expected),
        3e-6,
    )
    native = session(operator_model(SELECTIVE_SCAN, 0), native=True).run(None, inputs)[0]
    figure("steps of 4e-5: native", off(native, expected), 3e-6)
