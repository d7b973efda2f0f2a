"""The native library: against the definitions with every instruction set of this machine; the same bits for any number
of threads and any batch neighbour; errors that name the operator, the input and both numbers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.plugins.contract import OPERATORS, SCANS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.functions import TAPS, operator_model
from mdm.plugins.library import INSTRUCTION_SETS, instruction_set
from mdm.tools.bench.operator_inputs import DECAYS, Arrays, operator_inputs

every = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
scans = pytest.mark.parametrize("operator", SCANS, ids=lambda operator: operator.name)
FULL = {"B": 2, "L": 37, "D": 80, "H": 6, "P": 20, "N": 24, "G": 2, "K": 4}


@every
def test_against_the_definition(operator: Operator, session: Any, hold: Any, figure: Any) -> None:
    def open_form(case: dict[str, Any], _inputs: Arrays) -> Any:
        return session(operator_model(operator, case["has"], case["dtype"], taps=case.get("K", TAPS)), native=True)

    hold(f"native {instruction_set()}", operator, open_form, figure)


@pytest.mark.skipif("MDM_CPU_ISA" in os.environ, reason="runs inside of the test it would start")
@pytest.mark.parametrize("name", INSTRUCTION_SETS[1:])
def test_the_other_instruction_sets(name: str, figure: Any) -> None:
    """This file again, in a process that MDM_CPU_ISA tells to use a lesser instruction set."""
    if INSTRUCTION_SETS.index(name) <= INSTRUCTION_SETS.index(instruction_set()):
        pytest.skip(f"{instruction_set()} is the best this machine has")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "MDM_CPU_ISA": name}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(rf"^(\w+, native {name}.*?)\s+(\S+)\s+(\S+)$", done.stdout, re.M)
    assert len(rows) == 6
    for title, value, limit in rows:
        figure(title, float(value), float(limit))


@every
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size(operator: Operator, session: Any, exact: Any, data: st.DataObject) -> None:
    """Sizes nobody would choose: odd widths, groups of one channel, a state of 1."""
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    sizes = {
        name: data.draw(st.integers(1, high)) for name, high in (("B", 3), ("L", 70), ("N", 40), ("P", 70), ("K", 9))
    }
    sizes |= {"G": groups, "H": groups * min(per_group, 6), "D": groups * per_group}
    has, decay = data.draw(st.integers(0, operator.has_all)), data.draw(st.sampled_from(DECAYS))
    inputs = operator_inputs(operator, sizes, has, decay=decay, seed=data.draw(st.integers(0, 99)))
    y = session(operator_model(operator, has, taps=sizes["K"]), native=True).run(None, inputs)[0]
    # Beside the sum of absolute values: in a result of one or two numbers the terms may cancel almost to nothing.
    signed = (operator.inputs[0].name, "Bm", "C", "D", "z", "weight", "bias")
    terms = exact(operator, {k: np.abs(v) if k in signed else v for k, v in inputs.items()})
    assert np.abs(y - exact(operator, inputs)).max() <= 1e-6 * np.abs(terms).max()


@every
@pytest.mark.parametrize(
    "sizes", [FULL, FULL | {"L": 300, "H": 2, "P": 64, "N": 64, "G": 1, "D": 777}], ids=["odd", "few heads"]
)
def test_threads_and_neighbours_change_no_bit(operator: Operator, sizes: dict[str, int], session: Any) -> None:
    inputs = operator_inputs(operator, sizes | {"B": 5}, operator.has_all)
    model = operator_model(operator, operator.has_all)
    whole = session(model, native=True).run(None, inputs)[0]
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(session(model, native=True, threads=threads).run(None, inputs)[0], whole)
    rows = {spec.name for spec in operator.inputs if spec.dims[0] == "B"}
    for row in range(5):
        alone = {name: value[row : row + 1] if name in rows else value for name, value in inputs.items()}
        np.testing.assert_array_equal(session(model, native=True).run(None, alone)[0], whole[row : row + 1])


@scans
def test_a_masked_token_changes_no_bit_of_what_follows(operator: Operator, session: Any) -> None:
    """Selection: with D and without z a token that is masked out leaves the state exactly as it was."""
    model = operator_model(operator, 8)
    inputs = operator_inputs(operator, FULL, 8)
    inputs["mask"] = np.ones_like(inputs["mask"])
    inputs["mask"][:, 5:9] = 0
    other = dict(inputs)
    for name in (operator.inputs[0].name, operator.inputs[1].name, "Bm"):
        other[name] = inputs[name].copy()
        other[name][:, 5:9] = 3.0
    one, two = (session(model, native=True).run(None, values)[0] for values in (inputs, other))
    np.testing.assert_array_equal(one, two)


@every
def test_what_is_not_a_number_stays_so(operator: Operator, session: Any) -> None:
    has = operator.has_all & 7  # without the mask
    for spec in operator.present(has):
        inputs = operator_inputs(operator, FULL, has)
        inputs[spec.name].flat[0] = np.nan
        assert np.isnan(session(operator_model(operator, has), native=True).run(None, inputs)[0]).any(), spec.name


@every
def test_misshapen_inputs_are_named(operator: Operator, session: Any) -> None:
    model = operator_model(operator, operator.has_all)
    for info in model.graph.input:  # a file that promises nothing about shapes
        info.type.tensor_type.ClearField("shape")
    one = session(model, native=True)
    good = operator_inputs(operator, FULL, operator.has_all)
    one.run(None, good)
    for spec in operator.inputs:
        value = good[spec.name]
        with pytest.raises(
            Exception,
            match=rf"{operator.name}: input '{spec.name}' has {value.ndim + 1} dimensions, expected {value.ndim}",
        ):
            one.run(None, good | {spec.name: value[None]})
        for axis, letter in enumerate(spec.dims):
            if sum(letter in other.dims for other in operator.inputs) == 1:
                continue  # any size fits
            wrong = np.concatenate([value, value[(slice(None),) * axis + (slice(0, 1),)]], axis=axis)
            with pytest.raises(
                Exception,
                match=rf"{operator.name}: input '\w+' has (\w = \d+, input '\w+' has \d+|G = 3, which does not divide)",
            ):
                one.run(None, good | {spec.name: wrong})


@every
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_nodes_are_refused_or_computed(operator: Operator, session: Any, data: st.DataObject) -> None:
    """Any rank, any size (0 too), any type, any `has`: an error or a result of the right shape, never a crash."""
    sizes = {letter: data.draw(st.integers(0, 5)) for letter in "BLDHPNGK"}
    has, dtype = data.draw(st.integers(0, operator.has_all)), data.draw(st.sampled_from(["float32", "float16"]))
    model = operator_model(operator, has, dtype)
    inputs = operator_inputs(operator, sizes, has, dtype)
    for info in model.graph.input:
        info.type.tensor_type.ClearField("shape")
    for name in data.draw(st.lists(st.sampled_from(sorted(inputs)), max_size=2, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=6))
        inputs[name] = np.ones(shape, inputs[name].dtype)
    try:
        fits = True
        operator.check({name: value.shape for name, value in inputs.items()})
    except ValueError:
        fits = False
    one = session(model, native=True)
    if fits:
        assert one.run(None, inputs)[0].shape == inputs[operator.inputs[0].name].shape
    else:
        with pytest.raises(Exception, match=operator.name):
            one.run(None, inputs)


def test_a_convolution_without_taps_is_named(session: Any) -> None:
    model = operator_model(SHORT_CONV, 1)
    del model.functions[:]
    model.graph.input[1].type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="MambaShortConv: input 'weight' has K = 0, expected at least one tap"):
        session(model, native=True).run(None, operator_inputs(SHORT_CONV, FULL | {"K": 0}, 1))


def test_groups_that_do_not_divide_are_named(session: Any) -> None:
    for operator, whole in ((SSD_SCAN, "H = 6 of input 'x'"), (SELECTIVE_SCAN, "D = 80 of input 'u'")):
        inputs = operator_inputs(operator, FULL | {"G": 3 if operator is SELECTIVE_SCAN else 4}, 0)
        with pytest.raises(Exception, match=rf"G = \d, which does not divide {whole}"):
            session(operator_model(operator, 0), native=True).run(None, inputs)


@every
@pytest.mark.parametrize("has", [-1, 0, 1, 16])
def test_a_wrong_presence_mask_is_named(operator: Operator, has: int, session: Any) -> None:
    """A node with the inputs of has = 0 or 1 that says otherwise."""
    count = len(operator.required) + (has == 0)
    known = rf"'has' is {has}, expected 0 to {operator.has_all}, a sum of 1 \({operator.optional[0].name}\)"
    message = f"the node has {count}" if has in (0, 1) else known
    model = operator_model(operator, 1 if has == 0 else 0)
    del model.functions[:]
    next(a for a in model.graph.node[0].attribute if a.name == "has").i = has
    inputs = operator_inputs(operator, FULL, 1 if has == 0 else 0)
    with pytest.raises(Exception, match=message):
        session(model, native=True).run(None, inputs)


@every
def test_shape_inference_keeps_names(operator: Operator, session: Any) -> None:
    model = operator_model(operator, operator.has_all & 3)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = session(model, native=True).get_outputs()
    assert output.shape == list(operator.inputs[0].dims)


@every
def test_shape_inference_names_an_unnamed_dimension(operator: Operator, session: Any) -> None:
    """ONNX Runtime would make -1 of it, take that for a size, and run out of memory on graphs that reshape later."""
    model = operator_model(operator, operator.has_all & 3)
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = session(model, native=True).get_outputs()
    assert output.shape[1:] == list(operator.inputs[0].dims[1:])
    assert isinstance(output.shape[0], str)
