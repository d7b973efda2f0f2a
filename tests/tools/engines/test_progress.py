"""What is seen of a build: time passes while nothing is told, and phases are shown as they are named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mdm.tools.engines.progress import Progress
from mdm.tools.engines.run import Step

GRAPHS = ("encode", "step", "decode")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_time_passes_while_nothing_is_told(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console, GRAPHS)
    assert console.render_str("starting TensorRT") == progress.text()
    progress.told(Step("step", "parse", 92.4))
    clock[0] += 61.2
    assert str(progress.__rich__()) == "step (2 of 3): parse, 61 s, 92 s the last time"
    progress.told(Step("step", "Building [red]engine / a", None))
    clock[0] += 9
    assert str(progress.text()) == "step (2 of 3): Building [red]engine / a, 70 s"
    progress.told(Step("decode", "parse", None))
    assert str(progress.text()) == "decode (3 of 3): parse, 0 s"
    assert console.file.getvalue() == ""  # the terminal's line is drawn by the console's status


def test_a_line_a_phase_where_there_is_no_terminal(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), width=20)
    progress = Progress(console, GRAPHS)
    progress.told(Step("step", "a phase whose name is long", None))
    progress.told(Step("step", "write", None))
    assert console.file.getvalue() == "step (2 of 3): a phase whose name is long, 0 s\nstep (2 of 3): write, 0 s\n"
