"""The scheduler on real lanes and the engine of `fake_engine.py`, with a clock of the test's own: whatever arrives, is
taken back, runs late or fails, every request ends exactly once, each of its rows is run once, and what comes of it
equals the lone run bit for bit.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.lane import Job, Lane
from mdm.runtime.scheduler import CancelledError, DeadlineError, QueueFullError, Scheduler, Ticket
from mdm.runtime.solver import SOLVERS, STOCHASTIC

from .fake_engine import NUMBER, OWNER, FakeEngine, alone, make_job


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A scheduler with lanes of `slots` on an engine."""

    def __init__(self, engine: FakeEngine | None = None, slots: int = 8, queue: int = 64) -> None:
        self.engine, self.slots, self.clock = engine or FakeEngine(), slots, Clock()
        self.lanes: dict[tuple[str, int], Lane] = {}
        self.open(queue)

    def open(self, queue: int = 64) -> None:
        """A new scheduler on the same lanes."""
        self.scheduler = Scheduler(self.lane, queue, self.clock)
        self.submit, self.tick, self.cancel = self.scheduler.submit, self.scheduler.tick, self.scheduler.cancel

    def lane(self, graph: str, tokens: int) -> Lane:
        key = graph, tokens
        if key not in self.lanes:
            self.lanes[key] = Lane(self.engine, graph, tokens, self.slots)
        return self.lanes[key]

    def drain(self, ticks: int = 1000) -> list[Ticket]:
        """Tick until nothing is left to do -> who ended, in order."""
        ended = []
        for _ in range(ticks):
            if not self.scheduler.busy:
                return ended
            ended += self.tick()
            self.clock.now += 1
        raise AssertionError("the scheduler does not come to an end")


def owner_of(job: Job) -> int:
    return int(job.rows[0, 0, OWNER])


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


# ------------------------------------------------------------------------------------------------- whose turn


def test_every_running_request_gets_steps_at_the_same_rate() -> None:
    """Lanes of one, three and eight; one that comes later has its turn within a round."""
    desk = Desk()
    graphs = ["step_image"] + ["step_text"] * 3 + ["step_joint_guided"] * 8
    first = [desk.submit(make_job(graph, n, steps=40)) for n, graph in enumerate(graphs, 1)]
    for tick in range(1, 31):
        desk.tick()
        done = [ticket.job.done for ticket in first]
        assert max(done) - min(done) <= 1
        assert sum(done) >= tick  # every tick is somebody's step
    late = [desk.submit(make_job("step_image_guided", 20, steps=40)), desk.submit(make_job("step_text", 21, steps=40))]
    for tick in range(1, 41):
        desk.tick()
        done = [ticket.job.done for ticket in [*first, *late]]
        assert max(done[:-2]) - min(done[:-2]) <= 1
        assert min(done[-2:]) >= tick // 4


def test_who_came_first_starts_first() -> None:
    """In each lane; another lane's queue holds nobody up."""
    desk, rng = Desk(slots=2, queue=200), random.Random(5)
    tickets = []
    for n in range(1, 121):
        graph = rng.choice(["step_image", "step_image", "step_image", "step_text"])
        tickets.append(desk.submit(make_job(graph, n, steps=rng.randint(1, 5))))
    desk.drain()
    for graph in ("step_image", "step_text"):
        started = [ticket.started for ticket in tickets if ticket.job.graphs[0] == graph]
        assert started == sorted(started)
        assert len(set(started)) > 10
    few, many = (
        max(t.ended or 0 for t in tickets if t.job.graphs[0] == graph) for graph in ("step_text", "step_image")
    )
    assert few < many - 20


def test_who_changes_lanes_keeps_his_place() -> None:
    """Three leave one lane together, and the other has one slot: they go in as they came, before who has not begun."""
    desk = Desk()
    desk.lanes["step_image_up", 0] = Lane(desk.engine, "step_image_up", 0, 1)
    graphs = ["step_image", "step_image_up", "step_image_up"]
    movers = [desk.submit(make_job(graphs, n, steps=3)) for n in (1, 2, 3)]
    fresh = [desk.submit(make_job("step_image_up", n, steps=2)) for n in (4, 5)]
    assert desk.drain() == [fresh[0], *movers, fresh[1]]
    assert [ticket.started for ticket in movers] == [100] * 3


def test_who_changes_lanes_is_not_overtaken_by_those_who_come_after() -> None:
    """A steady stream of others that change into the same lane, which has one slot, must not keep him waiting."""
    desk = Desk(slots=8, queue=500)
    desk.lanes["step_image_up", 0] = Lane(desk.engine, "step_image_up", 0, 1)
    graphs = ["step_image", "step_image_up"]
    first = [desk.submit(make_job(graphs, n, steps=2)) for n in (1, 2, 3)]
    later = []
    for n in range(4, 60):
        later.append(desk.submit(make_job(graphs, n, steps=2)))
        desk.tick()
        desk.clock.now += 1
        if all(ticket.ended for ticket in first):
            break
    overtaken = [ticket for ticket in later if ticket.ended and any(not t.ended for t in first)]
    assert overtaken == []
    assert all(ticket.ended for ticket in first)
    desk.drain()


# -------------------------------------------------------------------------------------------------- how it ends


def test_a_full_queue_refuses_and_takes_in_again() -> None:
    desk = Desk(slots=1, queue=2)
    tickets = [desk.submit(make_job("step_image", 1, steps=2))]
    desk.tick()  # runs, and waits no longer
    tickets += [desk.submit(make_job("step_image", n, steps=2)) for n in (2, 3)]
    with pytest.raises(QueueFullError, match=r"^2 requests wait already") as caught:
        desk.submit(make_job("step_image", 4))
    assert caught.value.exit_code == 3
    assert desk.cancel(tickets[1])
    tickets.append(desk.submit(make_job("step_image", 5, steps=2)))
    assert desk.drain() == [tickets[0], tickets[2], tickets[3]]
    assert all(ticket.error is None for ticket in (tickets[0], tickets[2], tickets[3]))


def test_a_deadline_ends_the_running_and_the_waiting() -> None:
    desk = Desk(slots=2)
    running = desk.submit(make_job("step_image", 1, steps=5), deadline=110)
    beside = desk.submit(make_job("step_image", 2, steps=5), deadline=111.5)
    waiting = desk.submit(make_job("step_image", 3, steps=5), deadline=110)
    expected = alone(make_job("step_image", 2, steps=5))[0]
    assert desk.tick() == []
    desk.clock.now = 109.999
    assert desk.tick() == []
    desk.clock.now = 110
    assert set(desk.tick()) == {waiting, running}
    for ticket, place in ((running, "step 2 of 5"), (waiting, "step 0 of 5")):
        assert str(ticket.error) == f"the request's deadline passed after 10 s, at {place}"
        assert isinstance(ticket.error, DeadlineError)
        assert ticket.ended == 110
    assert desk.drain() == [beside]
    assert (beside.ended, beside.error) == (111, None)
    np.testing.assert_array_equal(beside.job.state["base"], expected)
    assert desk.lanes["step_image", 0].jobs == []


def test_a_callback_may_end_everything() -> None:
    """The callback of the first one closes the scheduler: nobody is told, stepped or ended after that."""
    desk, told = Desk(), []

    def close(ticket: Ticket) -> None:
        told.append(ticket)
        desk.scheduler.close(RuntimeError("enough"))

    tickets = [desk.submit(make_job("step_text", n), on_step=close) for n in (1, 2, 3)]
    tickets.append(desk.submit(make_job("step_image", 4), on_step=close))
    assert desk.tick() == []
    assert told == tickets[:1]
    assert not desk.scheduler.busy
    assert {str(ticket.error) for ticket in tickets} == {"enough"}
    assert desk.tick() == []
    assert len(desk.engine.log) == 1


def test_a_callback_that_raises_ends_its_own_request() -> None:
    desk = Desk()

    def raises(ticket: Ticket) -> None:
        if ticket.job.done == 2:
            raise KeyError("mine")

    bad = desk.submit(make_job("step_text", 1), on_step=raises)
    good = desk.submit(make_job("step_text", 2))
    expected = alone(good.job)[0]
    assert desk.drain() == [bad, good]
    assert isinstance(bad.error, KeyError)
    assert (bad.job.done, good.error) == (2, None)
    np.testing.assert_array_equal(good.job.state["base"], expected)


def test_what_cannot_be_loaded_ends_those_who_want_it() -> None:
    """The first: its lane cannot be made. The second: its graph was put away for another, and is broken by then."""
    desk = Desk()
    broken: set[str] = {"step_joint"}
    load: Callable[[str], Any] = desk.engine.graph

    def graph(name: str) -> Any:
        if name in broken:
            raise InputError(f"'{name}' is not the file that the manifest signs")
        return load(name)

    desk.engine.graph = graph  # type: ignore[method-assign]
    never, later, good = (
        desk.submit(make_job(name, n)) for n, name in enumerate(["step_joint", "step_text", "step_image"], 1)
    )
    assert desk.tick() == [never]
    broken.add("step_text")
    assert desk.drain() == [later, good]
    assert good.error is None
    for ticket in (never, later):
        assert isinstance(ticket.error, InputError)


def test_who_cannot_have_a_lane_ends_alone() -> None:
    """Memory is over while somebody's lane is made: those around him go on, in whatever order they stand."""
    desk = Desk(slots=1)
    make = desk.scheduler.lane_of

    def lane_of(graph: str, tokens: int) -> Lane:
        if graph == "step_joint":
            raise MemoryError
        return make(graph, tokens)

    desk.scheduler.lane_of = lane_of
    names = ["step_image", "step_image", "step_joint", "step_text", "step_image"]
    tickets = [desk.submit(make_job(name, n)) for n, name in enumerate(names, 1)]
    assert desk.tick()[0] is tickets[2]
    desk.drain()
    assert [type(ticket.error) for ticket in tickets] == [type(None)] * 2 + [MemoryError] + [type(None)] * 2
    assert not any(lane.jobs for lane in desk.lanes.values())


@pytest.mark.parametrize("when", ["push", "pull"])
def test_a_device_that_does_not_answer_ends_its_lane_and_no_other(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies fail while a step is prepared, or while somebody leaves; the next to come find the lane empty."""
    desk = Desk(FakeEngine(apart=True))
    mine = [desk.submit(make_job("step_image", n, steps=5)) for n in (1, 2)]
    other = desk.submit(make_job("step_text", 3, steps=5))
    desk.tick()
    desk.tick()

    lane = desk.lanes["step_image", 0]
    buffers = [*lane.inputs.values(), *(buffer for pair in lane.pairs.values() for buffer in pair)]
    kind = type(buffers[0])
    works = getattr(kind, when)

    def breaks(buffer: Any) -> None:
        if buffer in buffers:
            raise EngineError("no answer")
        works(buffer)

    with monkeypatch.context() as broken:
        broken.setattr(kind, when, breaks)
        if when == "pull":
            assert desk.cancel(mine[0])
        else:
            assert desk.tick() == mine
    assert all(ticket.ended is not None for ticket in mine)
    assert lane.jobs == []
    job = make_job("step_image", 4, solver="dpmpp_2m")
    expected = alone(job)[0]
    late = desk.submit(job)
    assert set(desk.drain()) == {other, late}
    np.testing.assert_array_equal(job.state["base"], expected)


def test_close_takes_no_more_and_a_job_is_taken_once() -> None:
    desk = Desk()
    job = make_job("step_image", 1)
    desk.submit(job)
    with pytest.raises(InputError, match="runs once"):
        desk.submit(job)
    desk.scheduler.close(RuntimeError("enough"))
    assert not desk.scheduler.busy
    with pytest.raises(RuntimeError, match="enough"):
        desk.submit(make_job("step_image", 2))


def test_an_interrupted_step_leaves_the_lane_clean() -> None:
    """Control-C in a run, then another request on the same lane."""
    desk = Desk(FakeEngine((1, 2, 4, 8), apart=True))
    for n in (1, 2):
        desk.submit(make_job("step_text", n, seed=n, solver="dpmpp_3m"))
    desk.tick()

    def interrupt(graph: str, rows: Any) -> bool:
        raise KeyboardInterrupt

    desk.engine.fails = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        desk.tick()
    desk.scheduler.close(caught.value)
    desk.open()
    desk.engine.fails = None
    job = make_job("step_text", 3, solver="euler-maruyama")
    expected = alone(job)[0]
    [ticket] = [desk.submit(job)]
    assert desk.drain() == [ticket]
    np.testing.assert_array_equal(job.state["base"], expected)
    assert [owners for _, owners in desk.engine.log[1:]] == [[(3, n)] for n in range(4)]
    assert job.rows[3, 0, NUMBER] == 3
