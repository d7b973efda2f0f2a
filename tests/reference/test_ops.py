"""The torch custom ops: the same numbers as the functions they stand for, one node for a tracer, errors by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdm.plugins.contract import OPERATORS, SHORT_CONV, Operator
from mdm.plugins.errors import InputError
from mdm.reference import ops, scan
from mdm.reference import short_conv as conv
from mdm.tools.bench.operator_inputs import operator_inputs

SIZES = {"B": 2, "L": 9, "D": 8, "H": 4, "P": 3, "N": 5, "G": 2, "K": 4}
every = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def tensors(operator: Operator, has: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in operator_inputs(operator, SIZES, has).items()}


@every
@pytest.mark.parametrize("bits", [0, 5, 15])
def test_the_op_is_the_function(operator: Operator, bits: int) -> None:
    values = tensors(operator, operator.has_all & bits)
    op = getattr(ops, operator.torch_name)
    function = getattr(conv if operator is SHORT_CONV else scan, operator.torch_name)
    assert torch.equal(op(**values), function(**values))
    torch.library.opcheck(
        op, tuple(values.get(spec.name) for spec in operator.inputs), test_utils=("test_schema", "test_faketensor")
    )


@every
def test_a_tracer_sees_one_node_with_free_sizes(operator: Operator) -> None:
    op = getattr(ops, operator.torch_name)

    class Net(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> Any:
            return op(*values)

    values = tuple(tensors(operator, operator.has_all).values())
    free = tuple(
        {axis: torch.export.Dim.AUTO for axis, letter in enumerate(spec.dims) if letter in "BL"}
        for spec in operator.inputs
    )
    program = torch.export.export(Net(), values, dynamic_shapes={"values": free})
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == [f"mdm.{operator.torch_name}.default"]
    assert not isinstance(calls[0].meta["val"].shape[1], int), "the length is free"


@every
def test_wrong_shapes_are_named(operator: Operator) -> None:
    values = tensors(operator, operator.has_all)
    last = operator.inputs[-1]
    values[last.name] = values[last.name][..., :-1]
    with pytest.raises(InputError, match=f"{operator.name}: input '{last.name}' has {last.dims[-1]} = "):
        getattr(ops, operator.torch_name)(**values)
