"""Level "blocks": drawing against model, and the bundle's graph on its backend against the drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from mdm.export.truth import Truth
from mdm.plugins.errors import EngineError
from mdm.runtime.ort import OrtBackend
from mdm.tools.check.finding import Finding, Verdict
from mdm.tools.check.levels.blocks import Placer
from mdm.tools.check.limits import Multiples
from mdm.tools.check.report import BlockErrors, Divergence
from mdm.tools.check.standards.live import ReferenceStandard

from ..deployed import Exported

Find = Callable[[str], Exported]


def of_kind(items: list[Any], kind: type) -> list[Any]:
    return [one for one in items if isinstance(one, kind)]


@pytest.mark.parametrize(
    ("name", "graph"),
    [("keep", "step_joint_guided"), ("mdm", "encode_text"), ("mdm", "decode_text"), ("half", "denoise_text")],
)
def test_sound_graphs(exported: Find, name: str, graph: str) -> None:
    items = list(Placer(exported(name).reference, Multiples(), None)(graph))
    found = of_kind(items, Finding)
    assert {one.verdict for one in found} == {Verdict.PASS}
    assert {one.case for one in found} == {"seed 0, batch 1, text 8"}
    assert [one.part for one in found][-1] == "nodes"
    assert all(one.part.startswith("blueprint, ") for one in found[:-1])
    (errors,) = of_kind(items, BlockErrors)
    assert len(errors.parts) == len(errors.own) == len(errors.own_floor) == len(errors.grown) == len(errors.grown_floor)
    assert not of_kind(items, Divergence)


def test_a_graph_that_the_exporter_does_not_draw_is_skipped(exported: Find) -> None:
    (finding,) = Placer(exported("mdm").reference, Multiples(), None)("step_of_tomorrow")
    assert isinstance(finding, Finding)
    assert finding.verdict is Verdict.SKIPPED


def test_an_exporter_that_draws_otherwise_is_found(exported: Find) -> None:
    """One number of the drawing is changed: the file is as drawn, and both are wrong."""
    standard = exported("mdm").reference
    right = standard.blueprint
    drawn = right.built["denoise_text"]
    model = onnx.ModelProto()
    model.CopyFrom(drawn.model)
    spoiled = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.raw_data)
    spoiled.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(spoiled) * 1.01, spoiled.name))
    wrong = replace(right, built={**right.built, "denoise_text": replace(drawn, model=model)})
    items = list(Placer(ReferenceStandard(exported("mdm").model, wrong, (0,)), Multiples(), None)("denoise_text"))
    first = items[0]
    assert isinstance(first, Finding)
    assert (first.part, first.verdict) == ("blueprint, eps", Verdict.FAIL)
    assert first.said.startswith("the exporter draws 'eps' otherwise than the model: off by ")


def test_other_weights_on_the_backend_are_placed(exported: Find, tmp_path: Path) -> None:
    """The drawing is of weights that the file has not: the first block that reads them is named."""
    standard = exported("mdm").reference
    graph, stored = "denoise_text", standard.blueprint.built["denoise_text"].stored
    name = next(name for name in stored if "blocks.1" in name and "in_proj" in name)
    held = {stored[name]: standard.blueprint.value(graph, name) * 1.01}
    wrong = replace(standard.blueprint, held={**standard.blueprint.held, **held})
    assert isinstance(wrong.truth, Truth)
    items = list(Placer(ReferenceStandard(exported("mdm").model, wrong, (0,)), Multiples(), tmp_path)(graph))
    (divergence,) = of_kind(items, Divergence)
    assert "blocks.1" in divergence.node
    nodes = next(one for one in of_kind(items, Finding) if one.part == "nodes")
    assert nodes.verdict is Verdict.FAIL
    assert nodes.said.startswith(f"{divergence.node} ({divergence.op}) ")
    assert nodes.reproduce == divergence.reproduce != ""
    assert (tmp_path / graph / "model.onnx").is_file()


def test_a_graph_that_cannot_be_loaded_is_a_finding(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise EngineError("no memory\nat all")

    monkeypatch.setattr(OrtBackend, "session", fail)
    items = list(Placer(exported("mdm").reference, Multiples(), None)("decode_text"))
    said = " ".join(one.said for one in of_kind(items, Finding) if one.verdict is Verdict.FAIL)
    assert "no memory at all" in said
