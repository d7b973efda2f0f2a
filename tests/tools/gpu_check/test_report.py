"""The report of made-up figures: a goal that is met, one that is missed, and what was not measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.gpu.counts import CHIPS, Work
from mdm.tools.gpu_check.about import About, measured_chip
from mdm.tools.gpu_check.cases import COMPILED, GOALS, MAMBA_SELECTIVE, MAMBA_SSD, TIMED
from mdm.tools.gpu_check.measure import Ceilings, Time
from mdm.tools.gpu_check.report import Report, as_json, markdown, verdicts, write
from mdm.tools.gpu_check.sanitize import Sanitized
from mdm.tools.gpu_check.tables import short, table
from mdm.tools.gpu_check.times import Row
from mdm.tools.gpu_check.verify import Fault, Tally, Verified

ABOUT = About(
    "NVIDIA H200", 132, (9, 0), 1.98e9, "2026-11-21 12:00 UTC", "python tools/gpu_check",
    {"kernels": "the pack", "torch": "2.13.0"}, {"driver_version": "580.1"},
)  # fmt: skip
CEILINGS = Ceilings(4.2e12, 350e12, Time(2.1, 2.0, 2.3, 200))
SSD, SELECTIVE = (goal.case for goal in GOALS)


def row(case: Any, ours: float, floor: float, **rivals: float) -> Row:
    names = {"ssd": MAMBA_SSD, "selective": MAMBA_SELECTIVE, "compiled": COMPILED}
    return Row(
        case, Time(ours, ours - 1, ours + 1, 50), Work(read=1), Work(read=2, launches=1), floor, "memory", 0.61, 0.25,
        {names[name]: Time(value, value, value, 50) for name, value in rivals.items()}, {},
    )  # fmt: skip


def full() -> Report:
    """SSD meets its floor and misses its rival; Mamba-1's rival is not there."""
    rows = [row(SSD, 20.0, 12.5, ssd=35.0, compiled=900.0), row(SELECTIVE, 300.0, 120.0), row(TIMED[2], 5.25, 1.5)]
    rows[1].notes[MAMBA_SELECTIVE] = "mamba-ssm is not installed"
    verified = Verified(cases=2, runs=3, captured=1, tallies={("ssd_scan", "bfloat16", "sm_90"): Tally(3, 0.0031)})
    return Report(ABOUT, verified, [Sanitized("memcheck", True, True, "0 errors in 40 scans")], CEILINGS, rows)


def cells(text: str, first: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_goals_met_and_missed() -> None:
    found = [*verdicts(full().rows)]
    assert [(v.found, v.met) for v in found] == [
        ("1.60 times", True),
        ("1.75 times", False),
        ("2.50 times", False),
        ("not measured: mamba-ssm is not installed", None),
    ]
    assert found[1].goal == "SSD B2 L1064 H64 P64 N128 bf16: at least 2.0 times as fast as mamba-ssm Triton"
    assert [v.met for v in verdicts([])] == [None] * 4


def test_goals_on_the_edge() -> None:
    [of_floor, faster, *_] = verdicts([row(SSD, 20.0, 10.0, ssd=40.0)])
    assert (of_floor.met, faster.met) == (True, True)
    [of_floor, faster, *_] = verdicts([row(SSD, 20.1, 10.0, ssd=40.1)])
    assert (of_floor.met, faster.met) == (False, False)


def test_the_text_says_it_all() -> None:
    text = markdown(full())
    assert "# GPU check: NVIDIA H200\n\n2026-11-21 12:00 UTC, `python tools/gpu_check`" in text
    assert "132 multiprocessors of compute capability 9.0, at most 1.98 GHz; kernels the pack, torch 2.13.0" in text
    assert "nvidia-smi: driver_version 580.1" in text
    assert cells(text, "ssd_scan") == ["ssd_scan bfloat16", "sm_90", "3", "0.0031", "0.0078"]
    assert "* memcheck: 0 errors in 40 scans" in text
    assert "* copy within device memory: 4.2 TB/s" in text
    assert "* bfloat16 matrix product: 700 T operations/s" in text
    assert cells(text, "SSD B2 L1064 H64 P64 N128 bf16 ") == [
        "SSD B2 L1064 H64 P64 N128 bf16", "20.0 (19.0-21.0)", "12.5", "memory", "1.60", "61%", "25%",
        "35.0 (1.75x)", "", "900 (45.00x)",
    ]  # fmt: skip
    assert cells(text, "Mamba-1 B2 L4494 D3072 bf16 ")[-3:] == ["", "", ""]
    assert "* mamba-ssm CUDA: mamba-ssm is not installed (Mamba-1 B2 L4494 D3072 bf16)" in text
    assert [line.split("|")[-2].strip() for line in text.split("## Goals")[1].splitlines()[4:]] == [
        "met", "MISSED", "MISSED", "not measured",
    ]  # fmt: skip


def test_every_table_is_one() -> None:
    """Each line of a table has as many cells as its head, behind a line that is empty."""
    lines = markdown(full()).split("\n")
    widths = [line.count("|") for line in lines]
    starts = [i for i, width in enumerate(widths) if width and not widths[i - 1]]
    assert len(starts) == 3
    for start in starts:
        assert lines[start - 1] == ""
        assert re.fullmatch(r"\|-+\|(-+:\|)+", lines[start + 1])
        end = widths.index(0, start)
        assert set(widths[start:end]) == {widths[start]}


def test_faults_are_told_and_end_with_1() -> None:
    report = full()
    assert report.verified is not None
    assert report.holds
    faults = [Fault("ssd_scan", f"case {i}", "error nan, at most 0.0078 expected") for i in range(30)]
    left_out = {"ssd_scan Q=32": "needs more shared memory"}
    report.verified = replace(report.verified, faults=faults, untried=["carry_states"], left_out=left_out, late=4)
    assert not report.holds
    text = markdown(report)
    assert "* ssd_scan, case 0: error nan, at most 0.0078 expected\n" in text
    assert "* and 10 more\n" in text
    assert "case 29" not in text
    assert "never ran:\n\n* carry_states" in text
    assert "do not run here:\n\n* ssd_scan Q=32: needs more shared memory" in text
    assert "For 4 scans no time was left." in text


def test_the_sanitizer_counts_too() -> None:
    assert not replace(full(), sanitized=[Sanitized("racecheck", True, False, "2 hazards")]).holds


def test_files(tmp_path: Path) -> None:
    report = full()
    assert report.verified is not None
    report.verified.tallies["ssd_scan", "float32", "PTX"] = Tally(1, float("inf"))
    text, data = write(report, tmp_path / "a" / "b")
    assert text.read_text() == markdown(report)
    told = json.loads(data.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["holds"] is True
    assert [t["worst"] for t in told["verified"]["tallies"]] == [0.0031, "inf"]
    assert told["times"][0]["case"]["operator"] == "MambaSsdScan"
    assert told["times"][0]["case"]["sizes"]["L"] == 1064
    assert told["times"][0]["rivals"][MAMBA_SSD]["median"] == 35.0
    assert [goal["met"] for goal in told["goals"]] == [True, False, False, None]
    assert sorted(path.name for path in text.parent.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_a_part_alone() -> None:
    text = markdown(Report(ABOUT, ceilings=CEILINGS))
    assert "Ceilings" in text
    assert "Goals" not in text
    assert as_json(Report(ABOUT))["goals"] == []


def test_a_measured_h200_is_an_h200() -> None:
    """Its other rates come from clocks and lanes, and agree with the data sheet."""
    chip = measured_chip(ABOUT, CEILINGS)
    assert (chip.bandwidth, chip.products) == (4.2e12, 350e12)
    assert chip.operations == pytest.approx(CHIPS["H200"].operations, rel=0.01)
    assert chip.specials == pytest.approx(CHIPS["H200"].specials)


def test_short() -> None:
    assert [short(n) for n in (0, 0.0444, 1.349, 11.24, 131.6, 1480.2)] == [
        "0.000",
        "0.044",
        "1.35",
        "11.2",
        "132",
        "1480",
    ]


def test_table() -> None:
    assert table(("a", "b"), [("long", "1"), ("x", "1000")]) == [
        "| a    |    b |",
        "|------|-----:|",
        "| long |    1 |",
        "| x    | 1000 |",
    ]
