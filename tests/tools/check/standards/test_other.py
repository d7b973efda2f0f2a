"""Another engine or bundle as the standard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import open_bundle
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend
from mdm.tools.check.finding import Finding, Verdict
from mdm.tools.check.levels.steps import check_graph
from mdm.tools.check.levels.trajectories import check_run
from mdm.tools.check.limits import Multiples
from mdm.tools.check.standards.other import EngineStandard
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.walk import OnBackend

from ..deployed import Exported, spoil_manifest

Find = Callable[[str], Exported]


@pytest.mark.parametrize(("checked", "against"), [("mdm", "half"), ("half", "mdm")])
def test_two_precisions_of_one_model(exported: Find, checked: str, against: str) -> None:
    """Either way round, with the golden files of the one that has any, and the limits of the coarser."""
    model = exported(checked).model
    standard = EngineStandard(model, exported(against).model, against)
    assert standard.precision == "fp16"
    found = [one for graph in model.manifest["graphs"] for one in check_graph(standard, model, graph, Multiples())]
    assert {one.verdict for one in found} <= {Verdict.PASS, Verdict.AMBIGUOUS}
    assert max(one.used or 0 for one in found) > 1e-3  # they are not the same
    (run,) = standard.runs("caption")
    assert run.points is None  # of a table nobody's solver has a say
    assert run.decoded.ids is not None
    assert run.decoded.picture is None
    spread = Spread(model, run.graph, run.states[0]["base"].shape[1])
    items = list(check_run(run, OnBackend(model.backend), spread, standard.precision, Multiples()))
    parts = {one.part: one.verdict for one in items if isinstance(one, Finding)}
    assert parts == {"free-running": Verdict.PASS, "teacher-forced": Verdict.PASS}


def test_the_same_engine_agrees_to_the_bit(exported: Find) -> None:
    model = exported("keep").model
    standard = EngineStandard(model, exported("keep").opened(), "ort-cpu")
    for graph in ("step_joint_guided", "decode_text"):
        for finding in check_graph(standard, model, graph, Multiples()):
            assert finding.error is None or finding.error.worst == 0
    (run,) = standard.runs("joint")
    ours = OnBackend(model.backend)
    state = run.states[0]
    for k in range(len(run)):
        state = ours.advance(run, k, state)
        assert all(np.array_equal(state[name], array) for name, array in run.states[k + 1].items())


def test_another_models_bundle_is_refused(exported: Find) -> None:
    with pytest.raises(InputError, match="differ in 'config'") as refused:
        EngineStandard(exported("mdm").model, exported("keep").model, "keep")
    assert len(str(refused.value).splitlines()) == 2


def test_two_without_golden_files_are_refused(exported: Find) -> None:
    with pytest.raises(InputError, match="has no golden files"):
        EngineStandard(exported("half").model, exported("half").opened(), "half")


def test_graphs_that_only_one_has_are_left_out(exported: Find, tmp_path: Path) -> None:
    model = exported("dim").model
    name = next(name for name in model.manifest["graphs"] if "upsample" in name)

    def without(manifest: dict[str, Any]) -> None:
        del manifest["graphs"][name]
        manifest["golden"].pop(name, None)

    bundle = open_bundle(spoil_manifest(exported("dim").bundle, tmp_path / "b", without))
    standard = EngineStandard(model, Model(bundle, OrtBackend(bundle, threads=1)), "less")
    assert list(standard.cases(name)) == []
    assert len(list(standard.cases("denoise_image"))) == 1
    (skipped,) = check_graph(standard, model, name, Multiples())
    assert (skipped.verdict, skipped.said) == (Verdict.SKIPPED, "less has nothing for this graph")
