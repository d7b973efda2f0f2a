"""Lanes on an engine that takes many steps in one go: how many, what is copied when, and failures. That the steps are
the same steps is in test_lane.py."""

from __future__ import annotations

import numpy as np

from mdm.runtime.lane import MOST_BOUND, Lane

from .fake_engine import FakeEngine, alone, make_job
from .test_lane import lane_for


def test_a_run_ends_where_a_job_changes_lanes() -> None:
    job = make_job(["step_image", "step_image", "step_image_up"], steps=8)
    assert [job.stays(9) for job.done in range(8)] == [2, 1, 1, 2, 1, 1, 2, 1]
    assert [job.stays(1) for job.done in range(8)] == [1] * 8
    job.done = 0
    lane = lane_for(FakeEngine(chain=99), job)
    lane.join(job)
    lane.step(most=99)
    assert job.done == 2


def test_copies_are_made_at_the_ends_of_a_run_alone() -> None:
    """In: the newcomers' state and a row for each step, with noise if any is drawn; out: when somebody goes."""
    engine = FakeEngine(chain=99, apart=True)
    for solver, noisy in (("dpmpp_2m", 0), ("euler-maruyama", 1)):
        jobs = [make_job("step_joint_guided", n, seed=n, steps=20, solver=solver) for n in (1, 2)]
        expected = {job: alone(job)[0] for job in jobs}
        lane = lane_for(engine, jobs[0])
        for job in jobs:
            lane.join(job)
        lane.step(most=99)
        buffers = [*lane.rows, *lane.noise, *lane.outputs.values(), *(b for pair in lane.pairs.values() for b in pair)]
        assert (len(lane.rows), len(lane.noise)) == (20, 20 if noisy else 1)
        assert {buffer.moves["push"] for buffer in lane.rows} == {1}
        assert sum(buffer.moves["pull"] for buffer in buffers) == 0
        for job in jobs:
            lane.leave(job)
            np.testing.assert_array_equal(job.state["base"], expected[job])
        assert sum(buffer.moves["pull"] for buffer in buffers) == len(lane.pairs)


def test_a_long_run_that_fails_fails_everybody() -> None:
    """The state it began with is gone, so nobody can go on without the one to blame."""
    jobs = [make_job("step_image", n, steps=6, fails_at=3 if n == 2 else None) for n in (1, 2, 3)]
    engine = FakeEngine(chain=99)
    lane = lane_for(engine, jobs[0])
    for job in jobs:
        lane.join(job)
    assert list(lane.step(most=99)) == jobs
    assert not engine.failed_alone


def test_few_runs_are_kept_ready() -> None:
    engine = FakeEngine(chain=200)
    lane = Lane(engine, "step_image", 0, 1)
    for steps in range(1, MOST_BOUND + 10):
        lane.join(job := make_job("step_image", steps=steps))
        lane.step(most=200)
        lane.leave(job)
    assert len(engine.graphs["step_image"].bound[lane]) == MOST_BOUND
