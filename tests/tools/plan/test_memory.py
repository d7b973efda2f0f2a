"""Memory: small graphs counted by hand, bodies against the same graph with every body in its place, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner

from mdm.plugins.contract import OPERATORS, SELECTIVE_SCAN, SSD_SCAN, Operator
from mdm.plugins.functions import operator_model
from mdm.runtime.bundle import open_bundle
from mdm.runtime.safetensors_header import read_header
from mdm.runtime.tensorrt.profiles import PROFILES, shapes_of
from mdm.tools.plan.memory import Memory, Peak, bytes_of, weights_of
from mdm.tools.plan.plan import read_model
from mdm.tools.plan.tensors import infer

node = helper.make_node
Models = Callable[..., ModelProto]


def measured(model: ModelProto, **sizes: tuple[int, ...]) -> Peak:
    return Memory(model, lambda one: False).peak(infer(model, sizes))


def test_a_peak_counted_by_hand(model_of: Models) -> None:
    """x is 4 x 10 float32, 160 bytes:   a  b  wide      half   y
    Relu -> a                            160
    Sigmoid -> b                         160 160
    Concat(a, b) -> wide                 160 160 320            640, the peak
    Cast(wide) -> half                           320     160
    Cast(half) -> y, an output, elsewhere                160
    """
    nodes = [
        node("Relu", ["x"], ["a"], "first"), node("Sigmoid", ["x"], ["b"], "second"),
        node("Concat", ["a", "b"], ["wide"], "third", axis=1), node("Cast", ["wide"], ["half"], "fourth", to=10),
        node("Cast", ["half"], ["y"], "fifth", to=1),
    ]  # fmt: skip
    model = model_of(nodes, {"x": ["batch", 10]}, ["y"])
    assert measured(model, x=(4, 10)) == Peak(640, "third")
    assert measured(model, x=(8, 10)).bytes == 2 * 640
    assert bytes_of((*model.graph.input, *model.graph.output), infer(model, {"x": (4, 10)}).tensors) == 160 + 320


def test_a_tensor_lives_until_its_last_reader(model_of: Models) -> None:
    """40 bytes each: a stays for the last node, so three of four are alive at once; without that reader, two."""
    chain = [node("Relu", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["c"])]
    late = [*chain, node("Add", ["a", "c"], ["y"])]
    early = [*chain, node("Add", ["c", "c"], ["y"])]
    assert measured(model_of(late, {"x": [10]}, ["y"]), x=(10,)).bytes == 120
    assert measured(model_of(early, {"x": [10]}, ["y"]), x=(10,)).bytes == 80


def test_what_nobody_reads_and_constants(model_of: Models) -> None:
    held = helper.make_tensor("value", TensorProto.FLOAT, [10], [1.0] * 10)
    nodes = [
        node("Constant", [], ["k"], value=held),
        node("Split", ["x"], ["a", "b"], num_outputs=2),
        node("Add", ["a", "k"], ["y"]),
    ]
    assert measured(model_of(nodes, {"x": [20]}, ["y"]), x=(20,)).bytes == 80  # a and b, for the one node


def test_what_follows_from_weights_alone_is_weights(model_of: Models) -> None:
    """A transposed weight, and what is made of it: TensorRT has it computed when it builds."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[50, 10])
    nodes = [
        node("Transpose", ["w"], ["t"]),
        node("Exp", ["t"], ["e"]),
        node("MatMul", ["x", "e"], ["m"]),
        node("Relu", ["m"], ["y"]),
    ]
    assert measured(model_of(nodes, {"x": [2, 10]}, ["y"], initializers=[weight]), x=(2, 10)).bytes == 2 * 50 * 4


def test_tensors_without_a_size_are_told_of(model_of: Models) -> None:
    nodes = [node("NonZero", ["x"], ["a"]), node("Cast", ["a"], ["b"], to=1), node("Relu", ["b"], ["y"])]
    assert measured(model_of(nodes, {"x": [4]}, ["y"]), x=(4,)) == Peak(0, "", 2)


def scan(axis: int | None = None) -> NodeProto:
    """Sums rows: state 3, each turn reads a row of 3 and makes one; between its nodes lives one of 12 bytes."""
    infos = [helper.make_tensor_value_info(name, 1, [None]) for name in ("s", "r", "t", "o")]
    body = helper.make_graph(
        [node("Add", ["s", "r"], ["t"]), node("Exp", ["t"], ["e"]), node("Mul", ["e", "w"], ["o"])],
        "body",
        infos[:2],
        infos[2:],
    )
    axes = {} if axis is None else {"scan_input_axes": [axis]}
    return node("Scan", ["start", "x"], ["end", "rows"], "scan", body=body, num_scan_inputs=1, **axes)


@pytest.mark.parametrize(("axis", "turns"), [(None, 5), (0, 5), (1, 3), (-1, 3)])
def test_a_loop(model_of: Models, axis: int | None, turns: int) -> None:
    """w is read in the body alone, and lives until then."""
    size = 15 // turns
    nodes = [node("Relu", ["v"], ["w"]), scan(axis), node("Relu", ["rows"], ["y"]), node("Relu", ["end"], ["z"])]
    model = model_of(nodes, {"x": [5, 3], "start": [size], "v": [size]}, ["y", "z"])
    found = measured(model, x=(5, 3), start=(size,), v=(size,))
    row = 4 * size
    # w, rows and end; in the loop the row and the state, both copied, and e
    assert found == Peak(row + 60 + row + (4 * row + row), "scan", loops=(turns,))


def test_a_loop_whose_turns_nobody_knows(model_of: Models) -> None:
    infos = [
        helper.make_tensor_value_info(n, k, s)
        for n, k, s in (("i", 7, []), ("c", 9, []), ("s", 1, [4]), ("d", 9, []), ("t", 1, [4]))
    ]
    body = helper.make_graph([node("Identity", ["c"], ["d"]), node("Relu", ["s"], ["t"])], "body", infos[:3], infos[3:])
    model = model_of([node("Loop", ["n", "", "x"], ["y"], body=body)], {"n": [], "x": [4]}, ["y"], {"n": "int64"})
    assert measured(model, n=(), x=(4,)).loops == (None,)


SIZES = {"B": 2, "L": 130, "H": 4, "P": 32, "D": 32, "G": 2, "N": 16}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("operator", "turns"), [(SSD_SCAN, 3), (SELECTIVE_SCAN, 130)])
def test_a_body_is_as_in_the_place_of_its_call(operator: Operator, turns: int, dtype: str) -> None:
    model = operator_model(operator, operator.has_all, dtype)
    shapes = {spec.name: tuple(SIZES[letter] for letter in spec.dims) for spec in operator.inputs}
    by_body = Memory(model, lambda one: one.op_type in OPERATORS)
    found = by_body.peak(infer(model, shapes))
    whole = inliner.inline_local_functions(model)
    assert found.bytes == measured(whole, **shapes).bytes > 0
    assert (found.loops, found.unknown, by_body.faults) == ((turns,), 0, [])


def test_bodies_in_a_model_are_an_upper_bound(exported: Callable[..., Path]) -> None:
    """A body's inputs may end within it, which a call does not see: a few percent."""
    bundle = open_bundle(exported("mdm-tiny"))
    model = read_model(bundle, "step_joint_guided")
    sizes = {i: three[2] for i, three in shapes_of(bundle.manifest, "step_joint_guided", PROFILES["latency"]).items()}
    found = Memory(model, lambda one: one.op_type in OPERATORS).peak(infer(model, sizes))
    whole = measured(inliner.inline_local_functions(model), **sizes)
    assert whole.bytes <= found.bytes <= 1.1 * whole.bytes
    assert sorted(map(str, whole.loops)) == sorted(map(str, found.loops)) == ["2"] * 7
    assert measured(model, **sizes).bytes < found.bytes


def test_a_body_that_does_not_take_what_it_is_given() -> None:
    model = operator_model(SSD_SCAN, 0, "float16")
    model.graph.input[2].type.tensor_type.elem_type = TensorProto.FLOAT16  # A, float32 by the contract
    sizes = {"B": 1, "L": 8, "H": 2, "P": 32, "G": 1, "N": 16}
    memory = Memory(model, lambda one: one.op_type in OPERATORS)
    memory.peak(infer(model, {i.name: tuple(sizes[letter] for letter in i.dims) for i in SSD_SCAN.required}))
    assert len(memory.faults) == 1
    assert "the body of MambaSsdScan does not take what node 'node' gives" in memory.faults[0]


def test_weights_are_the_bundles(exported: Callable[..., Path]) -> None:
    """Of all graphs together, what lies at one place once: as many bytes as the weights' files hold."""
    for name, precision in (("mdm-tiny", "fp16"), ("mdm-tiny", "fp32"), ("dim", "bf16")):
        bundle = open_bundle(exported(name, precision))
        found: dict[tuple[str, ...], int] = {}
        for graph in bundle.manifest["graphs"]:
            found |= {key: size for key, size in weights_of(read_model(bundle, graph)).items() if key[0]}
        held = 0
        for path in {file for graph in bundle.manifest["graphs"].values() for file in graph["weights"]}:
            held += sum(entry.length for entry in read_header(bundle.file(path)).tensors.values())
        assert 0.99 * held < sum(found.values()) <= held


def test_what_has_two_names_is_there_once() -> None:
    tensors = [TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=[3, 5]) for name in "abc"]
    for tensor, offset in zip(tensors, ("0", "0", "64"), strict=True):
        for key, value in {"location": "w", "offset": offset}.items():
            tensor.external_data.add(key=key, value=value)
    inline = helper.make_tensor("d", TensorProto.INT64, [2], [1, 2])
    model = ModelProto()
    model.graph.initializer.extend([*tensors, inline])
    assert weights_of(model) == {("w", "0"): 30, ("w", "64"): 30, ("", "d"): 16}
    assert json.dumps(sum(weights_of(model).values())) == "76"
