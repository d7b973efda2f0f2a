"""Many requests, a few at a time: all come out, in order, and who is at fault is named. The pipeline is a stand-in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdm.plugins.errors import InputError
from mdm.runtime import Request, Result
from mdm.tools import run_requests as tool
from mdm.tools.options import progress_bar
from mdm.tools.preview import Watcher
from mdm.tools.requests_file import Asked
from mdm.tools.result_files import ResultFiles
from mdm.tools.run_requests import Outcome, run_requests


class Pipeline:
    """Its pictures are a shade of grey: the sample's number. What the task is called is what it makes."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.model = SimpleNamespace(
            manifest={"name": "tiny", "provenance": {"checkpoint": {"sha256": "ab"}}},
            task=lambda name: {"image": "" if name == "complete" else "made"},
            prepare=self.prepare,
        )

    def prepare(self, request: Request) -> Request:
        if request.prompt == "bad":
            raise InputError("the prompt is bad")
        return request

    def stream(self, prepared: list[Request], callback: Any) -> Iterator[tuple[int, Result]]:
        """The last is the first to be finished."""
        self.runs.append(len(prepared))
        for index, request in reversed(list(enumerate(prepared))):
            yield index, self.result(request)

    def result(self, request: Request) -> Result:
        picture = np.full((8, 8, 3), request.sample, np.uint8) if request.task == "text_to_image" else None
        text = f"{request.prompt} and more" if request.task == "complete" else None
        return Result(request, {}, text, picture, np.zeros((4, 8, 8), np.float32), 3, 0.1, 0.0)


def run(
    prompts: list[str], task: str = "text_to_image", batch: int = 1, folder: str | None = "out"
) -> tuple[Pipeline, list[list[Outcome]]]:
    pipeline: Any = Pipeline()
    files = None if folder is None else ResultFiles(Path(folder))
    asked = [Asked({"task": task, "prompt": prompt}, f"line {number}") for number, prompt in enumerate(prompts, 1)]
    requests = [(one, one.request()) for one in asked]
    watcher = Watcher(pipeline.model, progress_bar(as_json=True), "generate", 1, files, None, filmstrip=False)
    return pipeline, list(run_requests(pipeline, requests, batch, files, watcher))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "CHUNK", 4)


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]


def test_a_prompts_samples_stay_together() -> None:
    pipeline, chunks = run(["a", "b", "c"], batch=3)
    assert pipeline.runs == [3, 3, 3], "not 4, which would tear a prompt's samples apart"
    assert [(line["prompt"], line["sample"], line["file"]) for line in lines()] == [
        (prompt, sample, f"{3 * row + sample:04}.png") for row, prompt in enumerate("abc") for sample in range(3)
    ]
    assert [outcome.path for outcome in chunks[1]] == [
        Path("out/0003.png"), Path("out/0004.png"), Path("out/0005.png"), Path("out/0003-0005-grid.png"),
    ]  # fmt: skip
    with Image.open("out/0005.png") as image:
        assert image.getpixel((0, 0)) == (2, 2, 2)


def test_more_samples_than_are_run_at_a_time() -> None:
    assert run(["a"], batch=10)[0].runs == [4, 4, 2]
    assert [line["sample"] for line in lines()] == list(range(10))


def test_one_picture_has_no_sheet() -> None:
    _, [[outcome]] = run(["a\nb"])
    assert (outcome.path, outcome.said) == (Path("out/0000.png"), "a b")
    assert set(os.listdir("out")) == {"0000.png", "results.jsonl"}


def test_a_sheet_says_once_what_a_rows_samples_were_made_from() -> None:
    pipeline = Pipeline()
    shown = [pipeline.result(Request.of("text_to_image", prompt=prompt)) for prompt in "aabb"]
    assert [tool.sheet_text(shown, index, 2) for index in range(4)] == ["a", "", "b", ""]
    assert [tool.sheet_text(shown, index, 1) for index in range(4)] == list("aabb")
    told = [pipeline.result(Request.of("complete", prompt="a")) for _ in range(2)]
    assert [tool.sheet_text(told, index, 2) for index in range(2)] == ["a and more"] * 2


def test_text_is_written_only_where_asked() -> None:
    _, [outcomes] = run(["a", "b"], "complete", folder=None)
    assert [(outcome.path, outcome.said) for outcome in outcomes] == [(None, "a and more"), (None, "b and more")]
    assert os.listdir() == []
    run(["a", "b"], "complete")
    assert os.listdir("out") == ["results.jsonl"]
    assert [line["text"] for line in lines()] == ["a and more", "b and more"]


def test_a_model_without_autoencoder_leaves_latents() -> None:
    _, [outcomes] = run(["a", "b"], "latent")
    assert [outcome.path for outcome in outcomes] == [Path("out/0000.npy"), Path("out/0001.npy")]
    assert np.load("out/0001.npy").shape == (4, 8, 8)


def test_who_is_at_fault_is_named_and_what_came_before_is_kept() -> None:
    with pytest.raises(InputError, match=r"^line 6: the prompt is bad$"):
        run(["a", "a", "a", "a", "a", "bad"])
    assert len(lines()) == 4
