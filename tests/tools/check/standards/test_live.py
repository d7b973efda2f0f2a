"""The PyTorch model as the standard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mdm.export.truth import Point
from mdm.plugins.errors import EnvironmentLackError
from mdm.tools.check.finding import difference
from mdm.tools.check.standards import live
from mdm.tools.check.standards.live import BATCH, ReferenceStandard, words_of
from mdm.tools.check.standards.walk import walk

from ..deployed import Exported

Find = Callable[[str], Exported]


def test_seeds_take_turns_at_the_sizes(exported: Find) -> None:
    standard = exported("mdm").against_model((0, 1, 2, 3))
    cases = list(standard.cases("step_joint"))
    assert [case.label for case in cases] == [
        "seed 0, batch 1, text 8", "seed 1, batch 2, text 5", "seed 2, batch 1, text 20", "seed 3, batch 1, text 8",
    ]  # fmt: skip
    assert not np.array_equal(cases[0].inputs["point"], cases[3].inputs["point"])
    assert list(standard.cases("no such graph")) == []
    assert [case.label for case in exported("latent").reference.cases("decode_image")] == [
        "seed 0, batch 1, latents 16x16"
    ]
    assert words_of(Point(3)) == "batch 3"


@pytest.mark.parametrize(("name", "least", "most"), [("mdm", 1e-8, 3e-6), ("half", 1e-5, 1e-2)])
def test_the_truth_is_float64_and_the_floor_is_that_of_the_types(
    exported: Find, name: str, least: float, most: float
) -> None:
    (case,) = exported(name).reference.cases("denoise_joint")
    assert case.expected["eps"].dtype == np.float64
    assert case.deployed is not None
    assert case.deployed["eps"].dtype == np.float32
    assert least < difference(case.deployed["eps"], case.expected["eps"]).rms < most


def test_runs(exported: Find) -> None:
    standard = ReferenceStandard(exported("mdm").model, exported("mdm").reference.blueprint, (5, 6), steps=2)
    runs = list(standard.runs("joint"))
    assert [(run.label, len(run), run.batch) for run in runs] == [("seed 5", 2, BATCH), ("seed 6", 2, BATCH)]
    assert not np.array_equal(runs[0].states[0]["base"], runs[1].states[0]["base"])
    assert runs[0].noise is not None
    assert runs[0].recorded == "float64"
    again = next(iter(standard.runs("joint")))
    assert all(np.array_equal(a["base"], b["base"]) for a, b in zip(again.states, runs[0].states, strict=True))


def test_a_run_has_no_more_steps_than_the_tasks_own(exported: Find) -> None:
    standard = ReferenceStandard(exported("mdm").model, exported("mdm").reference.blueprint, (0,), steps=10**9)
    assert len(next(iter(standard.runs("turn")))) == 3


def test_the_floor_of_a_run(exported: Find) -> None:
    """A walk of the drawing in float64 ends where the model's solver did; in float32 it is walked once."""
    standard = exported("keep").reference
    (run,) = standard.runs("joint")
    deployed = standard.deployed
    first = deployed.walk(run)
    assert deployed.walk(run) is first
    exact = live.DeployedReference(exported("keep").model, standard.blueprint)
    exact.made[run.graph] = standard.blueprint.evaluation(run.graph, exact=True)
    for walked, limit in ((walk(run, exact.advance), 1e-5), (first, 1e-4)):
        for states in (walked.free, walked.forced):
            errors = [difference(s["base"], t["base"]).rms for s, t in zip(states, run.states[1:], strict=True)]
            assert max(errors) < limit
        for state, true in zip(walked.forced[:-1], run.states[1:], strict=False):
            assert np.array_equal(state["mask"], true["mask"])
    assert np.array_equal(deployed.end(run), first.free[-1]["base"])  # no token was near a tie here


def test_memory_is_asked_for_first(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint = exported("dim").reference.blueprint
    monkeypatch.setattr(live, "free_memory", lambda: 12 * blueprint.plan.parameters - 1)
    with pytest.raises(EnvironmentLackError, match="--against golden") as refused:
        ReferenceStandard(exported("dim").model, blueprint, (0,))
    assert len(str(refused.value).splitlines()) == 2
    monkeypatch.setattr(live, "free_memory", lambda: 12 * blueprint.plan.parameters)
    ReferenceStandard(exported("dim").model, blueprint, (0,))
