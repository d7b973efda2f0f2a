"""Whole runs against engines that err on purpose: once, everywhere, in the table, in the selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime import solver_rules
from mdm.runtime.model import Model
from mdm.tools.check.finding import Array, Finding, Verdict
from mdm.tools.check.levels import trajectories
from mdm.tools.check.levels.texts import unrest_of
from mdm.tools.check.levels.trajectories import check_run
from mdm.tools.check.limits import Multiples
from mdm.tools.check.report import Drift
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.standard import Decoded, Deployed, Run, State, Walk
from mdm.tools.check.standards.walk import OnBackend

from ..deployed import Exported

Find = Callable[[str], Exported]
Spoil = Callable[[int, State], State]


@dataclass
class Erring(OnBackend):
    """The engine, with what `spoil(evaluation, state after it)` makes of it."""

    engine: OnBackend
    spoil: Spoil

    def advance(self, run: Run, evaluation: int, state: State) -> State:
        return self.spoil(evaluation, self.engine.advance(run, evaluation, state))


@dataclass
class Checked:
    findings: dict[str, Finding]
    drift: Drift | None


def checked(exported: Exported, run: Run, spoil: Spoil = lambda k, state: state) -> Checked:
    model = exported.model
    spread = Spread(model, run.graph, run.states[0]["base"].shape[1])
    engine = Erring(OnBackend(model.backend), spoil)
    items = list(check_run(run, engine, spread, model.manifest["precision"], Multiples()))
    drifts = [one for one in items if isinstance(one, Drift)]
    return Checked({one.part: one for one in items if isinstance(one, Finding)}, drifts[0] if drifts else None)


def run_of(exported: Exported, task: str = "joint") -> Run:
    return next(iter(exported.reference.runs(task)))


def moved(state: State, amount: float) -> State:
    """Off by that much of its size, everywhere; the same way each time, so that it adds up."""
    size = float(np.sqrt(np.square(state["point"]).mean()))
    return state | {kind: state[kind] + np.float32(amount * size) for kind in ("base", "point")}


@pytest.mark.parametrize("name", ["mdm", "keep", "dim", "half"])
def test_sound_ones_pass_with_room(exported: Find, name: str, figure: Callable[[str, float, float], None]) -> None:
    for task in exported(name).model.manifest["tasks"]:
        found = checked(exported(name), run_of(exported(name), task))
        assert found.findings.keys() >= {"table", "free-running", "teacher-forced"}
        assert {one.verdict for one in found.findings.values()} == {Verdict.PASS}
        assert found.drift is not None
        assert found.drift.limit is not None
        assert len(found.drift.free) == len(found.drift.forced) == len(found.drift.limit)
        used = max(one.used or 0 for one in found.findings.values())
        figure(f"{name} {task}, share of a trajectory's limit", used, 0.8)


def test_one_bad_evaluation_is_told_from_slow_growth(exported: Find) -> None:
    run = run_of(exported("mdm"))
    once = checked(exported("mdm"), run, lambda k, state: moved(state, 1e-3) if k == 2 else state)
    slow = checked(exported("mdm"), run, lambda k, state: moved(state, 1e-3))
    assert once.drift is not None
    assert slow.drift is not None
    forced = np.array(once.drift.forced)
    assert forced.argmax() == 2
    assert forced[2] > 1e2 * np.delete(forced, 2).max()  # one peak, and the evaluations about it are sound
    assert once.findings["teacher-forced"].said.startswith("after evaluation 3 of 4: off by 0.001 in the mean")
    assert max(once.drift.free[:2]) < 1e-5 < min(once.drift.free[2:])  # what follows carries it on
    assert min(slow.drift.forced) > 5e-4
    assert max(slow.drift.forced) < 2e-3
    assert slow.drift.free[-1] > 2 * slow.drift.forced[-1]
    for found in (once, slow):
        assert found.findings["free-running"].verdict is Verdict.FAIL
        assert found.findings["table"].verdict is Verdict.PASS  # no engine has a part in it


def test_growth_within_each_steps_limit_fails_in_the_whole(exported: Find) -> None:
    """By the table, where every step may err by 1e-4 and a run by 1e-3."""
    run = replace(next(iter(exported("mdm").golden.runs("text_to_image"))), deployed=None)
    found = checked(exported("mdm"), run, lambda k, state: moved(state, 8e-5))
    assert found.findings["teacher-forced"].verdict is Verdict.PASS
    assert found.drift is not None
    assert found.drift.free_floor is None


def test_a_wrong_rule_fails(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a solver is off by 1e-4: neither the engine nor the free run can know."""
    right = solver_rules.Walk.step
    monkeypatch.setattr(solver_rules.Walk, "step", lambda self, z: right(self, z * (1 + 1e-4)))
    found = checked(exported("mdm"), run_of(exported("mdm"), "text_to_image"))
    table = found.findings["table"]
    assert table.verdict is Verdict.FAIL
    assert table.used is not None
    assert table.used > 1e4
    assert "allowed are 1e-09 and 1e-09" in table.said
    assert found.findings["free-running"].verdict is Verdict.PASS  # the engine does what the table says


def test_a_wrong_last_row_fails(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to the result, at which the network is not asked again."""
    right = Model.rows

    def rows(self: Model, task: str, sampler: dict[str, Any]) -> Array:
        table = right(self, task, sampler).copy()
        table[-1, :, solver_rules.NEXT_BASE] *= 1 + 1e-4
        return table

    monkeypatch.setattr(Model, "rows", rows)
    table = checked(exported("mdm"), run_of(exported("mdm"), "text_to_image")).findings["table"]
    assert table.verdict is Verdict.FAIL
    assert table.said.startswith("after evaluation 3 of 3: off by ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails(exported: Find, value: float) -> None:
    def spoil(k: int, state: State) -> State:
        point = state["point"].copy()
        point.flat[3] = value if k == 1 else point.flat[3]
        return state | {"point": point}

    found = checked(exported("mdm"), run_of(exported("mdm")), spoil)
    assert found.findings["teacher-forced"].verdict is Verdict.FAIL
    assert found.findings["teacher-forced"].said == "after evaluation 2 of 4: not finite"


def test_an_engine_that_fails_is_a_finding(exported: Find) -> None:
    def spoil(k: int, state: State) -> State:
        raise EngineError("graph 'step_joint' failed\nin ONNX Runtime: no memory")

    found = checked(exported("mdm"), run_of(exported("mdm")), spoil)
    assert found.findings[""].verdict is Verdict.FAIL
    assert found.findings[""].said == "graph 'step_joint' failed; in ONNX Runtime: no memory"
    assert found.drift is None


@dataclass
class Instead:
    """The model's own arithmetic, spoiled: after each evaluation, and of the walk from true states."""

    deployed: Deployed
    after: Spoil = lambda k, state: state
    forced: Spoil = lambda k, state: state

    def advance(self, run: Run, evaluation: int, state: State) -> State:
        return self.after(evaluation, self.deployed.advance(run, evaluation, state))

    def walk(self, run: Run) -> Walk:
        walked = self.deployed.walk(run)
        return Walk(walked.free, [self.forced(k, state) for k, state in enumerate(walked.forced)])

    def end(self, run: Run) -> Array:
        return self.deployed.end(run)

    def decode(self, run: Run, z: Array) -> Decoded:
        return self.deployed.decode(run, z)


def deployed_of(run: Run) -> Deployed:
    assert run.deployed is not None
    return run.deployed


def test_a_model_that_overflows_in_the_deployed_types_is_held_to_the_table(exported: Find) -> None:
    """No floor can be had of it. The engine may do better."""

    def overflow(k: int, state: State) -> State:
        return state | {kind: np.full_like(state[kind], np.inf) for kind in ("base", "point")} if k >= 2 else state

    run = run_of(exported("mdm"))
    found = checked(exported("mdm"), replace(run, deployed=Instead(deployed_of(run), forced=overflow)))
    assert found.drift is not None
    assert found.drift.limit is not None
    assert found.drift.limit[2:] == [1e-4] * 2
    assert max(found.drift.limit[:2]) < 1e-4
    assert found.findings["teacher-forced"].verdict is Verdict.PASS


def test_a_run_that_ends_elsewhere_by_right_evaluations_is_ambiguous(exported: Find) -> None:
    """Where the model's own arithmetic leads as far astray from the same states as the engine's, none is at fault."""

    def astray(k: int, state: State) -> State:
        return moved(state, 1e-2) if k == 2 else state

    run = run_of(exported("mdm"))
    found = checked(exported("mdm"), replace(run, deployed=Instead(deployed_of(run), after=astray)), astray)
    finding = found.findings["free-running"]
    assert finding.verdict is Verdict.AMBIGUOUS
    assert finding.said.endswith("off, though every evaluation is right from where it stood: a near decision")
    assert dict(finding.figures)["error at the end"] > 1e-3
    alone = checked(exported("mdm"), run, astray).findings["free-running"]
    assert alone.verdict is Verdict.FAIL
    assert alone.said.startswith("after evaluation 3 of 4: off by 0.01 in the mean")


# ----------------------------------------------------------------------------------------------------- selection


def selection(exported: Find, spoil: Spoil) -> Finding:
    return checked(exported("keep"), run_of(exported("keep")), spoil).findings["selection"]


def swapped(exported: Find, run: Run, evaluation: int, near: bool) -> Array:
    """The true mask after an evaluation, with two tokens swapped: about the threshold, or as far apart as can be."""
    spread = Spread(exported("keep").model, run.graph, run.states[0]["base"].shape[1])
    before, after = run.states[evaluation]["x0_before"], run.states[evaluation + 1]
    unrest = unrest_of(spread.columns(run.rows[evaluation]), after["x0_before"], before, run.inputs["given"])[0]
    mask = after["mask"].astype(np.float32).copy()
    inside, outside = np.flatnonzero(mask[0] == 1), np.flatnonzero(mask[0] == 0)
    kept = inside[unrest[inside].argmax() if near else unrest[inside].argmin()]
    left = outside[unrest[outside].argmin() if near else unrest[outside].argmax()]
    mask[0, kept], mask[0, left] = 0, 1
    return mask


@pytest.mark.parametrize(("near", "verdict"), [(True, Verdict.AMBIGUOUS), (False, Verdict.FAIL)])
def test_flipped_tokens(exported: Find, near: bool, verdict: Verdict) -> None:
    """A wide tie stands for coarse arithmetic: two tokens about the threshold are excused, others are not."""
    run = replace(next(iter(exported("keep").golden.runs("joint"))))
    mask = swapped(exported, run, 1, near)
    model = exported("keep").model
    spread = Spread(model, run.graph, 24)
    engine = Erring(OnBackend(model.backend), lambda k, state: state | {"mask": mask} if k == 1 else state)
    wide = {**trajectories.TIES, "fp32": 0.5 if near else 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "TIES", wide)
        items = list(check_run(run, engine, spread, "fp32", Multiples()))
    (finding,) = [one for one in items if isinstance(one, Finding) and one.part == "selection"]
    assert finding.verdict is verdict
    assert dict(finding.figures)["flips"] == 2
    assert finding.said.startswith("evaluation 2: 2 of 24 tokens are flipped")


def test_a_selection_that_is_not_used_is_not_judged(exported: Find) -> None:
    """What the last evaluation selects is for none; what the first selects is all."""
    last = len(run_of(exported("keep"))) - 1
    assert selection(exported, lambda k, s: s | {"mask": 1 - s["mask"]} if k == last else s).verdict is Verdict.PASS
    assert selection(exported, lambda k, s: s | {"mask": s["mask"] * 0} if k == 1 else s).verdict is Verdict.FAIL
    assert selection(exported, lambda k, s: s | {"mask": s["mask"] / 2} if k == 1 else s).said == (
        "evaluation 2: the mask has other values than 0 and 1"
    )
