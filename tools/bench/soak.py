"""`mdm bench soak BUNDLE`: what can only be shown where TensorRT's engines run.

1. Each task by its captured loop and without captures, step by step and in one go: the latents are equal to the bit.
2. The GPU's memory and this process's over many runs of one request, and over many changes of task and batch, after a
   first round of each: neither grows.

Exit code 1 if one of them does not hold.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np

from mdm.plugins.errors import ParityError
from mdm.plugins.machine import read
from mdm.runtime.backend import Array
from mdm.runtime.bundle import open_bundle
from mdm.runtime.lane import Lanes
from mdm.runtime.model import Model
from mdm.runtime.request import Request
from mdm.runtime.scheduler import Scheduler
from mdm.runtime.tensorrt.backend import TensorRtBackend
from mdm.tools.bench.bundle import requests_for
from mdm.tools.options import FILE

STEPS = 5  # of a run, an odd number: the next one starts from the other buffers
SLACK = {"gpu": 0, "host": 16 * 2**20}  # bytes: Python's own allocations come and go
BATCHES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Memory:
    """Bytes in use."""

    gpu: int
    host: int


class Runs:
    """Requests of a bundle on its engines."""

    def __init__(self, bundle: Path, profile: str | None, captures: bool) -> None:
        self.backend = TensorRtBackend(open_bundle(bundle), profile=profile, captures=captures)
        self.model = Model(self.backend.bundle, self.backend)

    def latents(self, requests: Sequence[Request], burst: int = sys.maxsize) -> Array:
        prepared = [self.model.prepare(request) for request in requests]
        scheduler = Scheduler(Lanes(self.backend, len(prepared)), queue=len(prepared), burst=burst)
        for one in prepared:
            scheduler.submit(one.job)
        while scheduler.busy:
            for ticket in scheduler.tick():
                if ticket.error is not None:
                    raise ticket.error
        return np.stack([one.job.state["base"] for one in prepared])

    def requests(self, task: str, batch: int = 1) -> list[Request]:
        return requests_for(self.model, task, STEPS, batch)

    def memory(self) -> Memory:
        gc.collect()
        self.backend.gpu.sweep()
        resident = int(read("proc/self/statm").split()[1]) * 4096
        return Memory(self.backend.gpu.memory_in_use(), resident)


def differences(bundle: Path, profile: str | None, tasks: Sequence[str]) -> Iterator[str]:
    """Where a captured loop is not what the same calls are one by one."""
    captured, plain = Runs(bundle, profile, True), Runs(bundle, profile, False)
    for task in tasks:
        requests = captured.requests(task, BATCHES[1] if BATCHES[1] in sizes_of(captured, task) else 1)
        truth = plain.latents(requests, burst=1)
        ways = {
            "in one go, not captured": partial(plain.latents, requests),
            "in one go, for the first time": partial(captured.latents, requests),
            "captured": partial(captured.latents, requests),
            "replayed": partial(captured.latents, requests),
            "step by step, captured from the second on": partial(captured.latents, requests, burst=1),
        }
        for name, run in ways.items():
            off = int((run() != truth).sum())
            if off:
                yield f"{task}, {name}: {off} of {truth.size} latents differ"
        if why := captured.backend.shelf(graph_of(captured, task)).engine.why_not:
            yield f"{task}: not captured at all: {why}"


def graph_of(runs: Runs, task: str) -> str:
    return runs.model.prepare(runs.requests(task)[0]).job.graphs[0]


def growth(runs: Runs, turn: Callable[[int], object], first: int, times: int) -> tuple[Memory, list[str]]:
    """Memory after `first` turns, and what `times` more have added to it."""
    for number in range(first):
        turn(number)
    before = runs.memory()
    for number in range(times):
        turn(number)
    after = runs.memory()
    added = {"gpu": after.gpu - before.gpu, "host": after.host - before.host}
    return after, [f"{name} memory grew by {size / 1e6:.1f} MB" for name, size in added.items() if size > SLACK[name]]


@click.command("soak")
@click.argument("bundle", type=FILE)
@click.option("--runs", "many", type=int, default=1000, show_default=True)
@click.option("--changes", type=int, default=100, show_default=True, help="Of task and batch.")
@click.option("--task", "tasks", multiple=True, help="Only this one; may be repeated. Default: all.")
@click.option("--profile", help="Of the engines. Default: the newest.")
def command(bundle: Path, many: int, changes: int, tasks: tuple[str, ...], profile: str | None) -> None:
    """Hold BUNDLE's engines to themselves: captured loops equal to the bit, and memory that does not grow."""
    runs = Runs(bundle, profile, True)
    chosen = list(tasks) or list(runs.model.manifest["tasks"])
    wrong = list(differences(bundle, profile, chosen))
    click.echo(
        f"captured against uncaptured, {len(chosen)} tasks, {STEPS} steps: {'differs' if wrong else 'equal to the bit'}"
    )
    requests = runs.requests(chosen[0])
    after, grown = growth(runs, lambda number: runs.latents(requests), max(3, many // 20), many)
    click.echo(f"{many} runs of {chosen[0]}: {told(after, grown)}")
    wrong += [f"{many} runs: {what}" for what in grown]
    shapes = [runs.requests(task, batch) for task in chosen for batch in BATCHES if batch in sizes_of(runs, task)]
    after, grown = growth(runs, lambda number: runs.latents(shapes[number % len(shapes)]), 3 * len(shapes), changes)
    click.echo(f"{changes} changes among {len(shapes)} shapes: {told(after, grown)}")
    wrong += [f"{changes} changes of shape: {what}" for what in grown]
    if wrong:
        raise ParityError("\n".join(wrong[:3]))


def sizes_of(runs: Runs, task: str) -> Sequence[int]:
    return runs.backend.graph(graph_of(runs, task)).batches


def told(after: Memory, grown: Sequence[str]) -> str:
    return f"{after.gpu / 1e6:.0f} MB of the GPU, {after.host / 1e6:.0f} MB here; {'; '.join(grown) or 'no growth'}"
