"""Runs many requests a few at a time, so that what is finished is on disk before the next ones begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mdm.runtime import Pipeline, Request, Result
from mdm.runtime.model import makes
from mdm.tools.preview import Watcher, in_one_line
from mdm.tools.requests_file import Asked
from mdm.tools.result_files import ResultFiles, record_of
from mdm.tools.sheet import Cell, draw_sheet, image_of, rows_of

CHUNK = 64  # samples: many enough to keep all slots busy, few enough to hold their pictures in memory


@dataclass(frozen=True)
class Outcome:
    """What there is to tell of a sample, or of a sheet of several, which has no record."""

    path: Path | None  # of its file
    said: str
    record: dict[str, Any] | None = None


def run_requests(
    pipeline: Pipeline, asked: Sequence[tuple[Asked, Request]], batch: int, files: ResultFiles | None, watcher: Watcher
) -> Iterator[list[Outcome]]:
    """`batch` samples of each request, whose outcomes come out in the order of the requests."""
    samples = (
        (one, replace(request, sample=request.sample + further)) for one, request in asked for further in range(batch)
    )
    size = CHUNK // batch * batch or CHUNK  # a prompt's samples stay together on a sheet, if they are not too many
    number = 0
    while chunk := list(islice(samples, size)):
        names = [files.reserve() if files else f"{number + index:04}" for index in range(len(chunk))]
        number += len(chunk)
        watcher.begin(names)
        prepared = []
        for one, request in chunk:
            with one.blamed():
                prepared.append(pipeline.model.prepare(request))
        results: dict[int, Result] = {}
        finished: dict[int, list[Outcome]] = {}
        outcomes: list[Outcome] = []
        cells: list[Cell] = []
        noted = 0
        for index, result in pipeline.stream(prepared, watcher):
            results[index] = result
            finished[index] = list(finish(pipeline, names[index], result, index, files, watcher))
            while noted in finished:  # files are written at once, but told of in order
                shown, outcome = results[noted].picture, finished[noted][0]
                if files is not None and outcome.record is not None:
                    files.note(outcome.record)
                if shown is not None:
                    cells.append((shown, f"{names[noted]}  {sheet_text(results, noted, batch)}".rstrip()))
                outcomes += finished[noted]
                noted += 1
        if files and len(cells) > 1:
            path = files.save_picture(f"{names[0]}-{names[-1]}-grid", draw_sheet(rows_of(cells, batch)))
            outcomes.append(Outcome(path, f"{len(cells)} pictures"))
        yield outcomes


def finish(
    pipeline: Pipeline, name: str, result: Result, index: int, files: ResultFiles | None, watcher: Watcher
) -> Iterator[Outcome]:
    """Write a result's files."""
    record, path = record_of(result, pipeline.model.manifest), None
    if files is not None and result.picture is not None:
        path = files.save_picture(name, image_of(result.picture), record)
    elif files is not None and makes(pipeline.model.task(result.request.task)["image"]):
        path = files.save_latents(name, result.latents)
    if path is not None:
        record["file"], name = path.name, path.stem
    if watcher.drafts[index]:
        record["drafts"] = watcher.drafts[index]
    yield Outcome(path, in_one_line(said_of(result)), record)
    if files is not None and watcher.filmstrip and result.picture is not None:
        strip = files.save_picture(f"{name}-filmstrip", draw_sheet([watcher.strip(index, result)]))
        yield Outcome(strip, f"{result.evaluations} evaluations")


def sheet_text(results: Mapping[int, Result], index: int, batch: int) -> str:
    """What a picture's name is followed by; what all samples of a request were made from stands once."""
    said = said_of(results[index])
    before = said_of(results[index - 1]) if index and batch > 1 else None
    return "" if results[index].text is None and said == before else said


def said_of(result: Result) -> str:
    """The new text, else what was asked for."""
    if result.text is not None:
        return result.text
    label = result.request.label
    return result.request.prompt or ("" if label is None else f"class {label}")
