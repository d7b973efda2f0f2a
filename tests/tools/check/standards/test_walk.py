"""Evaluations one by one are what serves requests: a chain of them is the run of the scheduler, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime.ort import OrtGraph
from mdm.tools.check.standards.standard import Run, State
from mdm.tools.check.standards.walk import OnBackend, walk

from ..deployed import Exported

Find = Callable[[str], Exported]


@pytest.mark.parametrize(
    ("name", "task"),
    [("mdm", "joint"), ("mdm", "complete"), ("mdm", "caption"), ("mdm", "turn"), ("dim", "class_to_image")],
)
def test_the_whole_run_is_the_chain_of_evaluations(exported: Find, name: str, task: str) -> None:
    (run,) = exported(name).golden.runs(task)
    engine = OnBackend(exported(name).model.backend)
    walked = walk(run, engine.advance)
    assert len(walked.free) == len(walked.forced) == len(run)
    assert np.array_equal(walked.free[-1]["base"], engine.end(run))
    assert np.array_equal(walked.free[0]["point"], walked.forced[0]["point"])  # both from the start
    assert not np.array_equal(walked.free[-1]["base"], walked.forced[-1]["base"])


def test_samples_do_not_see_each_other(exported: Find) -> None:
    (run,) = exported("keep").golden.runs("joint")
    engine = OnBackend(exported("keep").model.backend)
    both, alone = engine.end(run), engine.end(only(run, 1))
    assert np.abs(both[1] - alone[0]).max() <= 1e-5 * np.abs(alone).max()


def only(run: Run, sample: int) -> Run:
    cut = slice(sample, sample + 1)
    return replace(
        run, inputs={name: array[cut] for name, array in run.inputs.items()}, noise=None,
        states=[{name: array[cut] for name, array in state.items()} for state in run.states],
    )  # fmt: skip


def test_free_is_given_the_true_selection_and_forced_the_true_state(exported: Find) -> None:
    (run,) = exported("keep").golden.runs("joint")
    seen: list[State] = []

    def advance(run: Run, evaluation: int, state: State) -> State:
        seen.append(state)
        return {**state, "base": state["base"] + 1, "mask": state["mask"] * 0}

    walked = walk(run, advance)
    free, forced = seen[: len(run)], seen[len(run) :]
    assert all(np.array_equal(state["mask"], run.states[k]["mask"]) for k, state in enumerate(free))
    assert all(state is run.states[k] for k, state in enumerate(forced))
    assert np.array_equal(walked.free[-1]["base"], run.states[0]["base"] + len(run))
    assert walked.free[-1]["mask"].max() == 0  # what was found stays to be judged


def test_a_failure_is_raised_and_the_lane_stays_of_use(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = exported("dim").golden.runs("class_to_image")
    engine = OnBackend(exported("dim").model.backend)
    true = engine.advance(run, 0, run.states[0])

    def fail() -> None:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(OrtGraph, "bind", lambda *_: fail)
        broken = OnBackend(exported("dim").model.backend)
        with pytest.raises(EngineError, match="out of memory"):
            broken.advance(run, 0, run.states[0])
        with pytest.raises(EngineError, match="out of memory"):
            broken.end(run)
    again = engine.advance(run, 0, run.states[0])
    assert {name: array.tobytes() for name, array in again.items()} == {k: a.tobytes() for k, a in true.items()}
    assert not any(lane.jobs for lane in [*engine.lanes.made.values(), *broken.lanes.made.values()])
