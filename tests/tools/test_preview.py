"""What is seen of samples before they are done, on a model that decodes latents to what they are."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdm.runtime import Request, Result, Step
from mdm.runtime.backend import Array
from mdm.tools.options import progress_bar
from mdm.tools.preview import FRAMES, Watcher, frames_of, in_one_line
from mdm.tools.result_files import ResultFiles

Out = pytest.CaptureFixture[str]


def model(picture: bool = True, text: bool = False) -> Any:
    """Its latents are a shade of grey."""
    return SimpleNamespace(
        pixels=lambda prepared, x0: shade(int(x0[0])) if picture else None,
        new_text=lambda prepared, x0: f"shade\n{int(x0[0])}" if text else None,
    )


def shade(value: int) -> Array:
    return np.full((4, 4, 3), value, np.uint8)


def step(index: int, done: int, of: int) -> Step:
    return Step(index, done, of, np.array([done], np.float32), None)  # type: ignore[arg-type]


def watcher(folder: Path, kind: Any, as_json: bool = False, **settings: Any) -> Watcher:
    settings = {"count": 1, "every": None, "filmstrip": False} | settings
    return Watcher(kind, progress_bar(as_json), "generate", files=ResultFiles(folder), **settings)


def test_a_draft_is_written_every_so_many_evaluations(tmp_path: Path) -> None:
    seen = watcher(tmp_path, model(), every=4)
    seen.begin(["0003"])
    for done in range(1, 9):
        seen(step(0, done, 8))
    assert os.listdir(tmp_path) == ["0003-step04.png"], "the eighth is the result itself"
    with Image.open(tmp_path / "0003-step04.png") as image:
        assert image.getpixel((0, 0)) == (4, 4, 4)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_draft_of_text_is_shown_and_kept(as_json: bool, tmp_path: Path, capsys: Out) -> None:
    seen = watcher(tmp_path, model(picture=False, text=True), as_json, every=50)
    seen.begin(["0000", "0001"])
    for done in range(1, 101):
        seen(step(1, done, 100))
    assert seen.drafts == [[], [{"step": 50, "text": "shade\n50"}]]
    assert capsys.readouterr() == ("", "" if as_json else "0001-step050  shade 50\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("evaluations", "shown"), [(1, []), (2, [1]), (5, [1, 2, 3, 4]), (20, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19])]
)
def test_a_filmstrip_shows_evaluations_in_equal_distances(evaluations: int, shown: list[int]) -> None:
    assert sorted(frames_of(evaluations)) == shown
    assert len(frames_of(1000)) == FRAMES


def test_a_filmstrip_goes_from_the_first_evaluation_to_the_result(tmp_path: Path) -> None:
    seen = watcher(tmp_path, model(), filmstrip=True)
    seen.begin(["0000"])
    for done in range(1, 4):
        seen(step(0, done, 3))
    result = Result(Request.of("joint"), {}, None, shade(200), np.zeros(1, np.float32), 3, 0.1, 0.0)
    cells = seen.strip(0, result)
    assert [text for _, text in cells] == ["1 of 3", "2 of 3", "3 of 3"]
    assert [int(pixels[0, 0, 0]) for pixels, _ in cells] == [1, 2, 200]


def test_the_bar_counts_evaluations_of_all_samples(tmp_path: Path) -> None:
    seen = watcher(tmp_path, model(), count=3)
    (task,) = seen.bar.tasks
    assert (task.completed, task.total) == (0, None)
    seen.begin(["0000", "0001"])
    seen(step(0, 1, 10))
    assert (task.completed, task.total) == (1, 30)
    seen(step(1, 1, 20))
    assert (task.completed, task.total) == (2, 50)
    seen.begin(["0002"])
    seen(step(0, 1, 5))
    assert (task.completed, task.total) == (3, 35)
    assert task.fields["note"].endswith(" steps/s")


def test_a_strangers_text_keeps_to_its_line() -> None:
    assert in_one_line(" a\nb\tc \x1b[2J\u202e ") == "a b c ?[2J?"
