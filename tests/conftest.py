"""Shared by all tests: one thread per process, and the fixture `figure`, which records what a test measured.

    def test_oracle(figure):
        figure("dim oracle eps", worst, 1e-5)   # fails unless worst <= 1e-5

All figures are printed as one table at the end of the run, passed or failed, without -s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

# Before torch or numpy is imported. The tests' tensors are tiny, where a second thread only costs, and
# sums then come out in the same order on every machine. Processes started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


class Measured(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit  # false for NaN


MEASURED = pytest.StashKey[list[Measured]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """Record a measured figure and hold it to its limit: figure(name, value, limit)."""

    def record(name: str, value: float, limit: float) -> None:
        measured = Measured(name, float(value), float(limit))
        request.config.stash[MEASURED].append(measured)
        assert measured.holds, f"{name}: measured {measured.value:.3g}, limit {measured.limit:.3g}"

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[MEASURED]
    if not rows:
        return
    width = max(len(row.name) for row in rows)
    terminalreporter.section("measured figures")
    terminalreporter.write_line(f"{'':{width}}  {'measured':>10}  {'limit':>10}")
    for row in rows:
        mark = "" if row.holds else "  over"
        terminalreporter.write_line(f"{row.name:{width}}  {row.value:10.3g}  {row.limit:10.3g}{mark}")
