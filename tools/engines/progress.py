"""What is seen of a build while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from mdm.tools.engines.run import Step


class Progress:
    """A line that a terminal draws anew several times a second, so that time is seen to pass; elsewhere a line a
    phase."""

    def __init__(self, console: Console, graphs: Sequence[str]) -> None:
        self.console, self.graphs = console, graphs
        self.began, self.step = 0.0, Step("", "", None)

    def told(self, step: Step) -> None:
        if step.graph != self.step.graph:
            self.began = time.monotonic()
        self.step = step
        if not self.console.is_terminal:
            self.console.print(self.text(), highlight=False, soft_wrap=True)

    def text(self) -> Text:
        if not self.step.graph:
            return Text("starting TensorRT")
        last = f", {self.step.last:.0f} s the last time" if self.step.last else ""
        place = f"{self.graphs.index(self.step.graph) + 1} of {len(self.graphs)}"
        passed = f"{time.monotonic() - self.began:.0f} s"
        return Text(f"{self.step.graph} ({place}): {self.step.phase}, {passed}{last}")

    def __rich__(self) -> Text:
        return self.text()
