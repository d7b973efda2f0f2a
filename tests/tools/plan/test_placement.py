"""Who computes a node: the parser's order, functions in functions, and files that unfold without end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from onnx import FunctionProto, ModelProto, NodeProto, helper

from mdm.plugins.contract import DOMAIN, SHORT_CONV
from mdm.plugins.errors import InputError
from mdm.plugins.functions import function_body
from mdm.tools.plan.placement import By, Parser

node = helper.make_node
Models = Callable[..., ModelProto]
CONV = function_body(SHORT_CONV, 0)


def conv(domain: str = DOMAIN, **named: str) -> NodeProto:
    return node("MambaShortConv", ["x", "w"], ["y"], domain=domain, **named)


NAMED = {"plugin_namespace": "mdm", "plugin_version": "1"}


@pytest.mark.parametrize(
    ("one", "functions", "plugins", "expected"),
    [
        (conv(**NAMED), [CONV], True, By.PLUGIN),
        (conv(**NAMED), [], True, By.PLUGIN),
        (conv(**NAMED), [CONV], False, By.BODY),
        (conv(**NAMED), [], False, By.NOBODY),
        (conv(plugin_namespace="mdm"), [CONV], True, By.PLUGIN),  # the version is 1 where none is said
        (conv(), [CONV], True, By.BODY),  # a function goes before a plugin that the node does not name
        (conv(), [], True, By.PLUGIN),  # the node's domain is then asked for as a namespace
        (conv("other"), [], True, By.NOBODY),
        (conv(plugin_namespace="mdm", plugin_version="2"), [CONV], True, By.BODY),
        (conv(plugin_namespace="others", plugin_version="1"), [CONV], True, By.BODY),
        (node("Relu", ["x"], ["y"], domain="other"), [], True, By.TENSORRT),  # its parser asks for no domain
        (node("Foo", ["x"], ["y"], domain="other"), [], True, By.NOBODY),
        (node("NegativeLogLikelihoodLoss", ["x"], ["y"]), [], True, By.NOBODY),
    ],
)
def test_the_parsers_order(
    model_of: Models, one: NodeProto, functions: list[FunctionProto], plugins: bool, expected: By
) -> None:
    assert Parser(model_of([one], {"x": [4]}, ["y"], functions=functions), plugins).by(one) is expected


def test_nodes_are_counted_where_they_end(model_of: Models) -> None:
    """In subgraphs and bodies too; Constant nodes are values."""
    then, other = (helper.make_graph([node(op, ["x"], ["z"])], op, [], []) for op in ("Relu", "Exp"))
    nodes = [
        conv(**NAMED),
        conv(),
        node("If", ["c"], ["z"], then_branch=then, else_branch=other),
        node("Foo", ["z"], ["q"], domain="d"),
    ]
    placed = Parser(model_of(nodes, {"x": [4]}, ["q"], functions=[CONV]), True).place()
    inside = Counter(one.op_type for one in CONV.node if one.op_type != "Constant")
    assert placed.plugins == {"MambaShortConv": 1}
    assert placed.bodies == placed.unnamed == {"MambaShortConv": 1}
    assert placed.tensorrt == inside + Counter(["If", "Relu", "Exp"])
    assert placed.nobody == {"d.Foo": 1}


def calls(name: str, callee: str, times: int) -> Any:
    nodes = [node(callee, ["x"], [f"y{n}"], domain="other") for n in range(times)]
    return helper.make_function(
        "other", name, ["x"], ["y0"], nodes, [helper.make_opsetid("", 20), helper.make_opsetid("other", 1)]
    )


def test_functions_in_functions(model_of: Models) -> None:
    functions = [calls("A", "B", 3), calls("B", "Relu", 5)]
    placed = Parser(
        model_of([node("A", ["x"], ["y"], domain="other")] * 2, {"x": [4]}, ["y"], functions=functions), True
    ).place()
    assert (placed.bodies, placed.tensorrt) == ({"A": 2, "B": 6}, {"Relu": 30})


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ([calls("A", "A", 1)], "calls itself"),
        ([calls("A", "B", 1), calls("B", "A", 1)], "calls itself"),
        ([*(calls(f"A{n}" if n else "A", f"A{n + 1}", 10) for n in range(30)), calls("A30", "Relu", 1)], "unfold"),
    ],
)  # fmt: skip
def test_files_that_unfold_without_end(model_of: Models, functions: list[FunctionProto], said: str) -> None:
    model = model_of([node("A", ["x"], ["y"], domain="other")], {"x": [4]}, ["y"], functions=functions)
    with pytest.raises(InputError, match=said):
        Parser(model, True).place()
