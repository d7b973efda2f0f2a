"""`mdm bench BUNDLE`: what a task of a bundle costs, from opening the folder to the decoded result.

The task runs as `Pipeline.run` runs it, whole, with a watch on each stage; then one step is compared with its matrix
products alone and with the PyTorch reference (`compare.py`), as far as the packages for that are installed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.backend import Backend, Graph
from mdm.runtime.backends import backend_for
from mdm.runtime.bundle import open_bundle
from mdm.runtime.lane import Lanes
from mdm.runtime.model import Model, makes
from mdm.runtime.pipeline import Pipeline, requests_of
from mdm.runtime.request import Request
from mdm.runtime.scheduler import Scheduler
from mdm.tools.bench.clock import memory_peak, percentiles
from mdm.tools.bench.compare import aim_of, busy, compare, names_in, operators, said, teller
from mdm.tools.options import FILE, engine_options, json_option, print_json

if TYPE_CHECKING:
    from PIL import Image

Report = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Seconds of one run of a task, stage by stage."""

    encode: float  # checks, tokenizer, encoders, the sampler's table
    steps: list[float]  # the whole batch in each
    engine: float  # of all ticks, inside the engine
    decode: float


class Watched:
    """A backend that notes how long graphs take to load, and how long their bound runs keep the engine busy."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.bundle, self.name, self.chain = backend, backend.bundle, backend.name, backend.chain
        self.buffer, self.lacks = backend.buffer, backend.lacks
        self.loading: dict[str, float] = {}
        self.busy = 0.0

    def graph(self, name: str) -> Graph:
        start = time.perf_counter()
        graph = self.backend.graph(name)
        if "watched" not in vars(graph):
            self.loading[name] = time.perf_counter() - start
            self.watch(graph)
        return graph

    def watch(self, graph: Any) -> None:
        bind = graph.bind

        def watched(runs: Any, first: int, count: int) -> Callable[[], None]:
            run = bind(runs, first, count)

            def timed() -> None:
                start = time.perf_counter()
                run()
                self.busy += time.perf_counter() - start

            return timed

        graph.bind, graph.watched = watched, True


class Deployed:
    """A task of a bundle that is run as `Pipeline.run` does it, with a watch on each stage."""

    def __init__(
        self, bundle: Path, task: str | None, steps: int | None, batch: int, backend: str = "ort-cpu", **engine: Any
    ) -> None:
        start = time.perf_counter()
        opened = open_bundle(bundle)
        self.opening = time.perf_counter() - start
        self.backend = Watched(backend_for(opened, backend, **engine))
        self.pipeline = Pipeline(Model(opened, self.backend), batch)
        self.task = task or default_task(opened.manifest)
        self.requests = requests_for(self.model, self.task, steps, batch)
        self.lanes = Lanes(self.backend, batch)
        self.runs: list[Run] = []
        job = self.model.prepare(self.requests[0]).job
        sizes = self.backend.graph(job.graphs[0]).batches(job.tokens)
        if sizes and batch > sizes[-1]:
            raise InputError(
                f"--batch is {batch}, and the engine of '{job.graphs[0]}' takes {sizes[-1]} samples at most\n"
                "build one for more: mdm build BUNDLE --profile FILE"
            )

    @property
    def model(self) -> Model:
        return self.pipeline.model

    def turn(self) -> list[float]:
        """One run -> the seconds of its steps."""
        start = time.perf_counter()
        prepared = [self.model.prepare(request) for request in self.requests]
        encode = time.perf_counter() - start
        scheduler = Scheduler(self.lanes, queue=len(prepared), burst=sys.maxsize)
        tickets = [scheduler.submit(one.job) for one in prepared]
        steps: list[float] = []
        busy, job = self.backend.busy, prepared[0].job
        while scheduler.busy:
            start, before = time.perf_counter(), job.done
            ended = scheduler.tick()
            took = time.perf_counter() - start
            for ticket in ended:
                if ticket.error is not None:
                    raise ticket.error
            made = job.done - before
            steps += [took / made] * made  # of steps that were one run each has the same share
        busy = self.backend.busy - busy
        start = time.perf_counter()
        for one, ticket in zip(prepared, tickets, strict=True):
            self.pipeline.finish(one, ticket)
        self.runs.append(Run(encode, steps, busy, time.perf_counter() - start))
        return steps


def default_task(manifest: Mapping[str, Any]) -> str:
    """The first that makes a picture, or the first."""
    tasks: dict[str, Any] = manifest["tasks"]
    return next((name for name, task in tasks.items() if makes(task["image"])), next(iter(tasks)))


def requests_for(model: Model, task: str, steps: int | None, batch: int) -> list[Request]:
    """A batch for the task; prompts are empty and pictures black, for time does not depend on them."""
    given, fields = ("given", "both"), model.task(task)
    prompt = "" if fields["text"] in given else None
    picture = np.zeros((8, 8, 3), np.uint8) if fields["image"] in given else None
    return requests_of(task, batch, prompt=prompt, picture=picture, steps=steps)


# ------------------------------------------------------------------------------------------------------- the command


@click.command("BUNDLE")
@click.argument("bundle", type=FILE, metavar="")  # the command's own name says it
@click.option("--task", help="Default: the first that makes a picture.")
@click.option("--steps", type=int, help="Of a run. Default: the model's own.")
@click.option("--batch", type=int, default=1, show_default=True, help="Samples that share each step.")
@engine_options
@click.option("--seconds", type=float, default=10.0, show_default=True, help="Least time spent on the bundle's steps.")
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile, which can take many minutes.")
@click.option("--plot", type=FILE, help="Write a picture of the step's times, FILE.png.")
@json_option
def command(
    bundle: Path,
    task: str | None,
    steps: int | None,
    batch: int,
    backend: str,
    threads: int | None,
    memory: int | None,
    profile: str | None,
    seconds: float,
    no_compile: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time a bundle's task, stage by stage, and its step against PyTorch."""
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise InputError(f"--plot is '{plot}', expected a file name that ends in .png, in a folder that exists")
    say = teller(as_json)
    say("load and warm up")
    deployed = Deployed(bundle, task, steps, batch, backend, threads=threads, memory=memory, profile=profile)
    peak = memory_peak(deployed.turn)
    if peak is None:
        deployed.turn()
    report = facts(deployed) | {"memory_peak": peak} | compare(deployed, seconds, not no_compile, say)
    report |= stages(deployed.runs, batch)
    if plot is not None:
        draw(report).save(plot)
    if as_json:
        print_json(report)
        return
    for line in lines_of(report):
        click.echo(line)


def facts(deployed: Deployed) -> Report:
    return {
        "bundle": str(deployed.model.bundle.path), "task": deployed.task, "batch": len(deployed.requests),
        "backend": deployed.backend.name, "open": deployed.opening, "load": deployed.backend.loading,
    }  # fmt: skip


def stages(runs: Sequence[Run], batch: int) -> Report:
    """Percentiles of each stage, and how much that is a second."""
    steps = [seconds for run in runs for seconds in run.steps]
    seconds = {
        "encode": [run.encode for run in runs], "step": steps, "decode": [run.decode for run in runs],
        "whole run": [run.encode + sum(run.steps) + run.decode for run in runs],
    }  # fmt: skip
    return {
        "steps": len(runs[0].steps),
        "stages": {stage: percentiles(times) for stage, times in seconds.items()},
        "steps_per_second": 1 / statistics.median(steps),
        "results_per_second": batch / statistics.median(seconds["whole run"]),
    }


def lines_of(report: Report) -> Iterator[str]:
    names = names_in(report)
    where = report["backend"] + ("" if report["threads"] is None else f", threads {report['threads']}")
    yield f"{report['bundle']}, {report['task']}: {report['steps']} steps, batch {report['batch']}, {where}"
    loaded = ", ".join(f"{name} {seconds:.3f}" for name, seconds in report["load"].items())
    memory = (
        "" if report["memory_peak"] is None else f"; that and a first run take {report['memory_peak'] / 1e6:.0f} MB"
    )
    yield f"seconds to open the bundle {report['open']:.3f}, to load {loaded}{memory}"
    yield ""
    yield "seconds | p50 | p90 | p99"
    yield "---|---|---|---"
    for stage, times in report["stages"].items():
        yield " | ".join([stage, *(f"{seconds:.4g}" for seconds in times.values())])
    yield f"{report['steps_per_second']:.4g} steps a second, {report['results_per_second']:.4g} results a second"
    yield ""
    yield "a step | seconds, median | least | times"
    yield "---|---|---|---"
    for name, times in report["seconds"].items():
        yield f"{names[name]} | {times['p50']:.4g} | {times['least']:.4g} | {times['count']}"
    if report["compile_seconds"] is not None:
        yield f"torch.compile took {report['compile_seconds']:.0f} s"
    for name, reason in report["missing"].items():
        yield f"not measured, {names[name]}: {reason}"
    yield ""
    for name in report["ratios"]:
        yield f"{name.replace('_', ' ')}: {said(name, report['ratios'][name])} (aim: {aim_of(name)})"
    if warning := busy(report):
        yield warning
    if report["operators"]:
        yield f"the engine's time: {operators(report)}; matrix products together {report['product_share']:.1%}"


def draw(report: Report) -> Image.Image:
    """Bars: the seconds of a step by form, and the share of each operator in it."""
    from PIL import Image

    from mdm.tools.bench.plot import COLOURS, FAINT, FINE, INK, PAPER, Pen

    names = names_in(report)
    milliseconds = {names[name]: 1000 * times["p50"] for name, times in report["seconds"].items()}
    spent = {name: 100 * share for name, share in [*report["operators"].items()][:8]}
    parts = [("milliseconds a step, median", milliseconds, COLOURS[0]), ("% of the engine's time", spent, COLOURS[1])]
    width, row, left, top = 960, 26, 240, 56
    height = top + sum(len(bars) + 2 for _, bars, _ in parts) * row
    sheet = Image.new("RGB", (width * FINE, height * FINE), PAPER)
    pen = Pen(sheet)
    title = f"{Path(report['bundle']).name}, {report['task']}, batch {report['batch']}, {report['backend']}"
    pen.text(20, 28, title, 20, INK, "lm")
    y = top
    for words, bars, colour in parts:
        pen.text(20, y + row / 2, words, 14, FAINT, "lm")
        for name, value in bars.items():
            y += row
            end = left + (width - left - 100) * value / max(bars.values())
            pen.text(left - 10, y + row / 2, name, 14, INK, "rm")
            pen.line([(left, y + row / 2), (end, y + row / 2)], colour, row - 8)
            pen.text(end + 10, y + row / 2, f"{value:.4g}", 14, INK, "lm")
        y += 2 * row
    return sheet.resize((width, height), Image.Resampling.LANCZOS)
