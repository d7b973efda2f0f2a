"""A lane on the engine of `fake_engine.py`: every row of every job, in whatever company, equals the lone run bit for
bit; failures stay with whom they belong to; and memory is moved only where somebody comes or goes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime.lane import Job, Lane
from mdm.runtime.solver import SOLVERS, STOCHASTIC

from .fake_engine import KINDS, NUMBER, OVERFLOWS, OWNER, PICTURE, FakeEngine, alone, make_job

ENGINES: list[dict[str, Any]] = [{}, {"batches": (1, 2, 4, 8)}, {"apart": True}, {"batches": (1, 3, 8), "apart": True}]
each_engine = pytest.mark.parametrize("options", ENGINES, ids=["any", "sizes", "apart", "sizes-apart"])
each_kind = pytest.mark.parametrize("graph", KINDS)


def lane_for(engine: FakeEngine, job: Job, slots: int = 8) -> Lane:
    return Lane(engine, job.graphs[0], job.tokens, slots)


def finish(lane: Lane) -> None:
    """Step until all are done; who is, leaves."""
    while lane.jobs:
        assert not lane.step()
        for job in [job for job in lane.jobs if job.finished]:
            lane.leave(job)


def moves(lane: Lane) -> tuple[int, int]:
    """How often a lane's buffers were pushed and pulled."""
    pairs = [buffer for pair in lane.pairs.values() for buffer in pair]
    found: list[Any] = [*lane.inputs.values(), *pairs, *lane.outputs.values()]
    return sum(buffer.moves["push"] for buffer in found), sum(buffer.moves["pull"] for buffer in found)


def row_of(buffer: Any, slot: int) -> int:
    return int(buffer.host[slot, 0, OWNER])


# -------------------------------------------------------------------------------------------- what a lane computes


@each_kind
@each_engine
def test_a_job_alone_is_the_solvers_table(graph: str, options: dict[str, Any]) -> None:
    """Every solver, each row's x0 too, with given tokens and guidance; `run_table` knows of neither lane nor buffer."""
    for number, solver in enumerate(SOLVERS):
        job = make_job(graph, solver=solver, steps=1 + number % 6, given=number % PICTURE, seed=number, y=number)
        expected, x0 = alone(job)
        lane = lane_for(FakeEngine(**options), job, slots=1 + number % 2)
        lane.join(job)
        while not job.finished:
            assert lane.step([job]) == {}
            assert job.x0 is not None
            np.testing.assert_array_equal(job.x0, x0[job.done - 1])
        lane.leave(job)
        assert job.done == len(x0) > 0
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(job.state["base"], expected)


@each_kind
@pytest.mark.parametrize("options", [*ENGINES, *({"chain": 5, "apart": apart} for apart in (False, True))], ids=str)
def test_company_changes_nothing(graph: str, options: dict[str, Any]) -> None:
    """Jobs with every solver come, go, are taken out and come back. Where the engine takes many steps in one go, there
    are as many as it, the caller and the shortest job allow."""
    rng = random.Random(graph)
    solvers = [*SOLVERS, *STOCHASTIC * 3]
    jobs = [
        make_job(graph, number, solver=solvers[number % len(solvers)], steps=rng.randint(1, 8), seed=number, y=number)
        for number in range(1, 40)
    ]
    expected = {job: alone(job)[0] for job in jobs}
    engine = FakeEngine(**options)
    lane, outside, lengths = lane_for(engine, jobs[0]), list(jobs), set()
    while outside or lane.jobs:
        while outside and len(lane.jobs) < lane.slots and rng.random() < 0.6:
            lane.join(outside.pop(rng.randrange(len(outside))))
        if not lane.jobs:
            continue
        first, most = lane.jobs[0], rng.randint(1, 9)
        allowed = min([engine.chain, most, *(len(job.rows) - job.done for job in lane.jobs)])
        lengths.add(allowed)
        done = first.done
        lane.step(rng.sample(lane.jobs, rng.randint(0, len(lane.jobs))), most)
        assert first.done - done == allowed
        for job in list(lane.jobs):
            if job.finished or rng.random() < 0.1:
                lane.leave(job)
                if not job.finished:
                    outside.append(job)
    for job in jobs:
        np.testing.assert_array_equal(job.state["base"], expected[job])
    run = sorted(owner for _, owners in engine.log for owner in owners)
    assert run == [(number, row) for number, job in enumerate(jobs, 1) for row in range(len(job.rows))]
    assert {1, engine.chain} <= lengths


@each_engine
def test_a_job_goes_on_in_another_lane(options: dict[str, Any]) -> None:
    """All that a run consists of is in `Job.state` between two lanes."""
    for solver in ("dpmpp_3m", "dim", "dpmpp_2m_sde"):
        job = make_job(["step_image", "step_image_up"], solver=solver, steps=7)
        expected, _ = alone(job)
        lanes = {name: Lane(FakeEngine(**options), name, 0, 2) for name in job.graphs}
        for lane in lanes.values():  # whoever was there before left his state behind
            lane.join(make_job(lane.name, 9, seed=9, solver="euler-maruyama"))
            finish(lane)
        while not job.finished:
            lane = lanes[job.lane[0]]
            lane.join(job)
            lane.step()
            lane.leave(job)
        np.testing.assert_array_equal(job.state["base"], expected)


# ------------------------------------------------------------------------------------------------ who is where


@each_engine
def test_the_last_fills_the_hole(options: dict[str, Any]) -> None:
    jobs = [make_job("step_text", number, seed=number, steps=9) for number in range(1, 6)]
    lane = lane_for(FakeEngine(**options), jobs[0])
    for job in jobs:
        lane.join(job)
    a, b, c, d, e = jobs
    lane.step()
    assert lane.jobs == [a, b, c, d, e]
    assert [row_of(lane.inputs["row"], slot) for slot in range(5)] == [1, 2, 3, 4, 5]
    assert not lane.inputs["row"].host[5:, :, OWNER].any()
    lane.leave(b)
    assert lane.jobs == [a, e, c, d]
    lane.leave(d)
    lane.step()
    assert lane.jobs == [a, e, c]
    assert [row_of(lane.inputs["row"], slot) for slot in range(3)] == [1, 5, 3]
    assert (a.done, b.done, c.done, d.done, e.done) == (2, 1, 2, 1, 2)
    lane.join(b)
    lane.step()
    assert lane.jobs == [a, e, c, b]
    assert [int(lane.inputs["row"].host[slot, 0, NUMBER]) for slot in range(4)] == [2, 2, 2, 1]


@each_engine
def test_who_leaves_has_his_state(options: dict[str, Any]) -> None:
    """All of it, as after the same rows alone; it is his own: what the lane does later does not show in it."""
    jobs = [make_job("step_joint_guided", n, seed=n, steps=6, solver="dpmpp_3m", given=1) for n in (1, 2, 3)]
    twin = make_job("step_joint_guided", 2, seed=2, steps=6, solver="dpmpp_3m", given=1)
    lane, other = (lane_for(FakeEngine(**options), twin) for _ in range(2))
    for job in jobs:
        lane.join(job)
    other.join(twin)
    for _ in range(3):
        lane.step()
        other.step()
    lane.leave(jobs[1])
    other.leave(twin)
    assert jobs[1].state.keys() == {"base", "point", "history", "mask", "x0_before"}
    kept = {name: value.copy() for name, value in jobs[1].state.items()}
    lane.step()
    lane.join(make_job("step_joint_guided", 4, seed=4))
    lane.step()
    for name, value in twin.state.items():
        np.testing.assert_array_equal(kept[name], value)
        np.testing.assert_array_equal(jobs[1].state[name], value)


def test_a_start_is_not_written_to() -> None:
    """`base` and `point` of a new job are one array."""
    job = make_job("step_image")
    start, kept = job.state["base"], job.state["base"].copy()
    assert job.state["point"] is start
    lane = lane_for(FakeEngine(), job)
    lane.join(job)
    finish(lane)
    np.testing.assert_array_equal(start, kept)


@each_engine
def test_only_the_watched_get_their_x0(options: dict[str, Any]) -> None:
    for graph in ("step_image", "step_joint_guided"):  # x0 is an output, or becomes x0_before
        jobs = [make_job(graph, n, seed=n) for n in (1, 2, 3)]
        expected = {job: alone(job)[1] for job in jobs}
        lane = lane_for(FakeEngine(**options), jobs[0])
        for job in jobs:
            lane.join(job)
        lane.step([jobs[2]])
        lane.step([jobs[2], jobs[1]])
        shown = jobs[2].x0
        lane.step()
        assert jobs[0].x0 is None
        assert jobs[2].x0 is shown  # a copy: the step after has not changed it
        for job in jobs[1:]:
            assert job.x0 is not None
            np.testing.assert_array_equal(job.x0, expected[job][1])


def test_who_cannot_join_is_not_there() -> None:
    """His latents are of another size; the others have not noticed."""
    jobs = [make_job("step_text", n, seed=n) for n in (1, 2)]
    expected = alone(jobs[0])[0]
    lane = lane_for(FakeEngine(), jobs[0])
    lane.join(jobs[0])
    lane.step()
    with pytest.raises(ValueError, match="broadcast"):
        lane.join(make_job("step_text", 3, text=7))
    assert lane.jobs == [jobs[0]]
    lane.join(jobs[1])
    finish(lane)
    np.testing.assert_array_equal(jobs[0].state["base"], expected)


# -------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("bad", [(), (0,), (2,), (0, 1), (0, 1, 2, 3, 4)], ids=str)
@each_engine
def test_a_failing_batch_runs_again_one_by_one(options: dict[str, Any], bad: Sequence[int]) -> None:
    """Step 2 fails for all together, and alone for the bad; a run that fails leaves NaN behind."""
    jobs = [
        make_job("step_joint", n + 1, seed=n, solver="dpmpp_2m_sde", steps=5, fails_at=2 if n in bad else None)
        for n in range(5)
    ]
    expected = {job: alone(job)[0] for job in jobs}
    engine = FakeEngine(**options, fails=lambda graph, rows: len(rows) > 1 and rows[0, NUMBER] == 2)
    lane = lane_for(engine, jobs[0])
    for job in jobs:
        lane.join(job)
    lane.step()
    lane.step()
    failed = lane.step(jobs)
    assert list(failed) == [jobs[n] for n in bad]
    assert all(isinstance(error, EngineError) for error in failed.values())
    assert engine.failed_alone == [n + 1 for n in bad]
    assert [job.done for job in jobs] == [2 if job in failed else 3 for job in jobs]
    for job in failed:
        lane.leave(job)
    finish(lane)
    for job in jobs:
        if job not in failed:
            np.testing.assert_array_equal(job.state["base"], expected[job])
    run = sorted(owner for _, owners in engine.log for owner in owners)
    assert run == [(n + 1, row) for n, job in enumerate(jobs) for row in range(job.done)]


@each_engine
def test_a_lone_failure_can_be_tried_again(options: dict[str, Any]) -> None:
    """The state it started from is still there; so is it for the batch after an error that is none of the engine's."""
    failing = True
    jobs = [make_job("step_text", n, seed=n, steps=5, solver="euler-maruyama") for n in (1, 2)]
    expected = {job: alone(job)[0] for job in jobs}
    engine = FakeEngine(**options, fails=lambda graph, rows: failing and rows[0, NUMBER] == 2)
    lane = lane_for(engine, jobs[0])
    lane.join(jobs[0])
    failing = False
    lane.step()
    lane.step()
    failing = True
    for _ in range(3):
        [(job, error)] = lane.step(jobs[:1]).items()
        assert (job, job.done, str(error)) == (jobs[0], 2, "the engine fails")
    failing = False
    lane.join(jobs[1])
    engine.fails = lambda graph, rows: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        lane.step()
    engine.fails = None
    finish(lane)
    for job in jobs:
        np.testing.assert_array_equal(job.state["base"], expected[job])


@each_engine
def test_what_overflows_stays_in_its_row(options: dict[str, Any]) -> None:
    jobs = [
        make_job("step_joint_guided", n, seed=n, fails_at=0 if n in (2, 5) else None, trouble=OVERFLOWS)
        for n in range(1, 6)
    ]
    expected = {job: alone(job)[0] for job in jobs}
    lane = lane_for(FakeEngine(**options), jobs[0])
    for job in jobs:
        lane.join(job)
    lane.step()
    lane.leave(jobs[4])  # its NaN stay in a slot that is now idle
    finish(lane)
    for job in jobs[:4]:
        assert np.isnan(job.state["base"]).all() == (job is jobs[1])
        if job is not jobs[1]:
            np.testing.assert_array_equal(job.state["base"], expected[job])
    again = make_job("step_joint_guided", 6, seed=1)  # and whoever gets such a slot next finds none of it
    lane.join(again)
    finish(lane)
    np.testing.assert_array_equal(again.state["base"], expected[jobs[0]])


# ---------------------------------------------------------------------------------------------- memory and sizes


def test_idle_slots_copy_themselves() -> None:
    """Five jobs on an engine for eight: the three idle rows have a state, and keep it, whatever it is."""
    engine = FakeEngine((1, 8), apart=True)
    jobs = [make_job("step_image_guided", n, seed=n, steps=9, solver="euler-maruyama") for n in range(1, 9)]
    lane = lane_for(engine, jobs[0])
    for job in jobs:
        lane.join(job)
    lane.step()
    for job in jobs[5:]:
        lane.leave(job)
    lane.step()
    lane.look()
    before = [pair[lane.turn].host[5:].copy() for pair in (lane.pairs["base"], lane.pairs["history"])]
    assert all(values.any() for values in before)
    for _ in range(4):
        lane.step()
    lane.look()
    after = [pair[lane.turn].host[5:] for pair in (lane.pairs["base"], lane.pairs["history"])]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert engine.idle == 5 * 3


@pytest.mark.parametrize(("batches", "slots"), [((1, 2, 4, 8), 8), ((1, 2, 4, 8), 3), ((1, 3, 5, 16), 6)], ids=str)
def test_no_run_leaves_the_buffers(batches: tuple[int, ...], slots: int) -> None:
    """Whatever the number of slots, the engine's next size fits in: the fake engine asserts it."""
    engine = FakeEngine(batches)
    jobs = [make_job("step_text", n + 1, seed=n, steps=2) for n in range(slots)]
    expected = [alone(job)[0] for job in jobs]
    lane = lane_for(engine, jobs[0], slots)
    for job in jobs:
        lane.join(job)
    finish(lane)
    for job, result in zip(jobs, expected, strict=True):
        np.testing.assert_array_equal(job.state["base"], result)


def test_the_state_moves_only_when_somebody_does() -> None:
    """Between two steps of the same company the rows are pushed, and noise where a row takes any; nothing else."""
    quiet = [make_job("step_joint_guided", n, seed=n, steps=30, solver="dpmpp_2m") for n in (1, 2, 3)]
    noisy = make_job("step_joint_guided", 4, seed=4, steps=30, solver="euler-maruyama")
    lane = lane_for(FakeEngine((1, 2, 4, 8), apart=True), noisy)
    for job in quiet:
        lane.join(job)
    for job, pushes in ((None, 1), (noisy, 2)):
        if job is not None:
            lane.join(job)
        lane.step()
        for _ in range(5):
            before = moves(lane)
            lane.step()
            pushed, pulled = moves(lane)
            assert (pushed - before[0], pulled - before[1]) == (pushes, 0)
    before = moves(lane)
    lane.step(quiet[:2])
    assert (moves(lane)[0] - before[0], moves(lane)[1] - before[1]) == (2, 1)  # x0
    before = moves(lane)
    lane.leave(noisy)
    lane.leave(quiet[0])
    lane.join(make_job("step_joint_guided", 5))
    assert (moves(lane)[0] - before[0], moves(lane)[1] - before[1]) == (0, len(lane.pairs))  # once for all three
    lane.step()
    assert moves(lane)[0] - before[0] == len(lane.inputs) + len(lane.pairs)


def test_each_run_is_bound_once() -> None:
    engine = FakeEngine((1, 2, 4, 8))
    jobs = [make_job("step_image", n, steps=40) for n in range(1, 6)]
    lane = lane_for(engine, jobs[0])
    for job in jobs[:3]:
        lane.join(job)
    for _ in range(10):
        lane.step()
    assert engine.binds == 2  # one for each turn
    lane.join(jobs[3])  # four run as three did, with an idle one
    lane.step()
    lane.step()
    assert engine.binds == 2
    lane.join(jobs[4])
    lane.step()
    assert engine.binds == 3
    lane.leave(jobs[0])
    lane.step()
    lane.step()
    assert engine.binds == 3


def test_a_lanes_bindings_go_with_it() -> None:
    """And a graph's with the graph: the lane binds anew to the one that is loaded next."""
    engine = FakeEngine()
    job = make_job("step_image", steps=6)
    expected = alone(job)[0]
    lane = lane_for(engine, job)
    lane.join(job)
    lane.step()
    old = engine.graphs["step_image"]
    assert list(old.bound) == [lane]
    engine.graphs["step_image"] = type(old)(engine, "step_image")
    finish(lane)
    np.testing.assert_array_equal(job.state["base"], expected)
    assert len(old.bound[lane]) == 1
    del lane
    assert not old.bound
    assert not engine.graphs["step_image"].bound
