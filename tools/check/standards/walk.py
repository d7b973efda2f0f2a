"""Running a task's evaluations on a backend, one by one, from any state.

Every sample is a job of one row in a lane, so what runs is what serves requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mdm.runtime.backend import Backend
from mdm.runtime.lane import Job, Lanes
from mdm.runtime.scheduler import Scheduler
from mdm.tools.check.finding import Array
from mdm.tools.check.standards.standard import Advance, Run, State, Walk

SLOTS = 8  # jobs that share a step


def walk(run: Run, advance: Advance) -> Walk:
    """`free` too is given the true selection at each evaluation: one that flips leads elsewhere, rightly."""
    free: list[State] = []
    state = run.states[0]
    for k in range(len(run)):
        state = advance(run, k, state)
        free.append(state)
        if "mask" in state:
            state = state | {"mask": run.states[k + 1]["mask"]}
    return Walk(free, [advance(run, k, run.states[k]) for k in range(len(run))])


class OnBackend:
    """Evaluations by an engine."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lanes = Lanes(backend, SLOTS)

    def job(self, run: Run, sample: int, rows: slice, state: State) -> Job:
        inputs = {name: array[sample] for name, array in run.inputs.items()}
        noise = None if run.noise is None else run.noise[rows, sample].astype(np.float32)
        table = run.rows[rows].astype(np.float32)
        own = {name: array[sample].astype(np.float32) for name, array in state.items()}
        tokens = len(state["base"][0]) if "given" in inputs else 0
        return Job([run.graph] * len(table), table, tokens, 0, sample, inputs, own, noise=noise)

    def advance(self, run: Run, evaluation: int, state: State) -> State:
        jobs = [self.job(run, b, slice(evaluation, evaluation + 1), state) for b in range(run.batch)]
        lane = self.lanes(*jobs[0].lane)
        for job in jobs:
            lane.join(job)
        failed = lane.step(watched=jobs)
        for job in jobs:
            lane.leave(job)
        for error in failed.values():
            raise error
        after = {name: np.stack([job.state[name] for job in jobs]) for name in jobs[0].state}
        shown = [job.x0 for job in jobs if job.x0 is not None]
        return after | {"x0": np.stack(shown)}

    def end(self, run: Run) -> Array:
        """The whole run as a request's: by the scheduler, all evaluations in one go -> the latents."""
        jobs = [self.job(run, b, slice(None), run.states[0]) for b in range(run.batch)]
        return run_jobs(self.lanes, jobs)


def run_jobs(lanes: Lanes, jobs: Sequence[Job]) -> Array:
    """-> their latents, [B,..]"""
    scheduler = Scheduler(lanes, queue=len(jobs))
    for job in jobs:
        scheduler.submit(job)
    while scheduler.busy:
        for ticket in scheduler.tick():
            if ticket.error is not None:
                raise ticket.error
    return np.stack([job.state["base"] for job in jobs])
