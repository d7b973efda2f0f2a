"""One run of a check: the levels in order, each adding to the report. The command builds a `Check`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mdm.plugins.errors import EngineError, InputError, ParityError, in_one_line
from mdm.runtime.model import Model, modalities_of, pictures_of
from mdm.runtime.words import nearest
from mdm.tools.check.finding import LEVELS, OF_RUNS, Finding, Verdict
from mdm.tools.check.fingerprint import fingerprint
from mdm.tools.check.levels.decoded import check_decoded
from mdm.tools.check.levels.files import check_files
from mdm.tools.check.levels.operators import check_operators
from mdm.tools.check.levels.steps import check_graph
from mdm.tools.check.levels.trajectories import check_run
from mdm.tools.check.limits import Multiples
from mdm.tools.check.report import BlockErrors, Divergence, Drift, PicturePair, Report, TextPair
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.standard import Run, Standard
from mdm.tools.check.standards.walk import OnBackend

Item = Finding | Drift | BlockErrors | Divergence | PicturePair | TextPair
Progress = Callable[[str, int, int], None]  # level, units of it done, units in all

MOST_PLACED = 3  # graphs that failed are bisected; more of them rarely say more
MOST_PAIRS = 64  # pictures, and texts, that a report keeps


@dataclass
class Check:
    """`place` bisects a graph against the model, `facts` compares the manifest; None where there is no model."""

    model: Model
    standard: Standard
    tasks: Sequence[str]
    seeds: Sequence[int] = (0,)
    multiples: Multiples = field(default_factory=Multiples)
    place: Callable[[str], Iterator[Item]] | None = None
    facts: Callable[[], Iterator[Finding]] | None = None
    why_not: str = ""  # there is no `place`

    def __post_init__(self) -> None:
        for task in self.tasks:
            require_step(self.model, task)
        self.backend, self.engine = self.model.backend, OnBackend(self.model.backend)
        self.placed: set[str] = set()

    def run(self, report: Report, levels: Sequence[str], progress: Progress) -> None:
        for level in (level for level in LEVELS if level in levels and level not in OF_RUNS):
            began, (units, work) = time.perf_counter(), self.units(level)
            for done, unit in enumerate(units):
                progress(level, done, len(units))
                with as_finding(report, level, unit):
                    for item in work(unit):
                        add(report, item)
            progress(level, len(units), len(units))
            report.seconds[level] = time.perf_counter() - began
        if wanted := [level for level in OF_RUNS if level in levels]:
            self.run_tasks(report, wanted, progress)
        self.place_failures(report)

    def units(self, level: str) -> tuple[Sequence[str], Callable[[str], Iterator[Item]]]:
        """What a level goes through, and what it does with each."""
        if level == "files":
            return [""], self.files
        if level == "operators":
            return [""], lambda _: check_operators(self.backend, self.multiples, self.seeds)
        if level == "blocks":
            return (self.graphs_of_tasks(), self.place_one) if self.place else ([""], self.no_blocks)
        return list(self.model.manifest["graphs"]), self.steps

    def files(self, _: str) -> Iterator[Item]:
        yield from check_files(self.model.bundle, self.backend)
        if self.facts is not None:
            yield from self.facts()

    def run_tasks(self, report: Report, levels: Sequence[str], progress: Progress) -> None:
        """The levels that look at whole runs, run by run: no two of them are in memory at once."""
        for done, task in enumerate(self.tasks):
            began, ran = time.perf_counter(), False
            with as_finding(report, levels[0], task):
                for run in self.standard.runs(task):
                    ran = True
                    for level in levels:
                        progress(level, done, len(self.tasks))
                        for item in self.of_run(level, run):
                            add(report, item)
                        now = time.perf_counter()
                        report.seconds[level], began = report.seconds.get(level, 0.0) + now - began, now
                for level in levels if not ran else ():
                    said = f"{self.standard.name} has no run of this task"
                    add(report, Finding(level, task, "", "", Verdict.SKIPPED, said))
        for level in levels:
            progress(level, len(self.tasks), len(self.tasks))

    def of_run(self, level: str, run: Run) -> Iterator[Item]:
        if level == "decoded":
            return check_decoded(self.model, run, self.engine, self.standard.precision, self.multiples)
        spread = Spread(self.model, run.graph, run.states[0]["base"].shape[1])
        return check_run(run, self.engine, spread, self.standard.precision, self.multiples)

    def graphs_of_tasks(self) -> list[str]:
        """Those that the tasks run by default, and the halves of the autoencoder: together they hold every weight."""
        graphs = self.model.manifest["graphs"]
        steps = [self.model.task(task)["step"] for task in self.tasks]
        halves = [name for name, graph in graphs.items() if graph["role"] in ("encode", "decode")]
        return list(dict.fromkeys([*steps, *halves]))

    def place_one(self, graph: str) -> Iterator[Item]:
        assert self.place is not None
        self.placed.add(graph)
        yield from self.place(graph)

    def no_blocks(self, _: str) -> Iterator[Item]:
        yield Finding("blocks", "", "", "", Verdict.SKIPPED, self.why_not)

    def steps(self, graph: str) -> Iterator[Item]:
        yield from check_graph(self.standard, self.model, graph, self.multiples)

    def place_failures(self, report: Report) -> None:
        """Bisect what failed on the way, where it was not done."""
        failed = dict.fromkeys(f.subject for f in report.of_level("steps") if f.verdict is Verdict.FAIL)
        left = MOST_PLACED - len(report.divergences)
        for graph in [name for name in failed if name not in self.placed][: max(0, left)]:
            for item in self.place_one(graph) if self.place else ():
                add(report, item)


@contextmanager
def as_finding(report: Report, level: str, unit: str) -> Iterator[None]:
    """The standard's own engine fails, or a sampler is not the model's: the check goes on without this unit."""
    try:
        yield
    except (EngineError, ParityError) as error:
        add(report, Finding(level, unit, "", "", Verdict.FAIL, in_one_line(error)))


def add(report: Report, item: Item) -> None:
    match item:
        case Finding():
            report.findings.append(item)
        case Drift():
            report.drifts.append(item)
        case BlockErrors():
            report.blocks.append(item)
        case Divergence():
            report.divergences.append(item)
        case PicturePair() if len(report.pictures) < MOST_PAIRS:
            report.pictures.append(item)
        case TextPair() if len(report.texts) < MOST_PAIRS:
            report.texts.append(item)


def new_report(check: Check, command: str) -> Report:
    return Report(
        bundle=check.model.manifest["name"], backend=check.model.backend.name, against=check.standard.name,
        fingerprint=fingerprint(check.model),
        multiples={"rms": check.multiples.rms, "worst": check.multiples.worst},
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), command=command,
    )  # fmt: skip


def require_step(model: Model, name: str) -> None:
    """The runtime looks for a task's graph by what it is made for; here it goes by the name in the manifest."""
    task = model.task(name)
    graph = model.bundle.graph(task["step"])
    fits = graph["modalities"] == modalities_of(task) and graph["pictures"] == pictures_of(task)
    if graph["role"] != "step" or not fits:
        raise InputError(
            f"the manifest of bundle '{model.bundle.path}' is not sound: '{task['step']}' is no step graph of task "
            f"'{name}'\nexport the checkpoint again"
        )


def chosen_tasks(model: Model, asked: Sequence[str]) -> list[str]:
    known = list(model.manifest["tasks"])
    for task in asked:
        if task not in known:
            raise InputError(f"this model has no task '{task}'{nearest(task, known)}\ntasks: {', '.join(known)}")
    return [task for task in known if task in asked or not asked]
