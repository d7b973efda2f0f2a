"""A scheduler on real lanes and the engine of `fake_engine.py`, with a clock of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass

from mdm.runtime.lane import Job, Lane
from mdm.runtime.scheduler import Scheduler, Ticket

from .fake_engine import OWNER, FakeEngine


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A scheduler with lanes of `slots` on an engine."""

    def __init__(self, engine: FakeEngine | None = None, slots: int = 8, queue: int = 64, burst: int = 1) -> None:
        self.engine, self.slots, self.clock, self.burst = engine or FakeEngine(), slots, Clock(), burst
        self.lanes: dict[tuple[str, int], Lane] = {}
        self.open(queue)

    def open(self, queue: int = 64) -> None:
        """A new scheduler on the same lanes."""
        self.scheduler = Scheduler(self.lane, queue, self.clock, self.burst)
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
