"""Planted faults, each of which must be named to the node; sound graphs, which must name none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.errors import InputError
from mdm.plugins.functions import attach_functions, operator_nodes
from mdm.tools.check.nodes.bisect import Bisection, Stretch

from ..drawn import GRAPH, Make, maker, node_named, place


@pytest.fixture(scope="module")
def make(tmp_path_factory: Any, tiny: Any, tiny_model: Any) -> Make:
    return maker(tmp_path_factory, tiny, tiny_model)


# ------------------------------------------------------------------------------------------------------- sound graphs


# Selection multiplies by (alpha / sigma)^2, where one sample's outweighs all others': the few roundings of one number
# are measured, and no statistics of many.
@pytest.mark.parametrize(
    ("precision", "changes", "graphs", "most"),
    [
        ("fp32", {}, ["denoise_joint", "step_text_guided", "decode_text"], 0.5),
        ("fp16", {}, ["denoise_joint", "step_image_guided", "encode_image"], 0.5),
        ("fp32", {"keep": 0.5}, ["step_joint_guided"], 0.8),
        ("fp16", {"family": "dim"}, ["step_image_guided"], 0.5),
    ],
    ids=["fp32", "fp16", "selection", "dim"],
)
def test_a_sound_graph_names_no_node(
    make: Make, precision: str, changes: dict[str, Any], graphs: list[str], most: float,
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str, float, float], None],
) -> None:  # fmt: skip
    """And takes that much of its limits at most."""
    used, judge = [], Bisection.judge

    def judged(self: Bisection, start: int, end: int, truth: Any) -> Stretch:
        stretch = judge(self, start, end, truth)
        used.append(stretch.worst.used if stretch.worst else 0.0)
        return stretch

    monkeypatch.setattr(Bisection, "judge", judged)
    drawn = make(precision, **changes)
    for graph in graphs:
        for seed in range(20 // len(graphs)):
            errors, divergence = place(drawn, graph=graph, seed=seed)
            assert divergence is None
            assert len(errors.own) == len(errors.grown) == len(errors.own_floor) == len(errors.parts)
    figure(f"own error, share of its limit, {precision} {changes or ''}", max(used), most)


def test_parts_are_the_blocks_and_pieces_around_them(make: Make) -> None:
    errors, _ = place(make())
    blocks = [part for part in errors.parts if part.startswith("backbone.blocks.")]
    assert blocks == [f"backbone.blocks.{n}" for n in range(3)]
    count = len(make().file(GRAPH).graph.node)
    assert len(errors.parts) < 2 * count**0.5
    at = errors.parts.index(blocks[0])
    assert all(0 < error < 1e-5 for error in errors.grown[at : at + 3])


# --------------------------------------------------------------------------------------------------- faults in the file


def test_a_scaled_weight_names_its_product(make: Make, tmp_path: Path) -> None:
    drawn = make().copy(tmp_path / "spoilt")
    weight = "backbone.blocks.1.mixers.0.out_proj.weight"
    tensor = next(t for t in drawn.file(GRAPH).graph.initializer if t.name == weight)
    at = {entry.key: entry.value for entry in tensor.external_data}
    with open(drawn.folder / at["location"], "r+b") as file:
        file.seek(int(at["offset"]))
        values = np.frombuffer(file.read(int(at["length"])), np.float32)
        file.seek(int(at["offset"]))
        file.write((1.01 * values).astype(np.float32).tobytes())
    errors, divergence = place(drawn)
    assert divergence is not None
    assert divergence.node == "backbone.blocks.1.mixers.0.out_proj.MatMul"
    assert (divergence.module, divergence.op) == ("backbone.blocks.1.mixers.0.out_proj", "MatMul")
    assert divergence.error == pytest.approx(0.01, rel=0.01)
    assert divergence.said.startswith("differs by 1.0e-02 where arithmetic explains ")
    assert divergence.inputs[weight] == list(tensor.dims)
    worst = errors.parts[int(np.argmax(errors.own))]
    assert worst == "backbone.blocks.1"
    behind = errors.parts.index(worst)
    assert max(errors.grown[:behind]) < 1e-5 < min(errors.grown[behind : behind + 2])


def test_another_blocks_scan_order_names_the_gather(make: Make) -> None:
    drawn = make(blocks=5)
    file = drawn.file(GRAPH)
    first, second = [node for node in file.graph.node if "reorder" in node.name and "blocks" in node.name][:2]
    right, second.input[1] = second.input[1], first.input[1]
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert (divergence.node, divergence.op) == (second.name, "Gather")
    assert f"reads {first.input[1]} where the exporter writes {right}" in divergence.said


def test_a_scan_without_D_names_the_scan(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    scans = [node for node in operator_nodes(file) if node.op_type == SSD_SCAN.name]
    for node in scans:  # a file holds one body for each operator
        has = next(attribute for attribute in node.attribute if attribute.name == "has")
        names = [spec.name for spec in SSD_SCAN.present(has.i)]
        del node.input[names.index("D")]
        has.i -= 1
    del file.functions[:]
    attach_functions(file)
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert (divergence.node, divergence.op) == ("backbone.blocks.0.mixers.0.scan", "mdm.MambaSsdScan")
    assert "lacks input D" in divergence.said


def test_an_overflow_in_float16_names_the_product(make: Make, tiny_model: Any) -> None:
    name = "backbone.blocks.1.mixers.0.in_proj.weight"
    tensors = dict(tiny_model().state_dict())
    tensors[name] = 8e4 * tensors[name]
    errors, divergence = place(make("fp16", tensors))
    assert divergence is not None
    assert divergence.node == "backbone.blocks.1.mixers.0.in_proj.MatMul"
    assert divergence.dtype == "float16"
    assert divergence.said.startswith("not finite from finite inputs: largest true value ")
    assert divergence.said.endswith("float16 ends at 65504")
    last = errors.parts.index("backbone.blocks.2")
    assert np.isfinite(errors.own[last])  # the truth went on behind it


def test_a_wrong_epsilon_names_its_sum(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    node = node_named(file, "backbone.blocks.2.norm.Add")
    node.input[1] = "wrong"
    file.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "wrong"))
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert divergence.node == node.name
    assert "reads wrong where the exporter writes constant.float32.1e-05" in divergence.said


def test_a_value_changed_in_the_file_is_told(make: Make) -> None:
    """All norms share it: the first is named."""
    drawn = make()
    file = drawn.file(GRAPH)
    epsilon = next(t for t in file.graph.initializer if t.name == "constant.float32.1e-05")
    epsilon.raw_data = np.float32(1e-2).tobytes()
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert divergence.node == "backbone.blocks.0.norm.Add"
    assert "with the value 0.01 where the exporter writes 1e-05" in divergence.said


def test_a_weight_turned_wrongly_is_told_with_its_product(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    name = "backbone.time_out"  # as wide as it is high
    del node_named(file, f"{name}.Transpose").attribute[:]
    node_named(file, f"{name}.Transpose").attribute.append(helper.make_attribute("perm", [0, 1]))
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert divergence.node == f"{name}.MatMul"
    assert f"{name}.Transpose has perm [0, 1] where the exporter writes [1, 0]" in divergence.said


def test_nodes_that_the_exporter_does_not_write_are_taken_at_their_word(make: Make) -> None:
    """A sound detour names none; one through float16 names who reads it."""
    drawn = make()
    target = "backbone.blocks.1.modulate.Add"
    for kind in (TensorProto.DOUBLE, TensorProto.FLOAT16):
        file = drawn.file(GRAPH)
        at = next(n for n, node in enumerate(file.graph.node) if node.name == target)
        source = file.graph.node[at].input[0]
        file.graph.node[at].input[0] = "back"
        file.graph.node.insert(at, helper.make_node("Cast", ["away"], ["back"], name="back", to=TensorProto.FLOAT))
        file.graph.node.insert(at, helper.make_node("Cast", [source], ["away"], name="away", to=kind))
        _, divergence = place(drawn, file)
        if kind == TensorProto.DOUBLE:
            assert divergence is None
        else:
            assert divergence is not None
            assert divergence.node == target
            assert f"reads back where the exporter writes {source}" in divergence.said


def test_a_node_left_out_names_who_reads_past_it(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    gone = node_named(file, "backbone.blocks.1.modulate.Add")
    reader = next(node for node in file.graph.node if gone.output[0] in node.input)
    reader.input[0] = gone.input[0]
    file.graph.node.remove(gone)
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert divergence.node == reader.name == "backbone.blocks.1.mixers.0.in_proj.MatMul"
    assert f"reads {gone.input[0]} where the exporter writes {gone.name}" in divergence.said


def test_a_node_of_another_shape_is_told(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    node = node_named(file, "backbone.blocks.1.mixers.0.Reshape")
    shape = next(t for t in file.graph.initializer if t.name == node.input[1])
    heads = numpy_helper.to_array(shape).copy()
    heads[-1] //= 2
    file.graph.initializer.append(numpy_helper.from_array(heads, "other heads"))
    node.input[1] = "other heads"
    _, divergence = place(drawn, file)
    assert divergence is not None
    assert divergence.node == node.name
    assert "has the shape [2, 34, 8, 8] where the model has [2, 34, 4, 16]" in divergence.said


def test_another_exporters_graph_is_refused(make: Make) -> None:
    drawn = make()
    file = drawn.file(GRAPH)
    for number, node in enumerate(file.graph.node):
        node.name = f"node_{number}"
    with pytest.raises(InputError, match="shares 0 of"):
        place(drawn, file)
