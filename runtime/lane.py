"""A lane: samples that are denoised together, because they want the same graph at the same text length.

Each has a slot, a row of every buffer. Inputs that a step replaces have two buffers, which change places after each
step; so a run copies nothing, and when a run of one step fails the state it started from is still there. Where an
engine gains by it, many steps are one run, whose failure is everybody's: then each step has a buffer of its own for the
solver's rows, and for noise if any is drawn.

Letters: n slots in use, L latent tokens, d latent width (for DiM the latents are [C,H,W]), m modalities, R columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import MdmError
from mdm.runtime.backend import Array, Backend, Buffer, Spec, Tensors
from mdm.runtime.noise import normal
from mdm.runtime.solver import ROW, copy_row

MOST_BOUND = 64  # runs that a lane keeps ready
MOST_NOISE = 64 * 2**20  # bytes of noise that a run may take along
NOISE = [ROW.index("base_noise"), ROW.index("point_noise")]


@dataclass(eq=False)
class Job:
    """One sample on its way."""

    graphs: Sequence[str]  # the step graph of each row
    rows: npt.NDArray[np.float32]  # [S,m,R]
    tokens: int  # L, where a graph leaves it open
    seed: int
    sample: int
    inputs: dict[str, Any]  # given, y, uncond, uncond_y, guidance: what the graphs take of them
    state: dict[str, Array]  # base, later also point, history, mask, x0_before; stale while the job is in a lane
    done: int = 0  # rows
    taken: bool = False  # by a scheduler: a job is run once
    noise: Array | None = field(default=None, repr=False)  # for each row, in place of the seed's
    x0: Array | None = field(default=None, repr=False)  # the clean latents as estimated last, if the caller looks on

    @property
    def finished(self) -> bool:
        return self.done == len(self.rows)

    @property
    def lane(self) -> tuple[str, int]:
        """Which lane runs its next row: graph and tokens."""
        return self.graphs[self.done], self.tokens

    def stays(self, most: int) -> int:
        """How many rows, from the next one on and `most` at most, run in the lane of the next one."""
        left = self.graphs[self.done : self.done + most]
        return next((count for count, graph in enumerate(left) if graph != left[0]), len(left))


class Lane:
    def __init__(self, backend: Backend, graph: str, tokens: int, slots: int) -> None:
        loaded = backend.graph(graph)
        self.backend, self.name, self.tokens, self.sizes = backend, graph, tokens, loaded.batches(tokens)
        self.slots = min([slots, *self.sizes[-1:]])
        room = self.padded(self.slots)  # idle slots too have their rows
        self.jobs: list[Job] = []  # of slot 0, 1, ..
        self.turn = 0  # which of a pair of buffers holds the state
        self.edited = False  # hosts are ahead of the engine
        self.seen = True  # hosts show the engine's state

        def buffer(spec: Spec) -> Buffer:
            return backend.buffer(spec.sized(batch=room, tokens=tokens), spec.dtype)

        self.pairs: dict[str, tuple[Buffer, Buffer]] = {}  # input -> now and next, by turn
        self.next_of: dict[str, str] = {}  # output -> the input that it becomes
        self.outputs: dict[str, Buffer] = {}  # outputs that nothing takes up again
        for name, spec in loaded.outputs.items():
            becomes = "x0_before" if name == "x0" else name.removesuffix("_next")
            if becomes in loaded.inputs:
                self.next_of[name] = becomes
                self.pairs[becomes] = buffer(spec), buffer(spec)
            else:
                self.outputs[name] = buffer(spec)
        self.inputs = {name: buffer(spec) for name, spec in loaded.inputs.items() if name not in self.pairs}
        # Of the first step of a run, the second, ..: made when a run is first so long.
        self.rows, self.noise = [self.inputs["row"]], [self.inputs["noise"]]
        self.more_rows, self.more_noise = (partial(buffer, loaded.inputs[name]) for name in ("row", "noise"))
        self.idle = copy_row(self.inputs["row"].host.shape[1])

    # ---------------------------------------------------------------------------------------------- who is here

    def join(self, job: Job) -> None:
        """Give a job the next slot."""
        self.look()
        slot = len(self.jobs)
        fresh = {"point": job.state["base"], "mask": 1}  # before the first step; the rest is 0
        for name, pair in self.pairs.items():
            pair[self.turn].host[slot] = job.state.get(name, fresh.get(name, 0))
        for name, buffer in self.inputs.items():
            buffer.host[slot] = job.inputs.get(name, 0)
        self.edited = True
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        """Free a job's slot, in which the last one's job goes on; `job.state` then holds the state again."""
        self.look()
        slot, last = self.jobs.index(job), len(self.jobs) - 1
        for name, pair in self.pairs.items():
            host = pair[self.turn].host
            job.state[name] = host[slot].copy()
            host[slot] = host[last]
        for buffer in self.inputs.values():
            buffer.host[slot] = buffer.host[last]
        self.jobs[slot] = self.jobs[last]
        self.jobs.pop()
        self.edited = True

    def clear(self) -> None:
        """Drop all jobs, whose state is lost."""
        self.jobs, self.edited, self.seen = [], True, True

    def look(self) -> None:
        """Bring the state to the hosts."""
        if not self.seen:
            for pair in self.pairs.values():
                pair[self.turn].pull()
            self.seen = True

    # -------------------------------------------------------------------------------------------------- stepping

    def step(self, watched: Sequence[Job] = (), most: int = 1) -> dict[Job, MdmError]:
        """The next row of every job, or as many as all of them stay for, up to `most` -> the jobs that failed: they
        must leave. The `watched` get the x0 of the last one."""
        most = min(most, self.backend.chain)
        steps = min(job.stays(most) for job in self.jobs)
        if self.takes_noise(steps):
            steps = min(steps, max(1, MOST_NOISE // self.noise[0].host.nbytes))
        count = self.padded(len(self.jobs))
        drawn = self.write(steps, count)
        failed: dict[Job, MdmError] = {}
        try:
            self.run(0, count, steps, drawn)
        except MdmError as error:
            # One of them may be to blame: each runs again alone, from the state that is still there.
            if len(self.jobs) == 1 or self.backend.chain > 1:
                return dict.fromkeys(self.jobs, error)
            for slot, job in enumerate(self.jobs):
                try:
                    self.run(slot, 1, steps, drawn)
                except MdmError as error:
                    failed[job] = error
        self.turn = (self.turn + steps) % 2
        self.seen = False
        for job in self.jobs:
            if job not in failed:
                job.done += steps
        if watched:
            shown = self.pairs["x0_before"][self.turn] if "x0_before" in self.pairs else self.outputs["x0"]
            shown.pull()
            for job in watched:
                job.x0 = shown.host[self.jobs.index(job)].copy()
        return failed

    def padded(self, count: int) -> int:
        """The next size that the engine was built for."""
        return next(size for size in self.sizes if size >= count) if self.sizes else count

    def write(self, steps: int, count: int) -> bool:
        """Each slot's rows, and its noise where a row takes any; idle slots copy -> whether any takes noise."""
        ahead = [job.rows[job.done : job.done + steps] for job in self.jobs]  # [S,m,R] each
        drawn = self.takes_noise(steps)
        for buffers, make, many in ((self.rows, self.more_rows, steps), (self.noise, self.more_noise, steps * drawn)):
            buffers += [make() for _ in range(many - len(buffers))]
        for k in range(steps):
            self.rows[k].host[: len(self.jobs)] = [rows[k] for rows in ahead]
            self.rows[k].host[len(self.jobs) : count] = self.idle
            for slot, job in enumerate(self.jobs):
                if ahead[slot][k][:, NOISE].any():
                    self.noise[k].host[slot] = self.noise_of(job, job.done + k)
        pushed = [*self.rows[:steps], *self.noise[: steps * drawn]]
        if self.edited:
            listed = {"row", "noise"} if drawn else {"row"}
            pushed += [buffer for name, buffer in self.inputs.items() if name not in listed]
            pushed += [pair[self.turn] for pair in self.pairs.values()]
        for buffer in pushed:
            buffer.push()
        self.edited = False
        return drawn

    def takes_noise(self, steps: int) -> bool:
        """Whether any of the next rows does."""
        return any(job.rows[job.done : job.done + steps, :, NOISE].any() for job in self.jobs)

    def noise_of(self, job: Job, row: int) -> Array:
        if job.noise is not None:
            return job.noise[row]
        return normal(job.seed, job.sample, 1 + row, self.noise[0].host.shape[1:])

    def run(self, first: int, count: int, steps: int, drawn: bool) -> None:
        graph = self.backend.graph(self.name)
        bound = graph.bound.setdefault(self, {})
        key = first, count, self.turn, steps, drawn
        if key not in bound:
            if len(bound) == MOST_BOUND:
                del bound[next(iter(bound))]
            bound[key] = graph.bind([self.tensors(k, drawn) for k in range(steps)], first, count)
        bound[key]()

    def tensors(self, k: int, drawn: bool) -> tuple[Tensors, Tensors]:
        """Inputs and outputs of the k-th step of a run."""
        turn = (self.turn + k) % 2
        own = {"row": self.rows[k], "noise": self.noise[k if drawn else 0]}
        now = {name: pair[turn] for name, pair in self.pairs.items()}
        after = {name: self.pairs[becomes][1 - turn] for name, becomes in self.next_of.items()}
        return self.inputs | own | now, self.outputs | after


class Lanes:
    """The lanes of a backend, found by graph and tokens; those that nobody is in go when a new one is made."""

    def __init__(self, backend: Backend, slots: int) -> None:
        """`slots`: samples that share a step, at most, and no more than the engine was built for."""
        self.backend, self.slots = backend, slots
        self.made: dict[tuple[str, int], Lane] = {}

    def __call__(self, graph: str, tokens: int) -> Lane:
        key = graph, tokens
        if key not in self.made:
            self.made = {other: lane for other, lane in self.made.items() if lane.jobs}
            self.made[key] = Lane(self.backend, graph, tokens, self.slots)
        return self.made[key]
