"""Whose turn it is, and how requests end, on the engine of `fake_engine.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.lane import Lane
from mdm.runtime.scheduler import DeadlineError, QueueFullError, Ticket

from .fake_desk import Desk
from .fake_engine import NUMBER, FakeEngine, alone, make_job

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


def test_a_burst_is_one_turn() -> None:
    """A lane goes on alone until somebody is done or is on his way to another; one that is looked into goes step by
    step; the next lane then has its turn. Results are the same."""
    desk, seen = Desk(FakeEngine(chain=99), burst=10), []
    jobs = [
        make_job("step_image", 1, steps=7), make_job("step_image", 2, steps=12),
        make_job("step_text", 3, steps=4), make_job(["step_joint"] * 4, 4, steps=30),
    ]  # fmt: skip
    expected = [alone(job)[0] for job in jobs]
    watch = lambda ticket: seen.append(ticket.job.done)  # noqa: E731
    tickets = [desk.submit(job, on_step=watch if job is jobs[2] else None) for job in jobs]
    turns = []
    while desk.scheduler.busy:
        desk.tick()
        turns.append([job.done for job in jobs])
    assert turns[:6] == [[7, 7, 0, 0], [7, 7, 1, 0], [7, 7, 1, 10], [7, 12, 1, 10], [7, 12, 2, 10], [7, 12, 2, 20]]
    assert seen == [1, 2, 3, 4]
    for ticket, result in zip(tickets, expected, strict=True):
        np.testing.assert_array_equal(ticket.job.state["base"], result)


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
