"""Another engine as the standard, with the same bundle or another one of the same model: fp32 against fp16, say.

Both get the inputs that the golden files hold. Neither knows the truth, so limits are those of the coarser precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mdm.plugins.errors import InputError
from mdm.runtime.model import Model
from mdm.tools.check.limits import TABLE
from mdm.tools.check.standards.decoder import Decoder, by_engine
from mdm.tools.check.standards.golden import GoldenStandard
from mdm.tools.check.standards.standard import Case, Run
from mdm.tools.check.standards.walk import OnBackend

# of two manifests that compare
SAME = ("config", "null_class", "row", "schedules", "text", "picture", "tasks", "sampler", "sampler_for")


@dataclass
class EngineStandard:
    """`other` is the standard for `model`."""

    model: Model
    other: Model
    name: str
    precision: str = field(init=False)

    def __post_init__(self) -> None:
        for key in SAME:
            if self.model.manifest[key] != self.other.manifest[key]:
                raise InputError(
                    f"bundles '{self.model.bundle.path}' and '{self.other.bundle.path}' differ in '{key}'\n"
                    "expected two bundles of one model, with the same sampler tables"
                )
        self.precision = max((m.manifest["precision"] for m in (self.model, self.other)), key=TABLE.__getitem__)
        self.golden = GoldenStandard(self.model if self.model.manifest["golden"] else self.other)
        self.engine = OnBackend(self.other.backend)

    def cases(self, graph: str) -> Iterator[Case]:
        if graph not in self.other.manifest["graphs"]:
            return
        loaded = self.other.backend.graph(graph)
        for case in self.golden.cases(graph):
            names = list(loaded.outputs)
            yield replace(case, expected=dict(zip(names, loaded.run(names, **case.inputs), strict=True)))

    def runs(self, task: str) -> Iterator[Run]:
        for run in self.golden.runs(task):
            states = [run.states[0]]
            for k in range(len(run)):
                states.append(self.engine.advance(run, k, states[-1]))
            said = Decoder(self.other, by_engine(self.other.backend))(task, run.graph, states[-1]["base"])
            yield replace(run, states=states, decoded=said, points=None)
