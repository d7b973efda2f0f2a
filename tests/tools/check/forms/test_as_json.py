from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from mdm.plugins.errors import InputError
from mdm.tools.check.forms.as_json import REPORT_SCHEMA, as_json, read_report
from mdm.tools.check.forms.write import write_report
from mdm.tools.check.report import Report


def written(value: Any, path: Path) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("name", ["sound", "failing", "empty"])
def test_what_is_written_is_strict_json_of_its_schema(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    report = Report("none", "none", "reference") if name == "empty" else request.getfixturevalue(name)
    write_report(report, tmp_path)
    found = read_report(tmp_path / "report.json")
    # An independent reader of the schema agrees, and the schema itself is one.
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)
    jsonschema.validate(found, REPORT_SCHEMA)
    assert (found["schema"], found["verdict"], found["counts"]) == (1, report.verdict.value, report.counts())
    assert len(found["findings"]) == len(report.findings)
    assert len(found["pictures"]) == len(report.pictures)


def test_no_field_of_the_report_is_forgotten(failing: Report) -> None:
    made = as_json(failing)
    for name, value in vars(failing).items():
        assert made[name] or not value, name
    assert [pair["psnr"] for pair in made["pictures"]] == [14.2, 71.25, "inf", "inf"]
    assert "truth" not in made["pictures"][0]
    assert made["texts"][1]["agreement"] == 0.6
    broken = next(one for one in made["findings"] if one["subject"] == "joint")
    assert (broken["used"], broken["error"]["rms"], broken["error"]["at"]) == ("inf", "nan", [1, 4])


def test_numpy_numbers_are_written_too(sound: Report) -> None:
    sound.drifts[0].free[:] = np.array([0.5, np.nan, np.inf], np.float32)
    assert json.loads(json.dumps(as_json(sound)))["drifts"][0]["free"] == [0.5, "nan", "inf"]


SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a missing key": lambda made: made.pop("findings"),
    "an unknown key": lambda made: made.update(more=1),
    "another version": lambda made: made.update(schema=2),
    "an unknown verdict": lambda made: made["findings"][0].update(verdict="FINE"),
    "an unknown level": lambda made: made["findings"][0].update(level="colours"),
    "a text for a number": lambda made: made["findings"][2]["error"].update(rms="small"),
    "a negative place": lambda made: made["findings"][2]["error"].update(at=[-1]),
    "local time": lambda made: made.update(created="2026-01-31 12:00"),
    "markup for a share": lambda made: made["findings"][2].update(used="<script>"),
    "a number in a fingerprint": lambda made: made["fingerprint"].update(threads=1),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_report_is_refused(fault: str, sound: Report, tmp_path: Path) -> None:
    made = as_json(sound)
    made_again = copy.deepcopy(made)
    SPOILT[fault](made_again)
    assert read_report(written(made, tmp_path / "sound.json"))["bundle"] == "mdm-tiny"
    with pytest.raises(InputError):
        read_report(written(made_again, tmp_path / "spoilt.json"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made_again, REPORT_SCHEMA)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_report_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(path)


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    monkeypatch.setattr("mdm.tools.check.forms.as_json.MAX_BYTES", 10)
    with pytest.raises(InputError, match="at most 10"):
        read_report(written({"more": "than ten bytes"}, tmp_path / "report.json"))
