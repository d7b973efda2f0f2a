"""Backends that compute something wrongly, or not at all, and one in bfloat16."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from mdm.plugins.errors import EngineError
from mdm.tools.check.finding import Array
from mdm.tools.check.nodes.evaluator import Evaluation
from mdm.tools.check.nodes.submodel import Run
from mdm.tools.check.nodes.wiring import FLOATS, Wiring

from ..drawn import GRAPH, Make, maker, place


@pytest.fixture(scope="module")
def make(tmp_path_factory: Any, tiny: Any, tiny_model: Any) -> Make:
    return maker(tmp_path_factory, tiny, tiny_model)


def bent(model: ModelProto, chosen: Callable[[NodeProto], bool]) -> ModelProto:
    """The first output of the chosen nodes is a hundredth off."""
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    for number, node in enumerate(model.graph.node):
        out.graph.node.append(node)
        if chosen(node):
            y, raw, factor = node.output[0], f"raw{number}", f"factor{number}"
            out.graph.node[-1].output[0] = raw
            like = helper.make_node("CastLike", ["bend", raw], [factor])
            out.graph.node.extend([like, helper.make_node("Add", [raw, factor], [y])])
    out.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "bend"))
    return out


def float_nodes(model: ModelProto) -> list[str]:
    """Nodes that compute in float from what the inputs are."""
    skip, types = ("Shape", "Less", "Range", "Transpose", "Unsqueeze"), Wiring(model).types
    return [
        n.name for n in model.graph.node
        if n.op_type not in skip and not n.name.startswith(("orders", "text_t")) and types[n.output[0]] in FLOATS
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(16))
def test_whichever_node_a_backend_computes_wrongly_is_named(make: Make, number: int) -> None:
    drawn = make("fp16" if number % 2 else "fp32")
    names = [name for name in float_nodes(drawn.file(GRAPH)) if name.startswith(("backbone", "to_eps", "latent"))]
    if number % 2:  # a hundredth in a scan's B or C, times its small steps, is less than float16 loses in the block
        names = [name for name in names if not name.endswith(("mixers.0.Reshape_2", "mixers.0.Reshape_3"))]
    wrong = random.Random(number).choice(names)

    def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        return drawn.run(bent(model, lambda node: node.name == wrong), feeds, wanted)

    _, divergence = place(drawn, run=run)
    assert divergence is not None
    assert divergence.node == wrong


def test_an_operator_that_is_always_wrong_names_its_first_node(make: Make) -> None:
    drawn = make()

    def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        return drawn.run(bent(model, lambda node: node.op_type == "Conv"), feeds, wanted)

    _, divergence = place(drawn, run=run)
    assert divergence is not None
    assert divergence.node == "backbone.conv_in.Conv"


def test_what_goes_wrong_only_together_names_the_part(make: Make) -> None:
    """As a fusion does that is wrong."""
    drawn = make()

    def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        fused = {"MambaShortConv", "MambaSsdScan"} <= {node.op_type for node in model.graph.node}
        wrong = "backbone.blocks.1.mixers.0.conv1d.conv"
        return drawn.run(bent(model, lambda node: fused and node.name == wrong), feeds, wanted)

    _, divergence = place(drawn, run=run)
    assert divergence is not None
    assert divergence.node == "backbone.blocks.1"
    assert "arises from its nodes run together" in divergence.said


def test_what_goes_wrong_only_as_a_whole_names_the_place(make: Make) -> None:
    drawn = make()
    count = len(drawn.file(GRAPH).graph.node)

    def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        whole, wrong = len(model.graph.node) >= count, "backbone.blocks.1.mixers.0.conv1d.conv"
        return drawn.run(bent(model, lambda node: whole and node.name == wrong), feeds, wanted)

    errors, divergence = place(drawn, run=run)
    assert divergence is not None
    assert divergence.node == "backbone.blocks.1"
    between = "between backbone.blocks.0.residual.Add and backbone.blocks.1.residual.Add"
    assert between in divergence.said
    assert max(errors.own) < 1e-5 < max(errors.grown)


@pytest.mark.parametrize("wrong", ["backbone.blocks.1.norm.Sqrt", "whole"])
def test_what_a_backend_cannot_run_is_told_in_its_words(make: Make, wrong: str) -> None:
    drawn = make()
    count = len(drawn.file(GRAPH).graph.node)

    def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        if len(model.graph.node) >= count or any(node.name == wrong for node in model.graph.node):
            raise EngineError("no kernel for this")
        return drawn.run(model, feeds, wanted)

    errors, divergence = place(drawn, run=run)
    assert divergence is not None
    assert "no kernel for this" in divergence.said
    assert divergence.node == ("" if wrong == "whole" else wrong)
    assert np.isnan(errors.grown).any()


def test_bfloat16_goes_in_and_out_as_float32(make: Make) -> None:
    """No CPU engine has it: torch stands in for one."""
    drawn = make("bf16")
    model = drawn.file(GRAPH)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}

    def stored(name: str) -> Tensor:
        at = {entry.key: entry.value for entry in kept[name].external_data}
        with open(drawn.folder / at["location"], "rb") as file:
            file.seek(int(at["offset"]))
            content = bytearray(file.read(int(at["length"])))
        kind = torch.bfloat16 if kept[name].data_type == TensorProto.BFLOAT16 else torch.float32
        return torch.frombuffer(content, dtype=kind).reshape(tuple(kept[name].dims))

    def run_with(wrong: str) -> Run:
        def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
            assert all(array.dtype in (np.float32, np.int64, np.bool_) for array in feeds.values())
            found = Evaluation(model, stored, exact=False).run(feeds, wanted)
            here = any(node.name == wrong for node in model.graph.node)
            return [y.numpy() * (1.05 if here and y.is_floating_point() else 1) for y in found.values()]

        return run

    assert place(drawn, run=run_with(""))[1] is None
    wrong = "backbone.blocks.1.mixers.0.in_proj.MatMul"
    _, divergence = place(drawn, run=run_with(wrong))
    assert divergence is not None
    assert (divergence.node, divergence.dtype) == (wrong, "bfloat16")
