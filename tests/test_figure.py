"""The fixture `figure` of conftest.py: it must be able to fail, and the table must show what was measured."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
def test_under(figure): figure("under", 2e-7, 1e-5)
def test_equal(figure): figure("equal", 1, 1)
def test_over(figure): figure("above the limit", 0.25, 0.1)
def test_nan(figure): figure("not a number", float("nan"), 1.0)
"""


@pytest.mark.parametrize("more", [[], ["-n", "2"]], ids=["one process", "two"])
def test_figures_are_held_to_their_limit_and_printed(tmp_path: Path, more: list[str]) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_truth.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "2 failed, 2 passed" in run.stdout.splitlines()[-1]
    table = run.stdout.split("measured figures")[1].splitlines()
    rows = ("under 2e-07 1e-05", "equal 1 1", "above the limit 0.25 0.1 over", "not a number nan 1 over")
    assert set(rows) <= {" ".join(line.split()) for line in table}
