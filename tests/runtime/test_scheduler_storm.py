"""Ten thousand requests: whatever arrives, is taken back, runs late or fails, each ends exactly once, each of its rows
is run once, and what comes of it equals the lone run bit for bit.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime.lane import Job
from mdm.runtime.scheduler import CancelledError, DeadlineError, QueueFullError, Ticket
from mdm.runtime.solver import SOLVERS, STOCHASTIC

from .fake_desk import Desk, owner_of
from .fake_engine import FakeEngine, alone, make_job

# ----------------------------------------------------------------------------------------------- ten thousand


@dataclass
class Recipe:
    """A request that many clients make, and what it has to come to."""

    arguments: dict[str, Any]
    result: Any = None
    x0: list[Any] = field(default_factory=list)

    def job(self, owner: int, fails_at: int | None) -> Job:
        return make_job(**self.arguments, owner=owner, fails_at=fails_at)


def recipes(rng: random.Random, count: int) -> list[Recipe]:
    graphs = [
        "step_image", "step_image", "step_image_guided", "step_text", "step_joint", "step_joint_guided",
        ("step_image_up", "step_image"), ("step_image", "step_image", "step_image_up"),
    ]  # fmt: skip
    solvers = [*SOLVERS, *STOCHASTIC * 3]
    made = []
    for number in range(count):
        arguments = {
            "graphs": graphs[number % len(graphs)], "solver": rng.choice(solvers), "steps": rng.randint(1, 8),
            "text": rng.choice([2, 4]), "seed": rng.randrange(2**32), "y": rng.randint(0, 5),
            "guidance": rng.choice([0.0, 1.5, -0.5]), "given": rng.randint(0, 2),
        }  # fmt: skip
        recipe = Recipe(arguments)
        recipe.result, recipe.x0 = alone(recipe.job(1, None))
        made.append(recipe)
    return made


class Storm:
    """Clients that do everything they can, and the record of what the scheduler made of it."""

    def __init__(self, seed: int, requests: int, **engine: Any) -> None:
        self.rng, self.requests = random.Random(seed), requests
        self.desk = Desk(FakeEngine(**engine, fails=self.fails), queue=24)
        self.recipes = recipes(self.rng, 160)
        self.recipe_of: dict[Ticket, Recipe] = {}
        self.live: dict[Ticket, None] = {}
        self.tickets: list[Ticket] = []
        self.ends: Counter[Ticket] = Counter()  # by tick or by cancel
        self.watched: dict[Ticket, int] = {}  # steps told
        self.raised: dict[Ticket, Exception] = {}
        self.cancelled: set[Ticket] = set()
        self.bad: set[int] = set()  # owners with a row that always fails
        self.refused = self.together = 0

    def fails(self, graph: str, rows: Any) -> bool:
        """Now and then a whole batch, seldom a single one."""
        fails = self.rng.random() < (0.03 if len(rows) > 1 else 0.01)
        self.together += fails and len(rows) > 1
        return fails

    def arrive(self) -> None:
        recipe = self.rng.choice(self.recipes)
        owner = len(self.tickets) + self.refused + 1
        job = recipe.job(owner, None)
        if self.rng.random() < 0.02:
            at = self.rng.randrange(len(job.rows))
            job = recipe.job(owner, at)
            self.bad.add(owner)
        deadline = self.desk.clock.now + self.rng.expovariate(1 / 60) if self.rng.random() < 0.3 else None
        watch = self.rng.random() < 0.25
        scheduler = self.desk.scheduler
        full = sum(ticket.started is None for ticket in scheduler.waiting) >= scheduler.queue
        try:
            ticket = self.desk.submit(job, deadline, self.told if watch else None)
        except QueueFullError:
            assert full
            self.refused += 1
            return
        assert not full
        assert ticket.submitted == self.desk.clock.now
        self.tickets.append(ticket)
        self.live[ticket] = None
        self.recipe_of[ticket] = recipe
        if watch:
            self.watched[ticket] = 0

    def told(self, ticket: Ticket) -> None:
        """Who looks on sees each step once and in order, and may do what any client may."""
        assert ticket.ended is None, "told after the end"
        self.watched[ticket] += 1
        assert ticket.job.done == self.watched[ticket]
        np.testing.assert_array_equal(ticket.job.x0, self.recipe_of[ticket].x0[ticket.job.done - 1])
        chance = self.rng.random()
        if chance < 0.02:
            self.take_back(ticket)
        elif chance < 0.05:
            self.take_back(self.rng.choice(list(self.live)))
        elif chance < 0.06 and len(self.tickets) + self.refused < self.requests:
            self.arrive()
        if self.rng.random() < 0.01:  # he may have been cancelled just now
            error = self.raised[ticket] = RuntimeError(f"callback of {owner_of(ticket.job)}")
            raise error

    def take_back(self, ticket: Ticket) -> None:
        alive = ticket.ended is None
        assert self.desk.cancel(ticket) is alive
        if alive:
            self.cancelled.add(ticket)
            self.note(ticket)
        assert not self.desk.cancel(ticket)

    def note(self, ticket: Ticket) -> None:
        assert ticket.ended == self.desk.clock.now
        self.ends[ticket] += 1
        self.live.pop(ticket, None)

    def run(self) -> None:
        clock, scheduler = self.desk.clock, self.desk.scheduler
        for tick in itertools.count():
            if len(self.tickets) + self.refused == self.requests and not scheduler.busy:
                return
            assert tick < 10 * self.requests, "the scheduler does not come to an end"
            clock.now += self.rng.expovariate(1)
            for _ in range(self.rng.choice([0, 0, 0, 1, 1, 2, 2, 3, 3, 60 if self.rng.random() < 0.05 else 0])):
                if len(self.tickets) + self.refused < self.requests:
                    self.arrive()
            if self.live and self.rng.random() < 0.1:
                self.take_back(self.rng.choice(list(self.live)))
            if self.tickets and self.rng.random() < 0.02:
                self.take_back(self.rng.choice(self.tickets))  # most have ended
            for ticket in self.desk.tick():
                self.note(ticket)
            inside = sum(len(lane.jobs) for lane in self.desk.lanes.values())
            assert inside + len(scheduler.waiting) == len(self.live)
            assert inside == sum(map(len, scheduler.running.values()))


@pytest.mark.parametrize(
    ("requests", "engine"),
    [(10_000, {"batches": (1, 2, 4, 8), "apart": True}), (1500, {}), (1500, {"apart": True})],
    ids=["sizes-apart", "any", "any-apart"],
)
def test_nothing_is_lost_and_nothing_repeated(requests: int, engine: dict[str, Any]) -> None:
    storm = Storm(requests, requests, **engine)
    storm.run()
    desk = storm.desk
    assert len(storm.tickets) + storm.refused == requests
    assert [ticket for ticket in storm.tickets if storm.ends[ticket] != 1] == []
    assert not storm.live
    assert not any(lane.jobs for lane in desk.lanes.values())

    run: dict[int, list[int]] = {owner_of(ticket.job): [] for ticket in storm.tickets}
    for _, owners in desk.engine.log:
        for owner, row in owners:
            run[owner].append(row)
    alone_failed = set(desk.engine.failed_alone)
    assert len(alone_failed) == len(desk.engine.failed_alone)  # who failed is not tried again
    kinds: Counter[str] = Counter()
    for ticket in storm.tickets:
        job, error, owner = ticket.job, ticket.error, owner_of(ticket.job)
        kinds[type(error).__name__] += 1
        assert run[owner] == list(range(job.done)), "a row was left out or run twice"
        assert (ticket.started is not None) or not job.done
        assert job.x0 is None or ticket in storm.watched
        assert (ticket in storm.cancelled) == isinstance(error, CancelledError)
        if ticket in storm.watched and not isinstance(error, CancelledError | EngineError):
            assert storm.watched[ticket] == job.done
        if error is None:
            assert job.finished
            assert owner not in alone_failed | storm.bad
            assert ticket not in storm.raised
            np.testing.assert_array_equal(job.state["base"], storm.recipe_of[ticket].result)
        elif isinstance(error, EngineError):
            assert owner in alone_failed
            alone_failed.remove(owner)
        elif isinstance(error, DeadlineError):
            assert ticket.deadline is not None
            assert ticket.ended is not None
            assert ticket.ended >= ticket.deadline
            assert f"step {job.done} of {len(job.rows)}" in str(error)
        elif not isinstance(error, CancelledError):
            assert error is storm.raised[ticket]
    cancelled = {owner_of(ticket.job) for ticket in storm.cancelled}
    assert alone_failed <= cancelled  # by another's callback, of the same step
    # All of it happened, and often.
    rare = requests // 500
    assert min(kinds[name] for name in ("NoneType", "CancelledError", "EngineError", "DeadlineError")) > 5 * rare
    assert min(kinds["RuntimeError"], storm.refused, storm.together) > rare
    assert kinds["NoneType"] > requests // 3
    if desk.engine.batches:
        assert desk.engine.idle > requests // 4
