"""A check as a whole: levels in order, what is added to the report, and what a failure leads to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError, InputError, ParityError
from mdm.runtime.bundle import open_bundle
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend, OrtGraph
from mdm.tools.check import run as module
from mdm.tools.check.finding import LEVELS, Array, Finding, Verdict
from mdm.tools.check.report import PicturePair, Report, TextPair
from mdm.tools.check.run import Check, Item, add, chosen_tasks, new_report
from mdm.tools.check.standards.golden import GoldenStandard
from mdm.tools.check.standards.standard import Case, Run

from .deployed import Exported, spoil_manifest

Find = Callable[[str], Exported]


@dataclass
class Placed:
    """A `place` that only takes note."""

    asked: list[str] = field(default_factory=list)

    def __call__(self, graph: str) -> Iterator[Item]:
        self.asked.append(graph)
        yield Finding("blocks", graph, "nodes", "", Verdict.PASS)


def checked(check: Check, *levels: str) -> Report:
    report = new_report(check, "mdm check x")
    check.run(report, levels, lambda level, done, total: None)
    return report


def test_levels_run_in_order_and_tell_of_their_progress(exported: Find) -> None:
    one, told = exported("dim"), list[tuple[str, int, int]]()
    check = Check(one.model, one.reference, ["class_to_image"], place=Placed())
    report = new_report(check, "mdm check dim.bundle")
    check.run(report, LEVELS[::-1], lambda *words: told.append(words))
    levels = [level for level, *_ in told]
    assert list(dict.fromkeys(levels)) == list(LEVELS)
    assert list(report.seconds) == list(LEVELS)
    for level in LEVELS:
        counts = [(done, total) for name, done, total in told if name == level]
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1] > 0
        assert report.of_level(level)
    assert report.verdict is Verdict.PASS
    assert (report.bundle, report.backend, report.against) == ("dim", "ort-cpu", "reference")
    assert report.multiples == {"rms": 4.0, "worst": 16.0}
    assert report.created.endswith("Z")
    assert (len(report.drifts), len(report.pictures)) == (1, 2)


def test_blocks_are_those_of_the_tasks_graphs(exported: Find) -> None:
    one = exported("mdm")
    place = Placed()
    checked(Check(one.model, one.reference, ["joint", "caption"], place=place), "blocks")
    halves = {"encode_image", "encode_text", "decode_image", "decode_text"}
    assert set(place.asked) == {"step_joint_guided", "step_joint"} | halves
    assert len(place.asked) == 6
    report = checked(Check(one.model, one.golden, ["joint"], why_not="there is no model"), "blocks")
    assert [(f.verdict, f.said) for f in report.findings] == [(Verdict.SKIPPED, "there is no model")]
    assert report.verdict is Verdict.SKIPPED


def test_what_failed_is_bisected_once_and_not_endlessly(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: OrtGraph, wanted: list[str], **inputs: Array) -> list[Array]:
        raise EngineError("no memory")

    monkeypatch.setattr(OrtGraph, "run", fail)
    one, place = exported("mdm"), Placed()
    report = checked(Check(one.model, one.golden, ["joint"], place=place), "steps")
    graphs = list(one.model.manifest["graphs"])
    assert {f.subject for f in report.of_level("steps") if f.verdict is Verdict.FAIL} == set(graphs)
    assert place.asked == graphs[: module.MOST_PLACED]
    again = Placed()
    checked(Check(one.model, one.golden, ["joint"], place=again), "blocks", "steps")
    assert len(again.asked) == len(set(again.asked))


@dataclass
class Broken:
    """A standard whose engine fails, of which a graph and a task are sound."""

    error: Exception
    name: str = "broken"
    precision: str = "fp32"

    def cases(self, graph: str) -> Iterator[Case]:
        if graph != "encode_text":
            raise self.error
        yield from ()

    def runs(self, task: str) -> Iterator[Run]:
        if task != "joint":
            raise self.error
        yield from ()


@pytest.mark.parametrize("kind", [EngineError, ParityError])
def test_a_standard_that_fails_is_a_finding_and_the_rest_goes_on(exported: Find, kind: type[Exception]) -> None:
    model = exported("mdm").model
    report = checked(Check(model, Broken(kind("no\nmemory")), ["turn", "joint"]), "steps", "trajectories", "decoded")
    failed = {(f.level, f.subject): f.said for f in report.findings if f.verdict is Verdict.FAIL}
    assert set(failed.values()) == {"no; memory"}
    assert failed.keys() == {("steps", graph) for graph in model.manifest["graphs"] if graph != "encode_text"} | {
        ("trajectories", "turn")
    }
    skipped = {(f.level, f.subject): f.said for f in report.findings if f.verdict is Verdict.SKIPPED}
    assert skipped == {
        ("steps", "encode_text"): "broken has nothing for this graph",
        ("trajectories", "joint"): "broken has no run of this task",
        ("decoded", "joint"): "broken has no run of this task",
    }


def test_a_standard_that_is_none_ends_the_check(exported: Find) -> None:
    """A damaged golden file says nothing of the deployment."""
    with pytest.raises(InputError, match="damaged"):
        checked(Check(exported("mdm").model, Broken(InputError("damaged")), ["turn"]), "steps")


def test_a_report_does_not_grow_with_the_seeds(exported: Find) -> None:
    report, pixels = Report("b", "ort-cpu", "golden"), np.zeros((2, 2, 3), np.uint8)
    for seed in range(100):
        add(report, PicturePair("t", seed, pixels, pixels, 99.0, 1.0))
        add(report, TextPair("t", seed, "a", "a", 1.0))
        add(report, Finding("steps", "g", "x", f"seed {seed}", Verdict.PASS))
    assert (len(report.pictures), len(report.texts), len(report.findings)) == (64, 64, 100)


def test_tasks(exported: Find) -> None:
    model = exported("mdm").model
    assert chosen_tasks(model, []) == list(model.manifest["tasks"])
    assert chosen_tasks(model, ["turn", "joint"]) == ["joint", "turn"]
    with pytest.raises(InputError, match="no task 'joing'; did you mean 'joint'"):
        chosen_tasks(model, ["joing"])


@pytest.mark.parametrize(
    ("key", "value"), [("step", "denoise_joint"), ("step", "step_text"), ("text", ""), ("image", "both")]
)
def test_a_manifest_that_names_the_wrong_graph_for_a_task(exported: Find, tmp_path: Path, key: str, value: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tasks"]["joint"][key] = value

    bundle = open_bundle(spoil_manifest(exported("mdm").bundle, tmp_path / "b", change))
    model = Model(bundle, OrtBackend(bundle, threads=1))
    with pytest.raises(InputError, match="is no step graph of task 'joint'") as refused:
        Check(model, GoldenStandard(model), ["joint"])
    assert len(str(refused.value).splitlines()) == 2


def test_every_standard_has_what_a_check_asks_for(exported: Find) -> None:
    standards: list[Any] = [exported("mdm").reference, exported("mdm").golden]
    for standard in standards:
        report = checked(Check(exported("mdm").model, standard, ["complete"]), "steps", "trajectories", "decoded")
        assert report.verdict is Verdict.PASS
        assert report.against == standard.name
