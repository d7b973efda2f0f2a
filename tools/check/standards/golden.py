"""The golden files of a bundle as the standard."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import SafetensorError
from safetensors.numpy import load

from mdm.plugins.errors import InputError
from mdm.runtime.model import Model
from mdm.tools.check.standards.golden_files import fault_of_case, fault_of_run
from mdm.tools.check.standards.recorded import part_of, run_of
from mdm.tools.check.standards.standard import Case, Run, State


class GoldenStandard:
    """The golden files: inputs and the model's answers, recorded when the bundle was exported."""

    name = "golden"

    def __init__(self, model: Model) -> None:
        self.model, self.bundle = model, model.bundle
        self.precision: str = model.manifest["precision"]
        if not model.manifest["golden"]:
            raise InputError(
                f"bundle '{self.bundle.path}' has no golden files: it was exported without validation\n"
                "export it again, or check it against the model: --against reference --checkpoint FILE"
            )

    def cases(self, graph: str) -> Iterator[Case]:
        arrays = self.read(graph)
        if arrays is not None:
            self.refuse(graph, fault_of_case(arrays, self.bundle.graph(graph)))
            yield Case("golden", part_of(arrays, "in."), part_of(arrays, "out."))

    def runs(self, task: str) -> Iterator[Run]:
        arrays = self.read(f"task_{task}")
        if arrays is not None:
            if "in.steps" not in arrays or "out.eps" not in arrays:
                raise InputError(
                    f"the golden run of task '{task}' in bundle '{self.bundle.path}' lacks its noise estimates\n"
                    "it was written by an older version of mdm-deploy: export the checkpoint again"
                )
            self.refuse(f"task_{task}", fault_of_run(arrays, self.model, task))
            yield run_of(self.model, task, 0, arrays)

    def read(self, name: str) -> State | None:
        """A golden file's tensors, after its hash was found right."""
        file = self.model.manifest["golden"].get(name)
        if file is None:
            return None
        try:
            return load(self.bundle.content(file))
        except (SafetensorError, LookupError, TypeError, ValueError) as error:  # the last three: types numpy has not
            if isinstance(error, InputError):
                raise
            self.refuse(name, " ".join(f"it cannot be read: {error}".split())[:200])
            raise

    def refuse(self, name: str, fault: str) -> None:
        if fault:
            file = self.model.manifest["golden"][name]
            raise InputError(
                f"golden file '{file}' of bundle '{self.bundle.path}' is no standard\n{fault}\n"
                "export the checkpoint again, or check against the model: --against reference"
            )
