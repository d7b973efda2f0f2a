from __future__ import annotations

import re
from datetime import UTC, datetime

from mdm.tools.check.finding import Verdict
from mdm.tools.check.forms.as_markdown import as_markdown, escaped, fenced
from mdm.tools.check.forms.history import Point, Trend
from mdm.tools.check.report import Report


def test_the_first_line_is_the_verdict_and_the_second_has_the_counts(sound: Report, failing: Report) -> None:
    lines = as_markdown(failing).splitlines()
    assert lines[0].startswith("## ❌ FAIL: ")
    assert "68 PASS, 1 AMBIGUOUS, 23 FAIL, 1 SKIPPED" in lines[2]
    assert "exit code 1" in lines[2]


def test_a_sound_bundle_is_told_of_in_tables_alone(sound: Report) -> None:
    made = as_markdown(sound)
    assert made.startswith("## ✅ PASS: mdm\\-tiny on onnxruntime\\-cpu\n")
    assert "did not pass" not in made
    # One row for each subject: 60 blocks of one graph are its worst one.
    assert made.count("backbone.blocks") == 1
    row = next(line for line in made.splitlines() if "backbone.blocks.59" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")[3:]] == ["6.4e-7 rms", "2.0e-7", "8.0e-7", "80 %"]


def test_all_that_did_not_pass_has_its_command(failing: Report) -> None:
    made = as_markdown(failing)
    commands = sum(bool(one.reproduce) for one in failing.findings) + len(failing.divergences) + 1  # and the report's
    assert made.count(f"```\n{failing.command}\n```") == commands
    assert made.count("**❌ FAIL**") == 23
    assert made.count("**🟡 AMBIGUOUS**") == 1
    assert "/backbone/blocks.6/mixer/SSD" in made


def test_hostile_names_stay_in_their_cells(failing: Report) -> None:
    made = as_markdown(failing)
    assert not re.search(r"<\w", made)
    assert made.replace("\n", "").isprintable()
    tables = [block.splitlines() for block in made.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 6
    for lines in tables:
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}


def test_escaping_leaves_no_markup() -> None:
    assert escaped("a|b\n# c `d` <e> [f](g) *h* _i_ \\") == (
        "a\\|b \\# c \\`d\\` &lt;e&gt; \\[f\\]\\(g\\) \\*h\\* \\_i\\_ \\\\"
    )
    assert fenced("a ``` b") == "````\na ``` b\n````"


def test_many_failures_are_cut_with_a_word(failing: Report) -> None:
    failing.findings = failing.findings[-1:] * 250
    made = as_markdown(failing)
    assert made.count("**❌ FAIL**") == 200
    assert "50 more are in report.html" in made


def test_the_trend_is_a_row_for_each_of_the_last_runs(sound: Report) -> None:
    points = [
        Point(datetime(2026, 11, day, tzinfo=UTC), Verdict.PASS, {"blocks": day / 20, "steps": float("inf")})
        for day in range(1, 13)
    ]
    made = as_markdown(sound, Trend(points, skipped=3))
    rows = re.findall(r"^\| 2026-11-.*$", made, re.MULTILINE)
    assert len(rows) == 10
    assert rows[-1] == "| 2026-11-12 00:00 | PASS | 60 % | ∞ |"
    assert "3 files were no sound reports" in made
