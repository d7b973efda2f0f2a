"""`mdm bench soak BUNDLE`: what can only be shown where TensorRT's engines run.

1. Each task by its captured loop and without captures, in one go and step by step: the latents are equal to the bit.
2. The GPU's memory and this process's over many runs of one request, and over many changes of task and batch, after a
   first round of each: neither grows. The GPU's is that of all processes, so nothing else should use it meanwhile.

Exit code 1 if one of them does not hold.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from mdm.plugins.errors import ParityError
from mdm.plugins.machine import read
from mdm.runtime.backend import Array
from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.lane import Lanes
from mdm.runtime.model import Model
from mdm.runtime.request import Request
from mdm.runtime.scheduler import Scheduler
from mdm.runtime.tensorrt.backend import TensorRtBackend
from mdm.runtime.tensorrt.engine import Run
from mdm.tools.bench.bundle import requests_for
from mdm.tools.bench.compare import teller
from mdm.tools.options import FILE, json_option, print_json

STEPS = 5  # of a run, an odd number: the next one starts from the other buffers
CAPTURED = 3  # runs until one is captured: the first from either buffers, which go call by call, and that
REPLAYED = 6  # runs until loops from either were captured, and replayed
WAYS = {"in one go": (sys.maxsize, REPLAYED), "step by step": (1, 2)}  # steps in one go at most, and how many runs
SLACK = {"gpu": 0, "host": 16 * 2**20}  # bytes: Python's own allocations come and go
MOST_BATCHES = 4
COUNT = click.IntRange(1)

Memory = dict[str, int]  # bytes in use: "gpu"; "host" where the system says it
Report = dict[str, Any]


class Runs:
    """Requests of a bundle on its engines, in lanes that stay for the next ones, as a pipeline has them."""

    def __init__(self, bundle: Bundle, profile: str | None, captures: bool) -> None:
        self.backend = TensorRtBackend(bundle, profile=profile, captures=captures)
        self.model, self.lanes = Model(bundle, self.backend), Lanes(self.backend, 1)

    def latents(self, requests: Sequence[Request], burst: int = sys.maxsize) -> Array:
        prepared = [self.model.prepare(request) for request in requests]
        if self.lanes.slots != len(prepared):
            self.lanes = Lanes(self.backend, len(prepared))
        scheduler = Scheduler(self.lanes, queue=len(prepared), burst=burst)
        for one in prepared:
            scheduler.submit(one.job)
        while scheduler.busy:
            for ticket in scheduler.tick():
                if ticket.error is not None:
                    raise ticket.error
        return np.stack([one.job.state["base"] for one in prepared])

    def batches(self, task: str) -> Sequence[int]:
        """The least that its engine was built for."""
        job = self.model.prepare(self.requests(task, 1)[0]).job
        return self.backend.graph(job.graphs[0]).batches(job.tokens)[:MOST_BATCHES]

    def requests(self, task: str, batch: int) -> list[Request]:
        return requests_for(self.model, task, STEPS, batch)

    def uncaptured(self) -> Iterator[str]:
        """Why a loop of the lanes is none that the driver knows."""
        for lane in self.lanes.made.values():
            runs = [run for run in self.backend.graph(lane.name).bound[lane].values() if isinstance(run, Run)]
            whole = max(len(run.chain) for run in runs)
            for run in runs:
                if len(run.chain) == whole and run not in run.engine.captured:
                    yield run.engine.why_not or f"graph '{lane.name}' runs call by call, again and again"

    def memory(self) -> Memory:
        gc.collect()
        self.backend.gpu.sweep()
        pages = read("proc/self/statm").split()[1:2]
        host = {"host": int(pages[0]) * os.sysconf("SC_PAGE_SIZE")} if pages else {}
        return {"gpu": self.backend.gpu.memory_in_use(), **host}


def differences(plain: Runs, captured: Runs, task: str) -> Iterator[str]:
    """Where a captured loop is not what the same calls are one by one."""
    requests = captured.requests(task, captured.batches(task)[:2][-1])
    truth = plain.latents(requests, burst=1)
    for name, (burst, times) in WAYS.items():
        for number in range(times):
            for runs, how in ((plain, "not captured"), (captured, "captured")):
                off = differing(runs.latents(requests, burst), truth)
                if off:
                    yield f"{task}, {how}, {name}, time {number + 1}: {off} of {truth.size} latents differ"
    if why := next(captured.uncaptured(), ""):
        yield f"{task} is not captured: {why}"


def differing(found: Array, truth: Array) -> int:
    """How many numbers are not the same bits."""
    return int((found.view(np.uint8) != truth.view(np.uint8)).reshape(truth.size, -1).any(1).sum())


def growth(runs: Runs, turn: Callable[[int], object], first: int, times: int) -> Report:
    """Memory after `first` turns, and what `times` more have added to it."""
    for number in range(first):
        turn(number)
    before = runs.memory()
    for number in range(times):
        turn(number)
    after = runs.memory()
    return {"memory": after, "added": {name: size - before[name] for name, size in after.items()}}


def grown(report: Report) -> list[str]:
    added = report["added"].items()
    return [f"{name} memory grew by {size / 1e6:.1f} MB" for name, size in added if size > SLACK[name]]


@click.command("soak")
@click.argument("bundle", type=FILE)
@click.option("--runs", "many", type=COUNT, default=1000, show_default=True)
@click.option("--changes", type=COUNT, default=100, show_default=True, help="Of task and batch, at least so many.")
@click.option("--task", "tasks", multiple=True, help="Only this one; may be repeated. Default: all.")
@click.option("--profile", help="Of the engines. Default: the newest.")
@json_option
@click.pass_context
def command(
    context: click.Context, /, bundle: Path, many: int, changes: int, tasks: tuple[str, ...], profile: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Hold BUNDLE's engines to themselves: captured loops equal to the bit, and memory that does not grow."""
    say = teller(as_json)
    runs = Runs(open_bundle(bundle), profile, True)
    chosen = list(dict.fromkeys(tasks)) or list(runs.model.manifest["tasks"])
    for task in chosen:
        runs.model.task(task)  # an unknown one is told before anything is built up
    report = {"bundle": str(bundle), "tasks": chosen, "steps": STEPS} | soak(runs, chosen, many, changes, say)
    if as_json:
        print_json(report)
    else:
        for line in lines_of(report):
            click.echo(line)
    if report["wrong"]:
        context.exit(ParityError.exit_code)


def soak(runs: Runs, tasks: Sequence[str], many: int, changes: int, say: Callable[[str], None]) -> Report:
    say("captured against not captured")
    plain = Runs(runs.model.bundle, runs.backend.profile, False)
    wrong = [said for task in tasks for said in differences(plain, runs, task)]
    report: Report = {"equal": not wrong}
    del plain  # its engines' memory
    say(f"{many} runs of {tasks[0]}")
    requests = runs.requests(tasks[0], 1)
    first = max(REPLAYED, many // 20)
    report["runs"] = {"count": many} | growth(runs, lambda _: runs.latents(requests), first, many)
    shapes = [runs.requests(task, batch) for task in tasks for batch in runs.batches(task)]
    rounds = -(-changes // len(shapes))  # whole ones, so that what is in use at their ends is the same
    say(f"{rounds * len(shapes)} changes among {len(shapes)} shapes")

    def change(number: int) -> None:
        for _ in range(CAPTURED):
            runs.latents(shapes[number % len(shapes)])

    counts = {"count": rounds * len(shapes), "shapes": len(shapes)}
    report["changes"] = counts | growth(runs, change, 3 * len(shapes), rounds * len(shapes))
    for name in ("runs", "changes"):
        wrong += [f"{report[name]['count']} {name}: {what}" for what in grown(report[name])]
    return report | {"wrong": wrong}


def lines_of(report: Report) -> Iterator[str]:
    same = "equal to the bit" if report["equal"] else "differs"
    yield f"captured against not captured, {len(report['tasks'])} tasks, {report['steps']} steps: {same}"
    for name, what in (("runs", f"runs of {report['tasks'][0]}"), ("changes", "changes of task and batch")):
        of, kinds = report[name], {"gpu": "of the GPU", "host": "here"}
        used = ", ".join(
            f"{size / 1e6:.0f} MB {kinds[kind]} ({of['added'][kind] / 1e6:+.2f})" for kind, size in of["memory"].items()
        )
        yield f"{of['count']} {what}: {used}; {'; '.join(grown(of)) or 'it does not grow'}"
    yield from report["wrong"]
    yield "FAIL" if report["wrong"] else "PASS"
