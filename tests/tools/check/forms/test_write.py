from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.tools.check.forms import write
from mdm.tools.check.forms.write import make_folder, write_report
from mdm.tools.check.report import Report

NAMES = ["junit.xml", "report.html", "report.json", "summary.md"]


def test_four_files_and_nothing_else_are_written(failing: Report, tmp_path: Path) -> None:
    paths = write_report(failing, tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == NAMES
    assert sorted(path.name for path in paths) == NAMES
    for path in paths:
        assert len(path.read_bytes().decode("utf-8")) > 1000


def test_a_second_report_replaces_the_first_and_has_it_in_its_trend(sound: Report, tmp_path: Path) -> None:
    write_report(sound, tmp_path)
    sound.created = "2026-11-21T12:00:00Z"
    write_report(sound, tmp_path, tmp_path)
    assert sorted(os.listdir(tmp_path)) == NAMES
    assert "Earlier reports of this bundle and backend: 1." in (tmp_path / "report.html").read_text()
    assert "2026-11-20 12:00" in (tmp_path / "summary.md").read_text()


def test_the_same_report_is_the_same_bytes(failing: Report, tmp_path: Path) -> None:
    one, other = write_report(failing, tmp_path / "one"), write_report(failing, tmp_path / "other")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


@pytest.mark.parametrize("form", ["as_json", "as_junit", "as_html", "as_markdown"])
def test_a_failing_form_leaves_the_old_files_whole(
    form: str, sound: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in write_report(sound, tmp_path)}

    def fail(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(write, form, fail)
    sound.bundle = "other"
    with pytest.raises(ZeroDivisionError):
        write_report(sound, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_old_files_whole(sound: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in write_report(sound, tmp_path)}
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "html" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    sound.bundle = "other"
    with pytest.raises(EnvironmentLackError, match="No space left"):
        write_report(sound, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_below_a_file_and_what_may_not_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="no folder"):
        make_folder(file)
    for path in (file / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            make_folder(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="may not be written to"):
        make_folder(tmp_path)
