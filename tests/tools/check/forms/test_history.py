from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.errors import InputError
from mdm.tools.check.finding import Verdict
from mdm.tools.check.forms.as_json import as_json
from mdm.tools.check.forms.history import trend
from mdm.tools.check.report import Report


def put(report: Report, folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_bytes(json.dumps(as_json(report) | changed, ensure_ascii=False).encode("utf-8", "replace"))
    return path


def test_earlier_reports_come_in_time_order_and_the_own_one_last(sound: Report, tmp_path: Path) -> None:
    for depth, day in (("b", 3), ("a/deep/down", 1), ("c", 2)):
        put(sound, tmp_path / depth, created=f"2026-11-0{day}T00:00:00.5+00:00")
    put(sound, tmp_path / "later", created="2026-11-21T00:00:00Z")
    put(sound, tmp_path / "own", created=sound.created)
    found = trend(tmp_path, sound)
    assert [point.created.day for point in found.points] == [1, 2, 3, 20]
    assert found.skipped == 0
    # 60 blocks take up to 60/75 of their limits. Files and decoded pictures have none.
    assert found.points[0].used == pytest.approx({"operators": 0.08, "blocks": 0.8, "steps": 0.3, "trajectories": 0.62})
    assert found.points[0].used == pytest.approx(found.points[-1].used)


def test_other_bundles_and_backends_are_left_out(sound: Report, tmp_path: Path) -> None:
    put(sound, tmp_path / "a", created="2026-11-01T00:00:00Z", bundle="other")
    put(sound, tmp_path / "b", created="2026-11-01T00:00:00Z", backend="tensorrt")
    found = trend(tmp_path, sound)
    assert (len(found.points), found.skipped) == (1, 0)


def test_a_failure_with_nan_is_infinitely_over(failing: Report, tmp_path: Path) -> None:
    failing.bundle = "mdm-tiny"
    put(failing, tmp_path, created="2026-11-01T00:00:00Z")
    first, own = trend(tmp_path, failing).points
    assert first.verdict is own.verdict is Verdict.FAIL
    assert math.isinf(first.used["steps"])
    assert math.isinf(own.used["steps"])


def test_unsound_files_are_counted_and_nothing_else_is_opened(sound: Report, tmp_path: Path) -> None:
    made = as_json(sound)
    spoilt: dict[str, Any] = copy.deepcopy(made)
    spoilt["findings"][0]["verdict"] = "FINE"
    contents = {
        "cut": json.dumps(made)[:-100], "list": "[]", "spoilt": json.dumps(spoilt), "deep": "[" * 100_000,
        "month": json.dumps(made | {"created": "2026-13-01T00:00:00Z"}), "timeless": json.dumps(made | {"created": ""}),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(content)
    put(sound, tmp_path / "good", created="2026-11-01T00:00:00Z")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")  # would hang
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path)  # would go round
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "report.json").symlink_to(tmp_path / "good" / "report.json")
    found = trend(tmp_path, sound)
    assert (len(found.points), found.skipped) == (2, len(contents))


def test_only_the_newest_files_are_read(sound: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in range(1, 6):
        path = put(sound, tmp_path / str(day), created=f"2026-11-0{day}T00:00:00Z")
        os.utime(path, (day, day))
    monkeypatch.setattr("mdm.tools.check.forms.history.MOST_FILES", 2)
    assert [point.created.day for point in trend(tmp_path, sound).points] == [4, 5, 20]


def test_a_history_that_is_no_folder_is_refused(sound: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        trend(tmp_path / "none", sound)
