"""What is seen of samples before they are done: a bar, drafts, and the frames of a filmstrip.

A draft is the result as the network estimates it at that point: vague at first, then ever more definite.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from mdm.runtime import Result, Step
from mdm.runtime.model import Model
from mdm.tools.result_files import ResultFiles
from mdm.tools.sheet import Cell, image_of

FRAMES = 10  # of a filmstrip, besides the result


class Watcher:
    """The callback of a command's runs."""

    def __init__(
        self, model: Model, bar: Progress, verb: str, count: int, files: ResultFiles | None, every: int | None,
        filmstrip: bool,
    ) -> None:  # fmt: skip
        """`count` samples in all; a draft after `every` so many evaluations, or none."""
        self.model, self.bar, self.files, self.every, self.filmstrip = model, bar, files, every, filmstrip
        self.task = bar.add_task(verb, total=None, note="loading")
        self.begun = time.monotonic()
        self.done, self.planned, self.waiting = 0, 0, count
        self.begin(())

    def begin(self, names: Sequence[str]) -> None:
        """The next run, of samples with these names."""
        self.names = names
        self.drafts: list[list[dict[str, Any]]] = [[] for _ in names]
        self.frames: list[list[Step]] = [[] for _ in names]

    def __call__(self, step: Step) -> None:
        self.count(step)
        if self.every and step.done % self.every == 0 and step.done < step.of:
            self.draft(step)
        if self.filmstrip and step.done in frames_of(step.of):
            self.frames[step.index].append(step)

    def count(self, step: Step) -> None:
        """Samples that have not begun are taken to need as many evaluations as this one."""
        self.done += 1
        if step.done == 1:
            self.planned += step.of
            self.waiting -= 1
        speed = self.done / max(time.monotonic() - self.begun, 1e-9)
        total = self.planned + self.waiting * step.of
        self.bar.update(self.task, completed=self.done, total=total, note=f"{speed:.1f} steps/s")

    def draft(self, step: Step) -> None:
        name, at = self.names[step.index], f"step{step.done:0{max(2, len(str(step.of)))}}"
        pixels = self.model.pixels(step.prepared, step.x0)
        if pixels is not None and self.files is not None:
            self.files.save_picture(f"{name}-{at}", image_of(pixels))
        text = self.model.new_text(step.prepared, step.x0)
        if text is not None:
            self.drafts[step.index].append({"step": step.done, "text": text})
            self.bar.console.print(f"{name}-{at}  {in_one_line(text)}", markup=False, highlight=False)

    def strip(self, index: int, result: Result) -> list[Cell]:
        """The frames of a sample from noise to result, decoded only now: latents take less to keep."""
        drafts = [(step.done, self.model.pixels(step.prepared, step.x0)) for step in self.frames[index]]
        shown = [*drafts, (result.evaluations, result.picture)]
        return [(pixels, f"{done} of {result.evaluations}") for done, pixels in shown if pixels is not None]


def frames_of(evaluations: int) -> set[int]:
    """Which of a run's evaluations a filmstrip shows: the first and others in equal distances before the last."""
    return set(np.linspace(1, evaluations - 1, min(FRAMES, evaluations - 1)).round().astype(int).tolist())


def in_one_line(text: str) -> str:
    """A text from a model or a stranger: it keeps to its line, and nothing in it steers the terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
