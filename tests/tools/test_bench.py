"""`mdm bench` on something small: `ops` has a time for every form, `export` exports; a wrong call is told."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mdm.tools.bench.clock import median_time, multiply_add_peak
from mdm.tools.bench.ops import AIMS
from mdm.tools.main import main

SMALL = ["bench", "ops", "--batch", "2", "--length", "40", "--width", "128", "--threads", "1", "--seconds", "0.001"]
Out = pytest.CaptureFixture[str]


def test_every_form_is_measured(capsys: Out) -> None:
    assert main([*SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    forms = {(row["operator"], row["point"]["state"]): set(row["milliseconds"]) for row in report["rows"]}
    ssd = {"native", "body", "linear", "torch"}
    assert forms == {
        ("short_conv", 4): ssd - {"linear"} | {"conv"}, ("selective_scan", 16): ssd - {"linear"},
        ("ssd_scan", 64): ssd, ("ssd_scan", 128): ssd,
    }  # fmt: skip
    for row in report["rows"]:
        assert min(row["milliseconds"].values()) > 0
        assert row["share_of_peak"] > 0
    assert set(report["medians"]) == set(AIMS)


def test_the_table_names_its_aims(capsys: Out) -> None:
    assert main([*SMALL, "--state", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ssd_scan | 2 | 40 | 128 | 64 | 1 | ") for line in lines) == 1
    assert any("aim: native at least 2.5 times faster than linear: " in line for line in lines)


def test_a_wrong_width_is_told(capsys: Out) -> None:
    assert main(["bench", "ops", "--width", "100"]) == 2
    assert "--width is 100, expected multiples of 64" in capsys.readouterr().err


def test_an_export_of_zeros_is_measured(capsys: Out) -> None:
    assert main(["bench", "export", "--preset", "mdm-tiny", "--precision", "fp16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["exports"]["mdm-tiny"]
    assert found["graphs"] == 16
    assert 300 < found["nodes"] < 1000
    assert 0 < found["largest"] < 5_000_000 < found["resident"]
    assert found["checkpoint"] > 2_000_000
    assert main(["bench", "export", "--preset", "dim-small"]) == 0
    assert "graphs | 3" in capsys.readouterr().out


def test_the_clock_counts_time_and_memory() -> None:
    calls: list[int] = []
    assert median_time(lambda: calls.append(1), 0) >= 0
    assert calls == [1]
    assert multiply_add_peak(1) > 1e9


def test_the_peak_of_80_megabytes() -> None:
    """In a process of its own: one with a history takes them from what it has freed and still holds."""
    code = "import numpy; from mdm.tools.bench.clock import memory_peak as m; print(m(lambda: numpy.ones(10_000_000)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "None\n" or 78e6 < int(run.stdout) < 90e6
