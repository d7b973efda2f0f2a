"""Each operator against ONNX Runtime on random inputs; whole graphs of every role; what is freed, what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from mdm.plugins.contract import OPERATORS as OURS
from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.errors import InputError
from mdm.plugins.functions import operator_model
from mdm.reference import load_config
from mdm.reference.checkpoint import build_model
from mdm.tools.check.finding import Array, difference
from mdm.tools.check.nodes import torch_operators
from mdm.tools.check.nodes.evaluator import DTYPES, Evaluation, Step, compute
from mdm.tools.check.nodes.torch_operators import OPERATORS

from ..drawn import Drawn, draw

Tiny = Callable[..., dict[str, Any]]


def of(*shape: int, seed: int = 0, least: float | None = None) -> Array:
    x = np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)
    return x if least is None else np.abs(x) + np.float32(least)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def bools(*shape: int, seed: int = 0) -> Array:
    return of(*shape, seed=seed) > 0


HUGE = np.iinfo(np.int64).max
# operator, inputs, attributes; None is an absent input, [n] after the operator a count of outputs
CASES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("Add", [of(2, 3, 4), of(3, 1)], {}),
    ("Sub", [of(2, 3), of(3)], {}),
    ("Sub", [ints(5, 7), ints(2)], {}),
    ("Mul", [of(2, 1, 4), of(3, 1)], {}),
    ("Div", [of(2, 3), of(3, least=0.3)], {}),
    ("MatMul", [of(2, 5, 8), of(8, 3)], {}),
    ("MatMul", [of(40, 8), of(8, 3)], {}),
    ("MatMul", [of(2, 4, 5, 8), of(2, 4, 8, 3)], {}),
    ("Pow", [of(2, 9), np.float32(2)], {}),
    ("Pow", [of(2, 9, least=0.1), of(9)], {}),
    ("Sqrt", [of(7, least=0)], {}), ("Exp", [of(7)], {}), ("Sin", [300 * of(64)], {}), ("Cos", [300 * of(64)], {}),
    ("Sinh", [of(9)], {}), ("Floor", [3 * of(32)], {}), ("Sigmoid", [10 * of(300)], {}), ("Identity", [of(3)], {}),
    ("ReduceMean", [of(2, 3, 65), ints(-1)], {"keepdims": 1}),
    ("ReduceMean", [of(2, 3, 5), ints(0, 2)], {"keepdims": 0}),
    ("ReduceMean", [of(2, 3, 5), ints(0, 2)], {}),
    ("ReduceMean", [of(2, 3, 5)], {}),
    ("ReduceSum", [of(2, 3, 9), ints(1)], {"keepdims": 0}),
    ("ReduceSum", [ints(1, 2, 3), ints(0)], {"keepdims": 0}),
    ("ReduceMax", [of(2, 3, 5), ints(2)], {"keepdims": 0}),
    ("Max", [of(2, 3), of(3, seed=1), of(1)], {}), ("Min", [of(2, 3), np.float32(0)], {}),
    ("Concat", [of(2, 3), of(2, 1)], {"axis": -1}), ("Concat", [ints(1), ints(2, 3)], {"axis": 0}),
    ("Split", [of(2, 7, 3), ints(4, 1, 2)], {"axis": 1}), ("Split", [of(2, 7), ints(4, 3)], {"axis": -1}),
    ("Slice", [of(2, 9, 3), ints(1), ints(-2), ints(1)], {}),
    ("Slice", [of(2, 9), ints(-4), ints(HUGE), ints(1)], {}),
    ("Slice", [of(8, 9), ints(1, 0), ints(7, 9), ints(0, 1), ints(2, 3)], {}),
    ("Slice", [of(3, 4), ints(5), ints(9), ints(0)], {}),
    ("Gather", [of(4, 3), ints(0, 3, -1)], {}),
    ("Gather", [of(2, 5, 3), np.array([[0, 4], [2, 2]])], {"axis": 1}),
    ("Gather", [of(2, 5, 3), np.array(1)], {"axis": 1}),
    ("Reshape", [of(2, 6, 4), ints(0, -1, 8)], {}), ("Reshape", [of(0, 4), ints(0, 2, 2)], {"allowzero": 1}),
    ("Transpose", [of(2, 3, 4)], {"perm": [2, 0, 1]}), ("Transpose", [of(2, 3, 4)], {}),
    ("Unsqueeze", [of(2, 3), ints(0, -1)], {}), ("Unsqueeze", [of(2, 3), ints(3, 1)], {}),
    ("Squeeze", [of(1, 2, 1), ints(0)], {}), ("Squeeze", [of(1, 2, 1)], {}),
    ("Expand", [of(1, 3, 1), ints(2, 1, 4)], {}), ("Expand", [of(2, 3), ints(1, 1)], {}),
    ("Shape", [of(2, 3, 4)], {}), ("Shape", [of(2, 3, 4)], {"start": -2, "end": 2}),
    ("Range", [np.array(2), np.array(11), np.array(3)], {}),
    ("Where", [bools(2, 1), of(3), of(2, 3, seed=3)], {}),
    ("Cast", [3 * of(9)], {"to": TensorProto.INT64}), ("Cast", [bools(5)], {"to": TensorProto.FLOAT}),
    ("Cast", [of(5)], {"to": TensorProto.FLOAT16}),
    ("Clip", [of(9), np.float32(-0.3), np.float32(0.5)], {}), ("Clip", [of(9), None, np.float32(0.5)], {}),
    ("Less", [of(2, 3), of(3, seed=2)], {}), ("Less", [ints(1, 2, 3), ints(2)], {}),
    ("Equal", [ints(1, 2, 3), ints(2)], {}),
    ("And", [bools(2, 3), bools(3, seed=5)], {}), ("Or", [bools(2, 3), bools(3, seed=5)], {}),
    ("ArgMax", [np.round(2 * of(5, 30))], {"axis": -1, "keepdims": 0}), ("ArgMax", [of(5, 3)], {"axis": 0}),
    ("Pad", [of(2, 3, 4), ints(0, 1, 0, 0, 2, 3), np.float32(7)], {}),
    ("Pad", [of(2, 3, 4), ints(1, 2), np.float32(1), ints(-2)], {}),
    ("Conv", [of(2, 6, 9), of(6, 1, 4), of(6)], {"group": 6, "pads": [3, 0]}),
    ("Conv", [of(2, 6, 5, 7), of(6, 1, 3, 3), of(6)], {"group": 6, "pads": [1, 1, 1, 1]}),
    ("Conv", [of(2, 6, 5, 7), of(6, 1, 3, 3)], {"group": 6, "strides": [2, 3], "pads": [0, 2, 1, 0]}),
    ("Conv", [of(2, 3, 8, 6), of(5, 3, 2, 2), of(5)], {"strides": [2, 2]}),
    ("Conv", [of(2, 3, 8, 8), of(5, 3, 3, 3), of(5)], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", [of(2, 4, 9), of(6, 2, 3), of(6)], {"group": 2}),
    ("AveragePool", [of(2, 3, 6, 9)], {"kernel_shape": [3, 3], "strides": [3, 3]}),
    ("Softmax", [of(2, 5, 9)], {"axis": -1}),
    ("RMSNormalization", [of(2, 3, 40), of(40)], {"axis": -1, "epsilon": 0.1}),
    ("InstanceNormalization", [of(2, 4, 3, 5), of(4), of(4)], {"epsilon": 0.1}),
    ("Resize", [of(2, 3, 4, 5), None, np.array([1, 1, 2, 2], np.float32)],
     {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
]  # fmt: skip


def node_of(op: str, inputs: list[Array | None], attributes: dict[str, Any]) -> NodeProto:
    outputs = [f"y{n}" for n in range(len(inputs[1]))] if op == "Split" and inputs[1] is not None else ["y0"]
    names = ["" if x is None else f"x{n}" for n, x in enumerate(inputs)]
    return helper.make_node(op, names, outputs, name="the node", **attributes)


def in_ort(node: NodeProto, inputs: list[Array | None], types: list[torch.dtype]) -> list[Array]:
    """It refuses a model whose outputs have other types."""
    feeds = {f"x{n}": np.asarray(x) for n, x in enumerate(inputs) if x is not None}
    kinds = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in feeds.items()}
    shapes = [helper.make_tensor_value_info(n, kinds[n], x.shape) for n, x in feeds.items()]
    onnx_types = {kind: number for number, kind in DTYPES.items()}
    said = [helper.make_tensor_value_info(n, onnx_types[t], None) for n, t in zip(node.output, types, strict=True)]
    opsets = [helper.make_opsetid("", 23)]
    model = helper.make_model(helper.make_graph([node], "g", shapes, said), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def tensors(inputs: list[Array | None]) -> list[Tensor | None]:
    return [None if x is None else torch.tensor(np.asarray(x)) for x in inputs]


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_an_operator_is_onnx_runtimes(op: str, inputs: list[Array | None], attributes: dict[str, Any]) -> None:
    node = node_of(op, inputs, attributes)
    deployed = compute(node, tensors(inputs), exact=False)
    expected = in_ort(node, inputs, [y.dtype for y in deployed])
    for exact, found in ((False, deployed), (True, compute(node, tensors(inputs), exact=True))):
        assert len(found) == len(expected)
        for y, right in zip(found, expected, strict=True):
            floats = right.dtype.kind == "f"
            assert y.dtype == (torch.float64 if exact and floats else torch.tensor(right).dtype)
            assert y.shape == right.shape
            np.testing.assert_allclose(
                y.double().numpy(),
                right.astype(np.float64),
                rtol=1e-3 if op == "Cast" else 2e-6,
                atol=1e-6 if floats else 0,
            )


def test_every_operator_has_a_case() -> None:
    written = {op for op, _, _ in CASES} - {"Cast"}
    assert {("", op) for op in written} | {("mdm", name) for name in OURS} == set(OPERATORS)


@pytest.mark.parametrize(
    ("operator", "has"), [(operator, has) for operator in OURS.values() for has in range(operator.has_all + 1)],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_one_of_ours_has_the_inputs_that_has_says(operator: Any, has: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = {"chunk_size": 16} if operator is SSD_SCAN else {}
    model = operator_model(operator, has, plugin_namespace="mdm", plugin_version="1", **chunk)
    sizes = {"B": 2, "L": 37, "D": 6, "H": 3, "P": 2, "N": 4, "G": 1, "K": 4}
    draw_ = np.random.default_rng(has)
    values = []
    for spec in operator.present(has):
        x = draw_.standard_normal([sizes[letter] for letter in spec.dims]).astype(np.float32)
        values.append(-np.abs(x) if spec.name == "A" else (x > 0).astype(np.float32) if spec.name == "mask" else x)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (right,) = session.run(None, dict(zip(model.graph.node[0].input, values, strict=True)))
    (exact,) = compute(model.graph.node[0], [torch.tensor(x) for x in values], exact=True)
    assert exact.dtype == torch.float64
    assert difference(right, exact.numpy()).worst < 1e-6
    monkeypatch.setattr(torch_operators, "SCANNED_AT_ONCE", 2 * 37 * 4 * 4)  # four of six channels
    (in_parts,) = compute(model.graph.node[0], [torch.tensor(x) for x in values], exact=True)
    torch.testing.assert_close(in_parts, exact, rtol=1e-13, atol=1e-13)


def test_exact_is_float64_to_its_last_digits() -> None:
    x, w = of(3, 40).astype(np.float64), of(40, 5).astype(np.float64)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    (y,) = compute(node, [torch.tensor(x), torch.tensor(w)], exact=True)
    np.testing.assert_allclose(y.numpy(), x @ w, rtol=1e-14)
    taps = of(4, 1, 3).astype(np.float64)
    (y,) = compute(
        helper.make_node("Conv", ["x", "w"], ["y"], group=4, pads=[2, 0]),
        [torch.tensor(x[:, :, None].repeat(4, 2).transpose(0, 2, 1)), torch.tensor(taps)], exact=True,
    )  # fmt: skip
    right = np.stack([[np.convolve(row, tap[::-1])[:40] for tap in taps[:, 0]] for row in x])
    np.testing.assert_allclose(y.numpy(), right, rtol=1e-12, atol=1e-13)
    (y,) = compute(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16), [torch.tensor([1 / 3])], exact=True)
    assert y.dtype == torch.float64
    assert y.item() == np.float32(1 / 3)


@given(st.lists(st.floats(-3e4, 3e4), min_size=1, max_size=30), st.sampled_from([torch.float16, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_half_precision_is_rounded_once_a_node(numbers: list[float], kind: torch.dtype) -> None:
    x = torch.tensor(numbers).to(kind)
    (y,) = compute(helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0), [x], exact=False)
    (z,) = compute(helper.make_node("Sigmoid", ["x"], ["y"]), [x], exact=False)
    assert y.dtype == z.dtype == kind
    wide = x.double().sum()
    torch.testing.assert_close(y.double(), wide.to(kind).double(), rtol=2 * torch.finfo(kind).eps, atol=0.1)
    torch.testing.assert_close(z.double(), x.double().sigmoid(), rtol=torch.finfo(kind).eps, atol=6e-8)


@pytest.mark.parametrize(
    ("op", "domain", "attributes"),
    [
        ("Softplus", "", {}),
        ("Add", "com.microsoft", {}),
        ("Conv", "", {"dilations": [2]}),
        ("Pad", "", {"mode": "edge"}),
    ],
)
def test_what_the_exporter_does_not_write_is_refused(op: str, domain: str, attributes: dict[str, Any]) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], name="backbone.blocks.1.odd", domain=domain, **attributes)
    with pytest.raises(InputError, match=rf"backbone\.blocks\.1\.odd.*{op}"):
        compute(node, [torch.ones(1), torch.ones(1)], exact=True)


# --------------------------------------------------------------------------------------------------------- whole graphs

BUNDLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mdm": ({}, {}),
    "mdm fp16": ({}, {"precision": "fp16"}),
    "selection, parallel": ({"keep": 0.5, "scan": "parallel"}, {"opset": 23}),
    "dim": ({"family": "dim", "schedule_image": {"kind": "sd"}}, {"upsample": [2]}),
    "dim fp16": ({"family": "dim"}, {"precision": "fp16"}),
}
# One of each kind.
GRAPHS = {
    "denoise_joint", "step_turn_guided", "step_text", "step_image_guided", "step_image_guided_16_upsample2",
    "encode_text", "encode_image", "decode_text", "decode_image",
}  # fmt: skip


@pytest.fixture(scope="module", params=BUNDLES)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny: Tiny, tiny_model: Callable[..., Any]) -> Drawn:
    changes, options = BUNDLES[request.param]
    config = tiny(**changes)
    if config["family"] == "mdm":
        model = tiny_model(**changes)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = build_model(load_config(config))
    return draw(tmp_path_factory.mktemp(request.param.replace(" ", "-")), config, model.state_dict(), **options)


def test_a_whole_graph_is_onnx_runtimes(drawn: Drawn, figure: Callable[[str, float, float], None]) -> None:
    worst = 0.0
    for graph in GRAPHS & drawn.blueprint.built.keys():
        model, inputs = drawn.blueprint.model(graph), drawn.inputs(graph)
        exact, deployed = (Evaluation(model, drawn.values(graph), kind).run(inputs) for kind in (True, False))
        found = dict(zip(exact, drawn.run(drawn.file(graph), inputs, list(exact)), strict=True))
        for name, truth in exact.items():
            assert deployed[name].numpy().dtype == found[name].dtype
            if name in ("ids", "mask_next"):  # decisions: near ties may fall either way
                assert (deployed[name].numpy() == found[name]).mean() > 0.9
                continue
            floor = difference(deployed[name].numpy(), truth.numpy()).rms
            worst = max(worst, difference(found[name], truth.numpy()).rms / max(floor, 2.0**-24))
    figure(f"error over floor, {drawn.folder.parent.name.rstrip('0')}", worst, 4)


def test_the_file_itself_evaluates_to_the_same(drawn: Drawn) -> None:
    """With its weights where the export put them."""
    graph = next(iter(drawn.blueprint.built))
    inputs = drawn.inputs(graph)
    a, b = (Evaluation(model, drawn.values(graph), False).run(inputs)
            for model in (drawn.blueprint.model(graph), drawn.file(graph)))  # fmt: skip
    assert all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------------- memory


def chain(count: int) -> ModelProto:
    """x + w0 + w1 + ..., each weight outside the file."""
    names = ["x", *(f"h{n}" for n in range(count))]
    nodes = [helper.make_node("Add", [names[n], f"w{n}"], [names[n + 1]], name=names[n + 1]) for n in range(count)]
    weights = [TensorProto(name=f"w{n}", data_type=TensorProto.FLOAT16, dims=[64]) for n in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [64]) for name in ("x", names[-1])]
    return helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights))


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_outlives_its_last_use(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    apply = Step.apply

    def counted(self: Step, inputs: Any) -> list[Tensor]:
        nonlocal most
        outputs = apply(self, inputs)
        most = max(most, sum(ref() is not None for ref in alive))
        alive.extend(map(weakref.ref, outputs))
        return outputs

    def values(name: str) -> Tensor:
        weight = torch.full((64,), 0.5)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Step, "apply", counted)
    found = Evaluation(chain(40), values, exact).run({"x": np.zeros(64, np.float16)}, ["h39", "h3"])
    assert {name: y[0].item() for name, y in found.items()} == {"h39": 20.0, "h3": 2.0}
    assert found["h3"].dtype == (torch.float64 if exact else torch.float16)
    assert most <= 4  # the input, the weight, the output, and h3, which was asked for


def test_a_run_in_two_stretches_is_the_run(drawn: Drawn) -> None:
    graph = next(iter(drawn.blueprint.built))
    model, inputs = drawn.blueprint.model(graph), drawn.inputs(graph)
    evaluation = Evaluation(model, drawn.values(graph), exact=True)
    whole, live = evaluation.run(inputs), evaluation.given(inputs)
    count = len(model.graph.node)
    needed = {name for node in model.graph.node[count // 2 :] for name in node.input}
    evaluation.advance(live, range(count // 2), needed)
    assert set(live) <= needed | set(inputs)
    evaluation.advance(live, range(count // 2, count), set(whole))
    assert all(torch.equal(live[name], whole[name]) for name in whole)
