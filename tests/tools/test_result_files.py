"""Result files: numbers go on, nothing is overwritten, and whatever happens a file is whole or absent."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.runtime import Request, Result
from mdm.tools.requests_file import METADATA
from mdm.tools.result_files import ResultFiles, files_for, record_of

PICTURE = Image.new("RGB", (4, 4), (1, 2, 3))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def entries(folder: str) -> set[str]:
    return set(os.listdir(folder))


def test_numbers_go_on_from_what_is_there() -> None:
    Path("out").mkdir()
    for name in ("0003.png", "0007-step05.png", "0005-0006-grid.png", "notes.txt", "12.png", "99999-holiday"):
        Path("out", name).write_text("")
    assert ResultFiles(Path("out")).reserve() == "100000"
    Path("out/99999-holiday").unlink()
    files = ResultFiles(Path("out"))
    assert [files.reserve(), files.reserve()] == ["0008", "0009"]
    assert ResultFiles(Path("new")).reserve() == "0000"


def test_another_runs_picture_is_not_overwritten() -> None:
    files = ResultFiles(Path("out"))
    stem = files.reserve()
    Path("out").mkdir()
    Path("out/0000.png").write_text("another run's")
    assert files.save_picture(stem, PICTURE) == Path("out/0001.png")
    assert Path("out/0000.png").read_text() == "another run's"


def test_a_named_picture_replaces_the_one_of_that_name_and_is_all_there_is() -> None:
    Path("x.png").write_text("an earlier one")
    files = files_for(Path("x.png"), 1, pictures=True)
    assert files is not None
    assert files.save_picture(files.reserve(), PICTURE, {"seed": 7, "prompt": "größer"}) == Path("x.png")
    files.note({"seed": 7})
    with Image.open("x.png") as image:
        assert json.loads(image.info[METADATA]) == {"seed": 7, "prompt": "größer"}
        assert image.getpixel((0, 0)) == (1, 2, 3)
    assert entries(".") == {"x.png"}


def test_latents_are_kept_where_there_is_no_picture() -> None:
    latents = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    path = ResultFiles(Path("out")).save_latents("0000", latents)
    assert np.array_equal(np.load(path), latents)


def test_results_are_added_line_by_line() -> None:
    for number in range(3):
        ResultFiles(Path("out")).note({"number": number})
    assert [json.loads(line)["number"] for line in Path("out/results.jsonl").read_text().splitlines()] == [0, 1, 2]


# --------------------------------------------------------------------------------------- what happens on the way

FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), EnvironmentLackError),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), EnvironmentLackError),
    (PermissionError(errno.EACCES, "Permission denied"), InputError),
    (KeyboardInterrupt(), KeyboardInterrupt),
]
IDS = ["full", "quota", "denied", "interrupt"]


@pytest.mark.parametrize(("error", "raised"), FAILURES, ids=IDS)
def test_no_half_picture_is_left(
    error: BaseException, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ResultFiles(Path("out"))
    files.save_picture("0000", PICTURE)

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(raised) as stopped:
        files.save_picture("0001", PICTURE)
    assert entries("out") == {"0000.png"}
    if not isinstance(error, KeyboardInterrupt):
        assert str(stopped.value).startswith("'out/0001.png' cannot be written: ")


@pytest.mark.parametrize(("error", "raised"), [*FAILURES, (None, EnvironmentLackError)], ids=[*IDS, "short"])
def test_no_half_line_is_left(
    error: BaseException | None, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`short`: a disk that is nearly full takes part of a write and says so only by the count."""
    files = ResultFiles(Path("out"))
    files.note({"number": 0})

    class Half(io.FileIO):
        def write(self, content: Any) -> int:
            written = super().write(content[:5])
            if error is not None:
                raise error
            return written

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Half(path, mode))
        with pytest.raises(raised):
            files.note({"number": 1})
    assert Path("out/results.jsonl").read_bytes() == b'{"number": 0}\n'


# ------------------------------------------------------------------------------------------------ where to write


def test_text_goes_nowhere_unless_asked_and_pictures_to_out() -> None:
    assert files_for(None, 1, pictures=False) is None
    default = files_for(None, 3, pictures=True)
    assert default is not None
    assert (default.folder, default.name) == (Path("out"), None)
    assert entries(".") == set(), "a folder is made when there is something to write"


@pytest.mark.parametrize(
    ("out", "count", "pictures", "said"),
    [
        ("x.png", 2, True, "names one picture, but 2 are to be made"),
        ("x.png", 1, False, "names a picture, but this makes text alone"),
        ("x.jpg", 1, True, "is no name for a PNG file"),
        ("file", 1, True, "'file' is no folder"),
        ("file/deeper", 1, True, "is no folder"),
        ("x" * 300, 1, True, "is no name for a folder or picture"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_any_work(out: str, count: int, pictures: bool, said: str) -> None:
    Path("file").write_text("")
    with pytest.raises(InputError, match=said) as refused:
        files_for(Path(out), count, pictures)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_folder_may_be_called_like_a_picture() -> None:
    Path("x.png").mkdir()
    files = files_for(Path("x.png"), 5, pictures=True)
    assert files is not None
    assert (files.folder, files.name) == (Path("x.png"), None)


def test_a_record_tells_no_path_of_this_machine() -> None:
    request = Request.of("ask", prompt="how many?", picture=Path("/home/someone/a.png"), seed=3)
    result = Result(request, {"solver": "ddim"}, "two", None, np.zeros((1, 1), np.float32), 3, 0.5, 0.0)
    record = record_of(result, {"name": "tiny", "provenance": {"checkpoint": {"sha256": "ab"}}})
    assert record == {
        "task": "ask", "prompt": "how many?", "seed": 3, "sample": 0, "solver": "ddim", "text": "two",
        "evaluations": 3, "seconds": 0.5, "picture": "a.png", "bundle": "tiny", "checkpoint": "ab",
    }  # fmt: skip
