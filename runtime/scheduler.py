"""The step-level scheduler: requests join and leave the running lanes between steps.

`tick` is one lane's turn: one step, or several in one go where that is allowed (`burst`). Lanes take turns, the one
that has waited longest first, so every running request gets steps at the same rate. Who waits joins in order of arrival
as soon as its own lane has a free slot. A request ends exactly once: done, failed, cancelled or expired; only `tick`,
`cancel` and `close` end any.

It does not lock: one thread owns it. Time comes from `clock`, which tests replace.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mdm.plugins.errors import InputError, MdmError
from mdm.runtime.lane import Job, Lane


class QueueFullError(MdmError):
    """More requests wait than the queue takes; later there may be room."""

    exit_code = 3


class CancelledError(MdmError):
    """The caller took the request back."""

    exit_code = 3


class DeadlineError(MdmError):
    """The request's time was over before its last step."""

    exit_code = 3


@dataclass(eq=False)
class Ticket:
    """A request that was taken in, and what became of it."""

    job: Job
    deadline: float | None  # on the scheduler's clock
    on_step: Callable[[Ticket], None] | None  # told after each step, when job.x0 is new
    submitted: float
    started: float | None = None
    ended: float | None = None
    error: BaseException | None = None  # why it ended before its time
    lane: Lane | None = field(default=None, repr=False)


class Scheduler:
    def __init__(
        self,
        lane_of: Callable[[str, int], Lane],
        queue: int = 64,
        clock: Callable[[], float] = time.monotonic,
        burst: int = 1,
    ) -> None:
        """`lane_of(graph, tokens)` is the lane for such jobs, always the same one; `queue`: how many may wait; `burst`:
        steps that a lane nobody looks into may run in one go, in which nobody joins, is cancelled or expires."""
        self.lane_of, self.queue, self.clock, self.burst = lane_of, queue, clock, burst
        self.closed: BaseException | None = None
        self.waiting: deque[Ticket] = deque()
        self.running: OrderedDict[Lane, dict[Job, Ticket]] = OrderedDict()  # lanes with jobs, whose turn it is first

    def submit(
        self, job: Job, deadline: float | None = None, on_step: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        if self.closed is not None:
            raise self.closed
        if job.taken:
            raise InputError("this request was submitted before, and runs once: prepare it again")
        waiting = sum(ticket.started is None for ticket in self.waiting)  # the others are on their way between lanes
        if waiting >= self.queue:
            raise QueueFullError(f"{waiting} requests wait already, as many as the queue takes: try later")
        job.taken = True
        ticket = Ticket(job, deadline, on_step, self.clock())
        self.waiting.append(ticket)
        return ticket

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def cancel(self, ticket: Ticket) -> bool:
        """Take a request back -> whether it had not ended yet."""
        return self.end(ticket, CancelledError("the request was cancelled"))

    def close(self, error: BaseException) -> None:
        """End all requests with this error, and take no more."""
        self.closed = error
        for ticket in self.tickets():
            self.end(ticket, error)

    def tickets(self) -> list[Ticket]:
        """All that have not ended."""
        return [*self.waiting, *(ticket for mine in self.running.values() for ticket in mine.values())]

    def tick(self) -> list[Ticket]:
        """One turn of one lane -> the requests that ended."""
        ended = self.expire() + self.admit()
        if not self.running:
            return ended
        lane = next(iter(self.running))
        mine = dict(self.running[lane])
        try:
            watched = [job for job, ticket in mine.items() if ticket.on_step]
            failed = lane.step(watched, 1 if watched else self.burst)
        except Exception as accident:  # not a graph's failure, but the engine's or ours: nobody here can go on
            return ended + self.abandon(lane, accident)
        self.running.move_to_end(lane)
        for job, ticket in mine.items():
            if ticket.ended is not None:  # a callback of this very loop cancelled it
                continue
            error: BaseException | None = failed.get(job)
            if error is None and ticket.on_step:
                error = call_back(ticket)
            if ticket.ended is not None:
                continue
            if error is not None or job.finished:
                self.end(ticket, error)
                ended.append(ticket)
            elif job.lane != (lane.name, lane.tokens):
                self.vacate(ticket)
                # It is on its way: it goes before those that have not begun, after those on theirs.
                self.waiting.insert(sum(other.started is not None for other in self.waiting), ticket)
        return ended

    def expire(self) -> list[Ticket]:
        now, ended = self.clock(), []
        for ticket in self.tickets():
            if ticket.deadline is not None and now >= ticket.deadline:
                late = now - ticket.submitted
                place = f"step {ticket.job.done} of {len(ticket.job.rows)}"
                self.end(ticket, DeadlineError(f"the request's deadline passed after {late:.3g} s, at {place}"))
                ended.append(ticket)
        return ended

    def admit(self) -> list[Ticket]:
        """Let those who wait join, in order, each into its own lane -> the requests whose lane cannot be had."""
        ended, full = [], set()
        for ticket in list(self.waiting):
            wanted = ticket.job.lane
            if wanted in full:
                continue
            try:
                lane = self.lane_of(*wanted)
                if len(lane.jobs) >= lane.slots:
                    full.add(wanted)
                    continue
                lane.join(ticket.job)
            except Exception as error:  # a graph that cannot be loaded, no memory for the lane
                self.end(ticket, error)
                ended.append(ticket)
                continue
            self.waiting.remove(ticket)
            ticket.lane = lane
            ticket.started = ticket.started if ticket.started is not None else self.clock()
            self.running.setdefault(lane, {})[ticket.job] = ticket
        return ended

    def vacate(self, ticket: Ticket) -> None:
        """Out of its lane; a lane without jobs is no longer one of the running."""
        lane = ticket.lane
        assert lane is not None
        lane.leave(ticket.job)
        del self.running[lane][ticket.job]
        if not self.running[lane]:
            del self.running[lane]
        ticket.lane = None

    def end(self, ticket: Ticket, error: BaseException | None = None) -> bool:
        """End a request, wherever it is -> False if it had ended before."""
        if ticket.ended is not None:
            return False
        if ticket.lane is not None:
            try:
                self.vacate(ticket)
            except Exception as accident:  # the device does not answer
                self.abandon(ticket.lane, error or accident)
                return True
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
        ticket.error, ticket.ended = error, self.clock()
        return True

    def abandon(self, lane: Lane, error: BaseException) -> list[Ticket]:
        """End everybody in a lane whose state is lost; the lane begins anew."""
        tickets = [*self.running.pop(lane).values()]
        lane.clear()
        for ticket in tickets:
            ticket.lane, ticket.error, ticket.ended = None, error, self.clock()
        return tickets


def call_back(ticket: Ticket) -> Exception | None:
    """What goes wrong there ends this request alone."""
    assert ticket.on_step is not None
    try:
        ticket.on_step(ticket)
    except Exception as error:
        return error
    return None
