"""What compute-sanitizer says is read rightly, and its absence is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdm.tools.gpu_check import sanitize

CLEAN = "| kernel |\nwrote out\n========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
INVALID = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write\n=========     at ssd_scan+0x2a0\n"
    "========= ERROR SUMMARY: 32 errors\n"
)
RACES = "========= Error: Race reported between Write access at a\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "done", "holds", "said"),
    [
        ("memcheck", 0, CLEAN, True, True, "0 errors in 40 scans"),
        ("memcheck", 86, INVALID, True, False, "32 errors in 40 scans; first: Invalid __global__ write"),
        ("memcheck", 1, CLEAN, True, False, "0 errors in 40 scans"),  # verify itself found a fault
        (
            "racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True, True,
            "0 hazards displayed (0 errors, 0 warnings) in 6 scans",
        ),
        (
            "racecheck", 86, RACES + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n", True, False,
            "1 hazard displayed (1 error) in 6 scans; first: Error: Race reported between Write access at a",
        ),
        ("memcheck", 3, "Error: no NVIDIA driver\n", False, True, "not done: ended with 3: Error: no NVIDIA driver"),
        ("memcheck", 9, "", False, True, "not done: ended with 9: and said nothing"),
    ],
)  # fmt: skip
def test_what_it_says(tool: str, code: int, output: str, done: bool, holds: bool, said: str) -> None:
    assert sanitize.read(tool, code, output) == sanitize.Sanitized(tool, done, holds, said)


def test_it_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "PLACES", ())
    found = sanitize.sanitize(tmp_path, [], lambda: 60.0)
    assert [(one.tool, one.done, one.holds) for one in found] == [("memcheck", False, True), ("racecheck", False, True)]
    assert "is not here" in found[0].said


def stand_in(folder: Path, script: str) -> None:
    tool = folder / sanitize.TOOL
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_the_child_is_a_small_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(
        tmp_path,
        'echo "$@ alone=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$0.log"; echo "========= ERROR SUMMARY: 0 errors"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = sanitize.sanitize(tmp_path / "out", ["--sources"], lambda: 60.0)
    assert all(one.done and one.holds for one in found)
    first, second = (tmp_path / f"{sanitize.TOOL}.log").read_text().splitlines()
    assert first.startswith("--tool memcheck --error-exitcode 86 ")
    assert first.endswith(f"tools/gpu_check --sources --part verify --cases 40 --out {tmp_path}/out/memcheck alone=1")
    assert second.startswith("--tool racecheck")


def test_it_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    [found, _] = sanitize.sanitize(tmp_path, [], lambda: 0.1)
    assert (found.done, found.holds, found.said) == (False, True, "not done after 0 seconds")
