"""The PyTorch model as the standard: in float64 it is the truth, in the graphs' own types it gives the noise floor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np

from mdm.export.golden import FEW, LARGE, MOST, default_run, reference_run
from mdm.export.truth import Point, points_of
from mdm.plugins.errors import EnvironmentLackError
from mdm.plugins.machine import free_memory
from mdm.runtime.model import Model
from mdm.tools.check.finding import Array
from mdm.tools.check.nodes.evaluator import Evaluation
from mdm.tools.check.standards.blueprint import Blueprint
from mdm.tools.check.standards.decoder import Decoder
from mdm.tools.check.standards.golden import GoldenStandard
from mdm.tools.check.standards.recorded import run_of
from mdm.tools.check.standards.standard import Case, Decoded, Run, State, Walk
from mdm.tools.check.standards.walk import walk

ROOM = 12  # bytes of memory a parameter takes: in float64, beside the engine's copy of it
BATCH = 2  # samples of a run


@dataclass
class ReferenceStandard:
    """`seeds`: of the inputs; `steps` of a run at most."""

    model: Model
    blueprint: Blueprint
    seeds: Sequence[int]
    steps: int | None = None
    name: str = field(default="reference", init=False)

    def __post_init__(self) -> None:
        self.precision: str = self.model.manifest["precision"]
        need, free = ROOM * self.blueprint.plan.parameters, free_memory()
        if need > free:
            raise EnvironmentLackError(
                f"the model in float64 takes about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free\n"
                "check it against its golden files: --against golden"
            )

    @cached_property
    def deployed(self) -> DeployedReference:
        return DeployedReference(self.model, self.blueprint)

    def cases(self, graph: str) -> Iterator[Case]:
        """A case for each seed; they take turns at the sizes that an export is validated at."""
        if graph not in self.blueprint.built:  # of an image autoencoder that was not named
            if self.model.manifest["golden"]:
                yield from GoldenStandard(self.model).cases(graph)
            return
        spec, truth = self.blueprint.spec(graph), self.blueprint.truth
        points = points_of(spec, self.blueprint.plan.config)
        for seed in self.seeds:
            point = points[seed % len(points)]
            inputs = truth.inputs(spec, point, seed)
            yield Case(
                f"seed {seed}, {words_of(point)}", inputs, truth.outputs(spec, inputs),
                self.deployed.outputs(graph, inputs),
            )  # fmt: skip

    def runs(self, task: str) -> Iterator[Run]:
        config, truth = self.blueprint.plan.config, self.blueprint.truth
        large = self.blueprint.plan.parameters > LARGE
        for seed in self.seeds:
            run = default_run(config, task, self.steps or (FEW if large else MOST))
            yield run_of(self.model, task, seed, reference_run(config, truth, run, BATCH, seed), self.deployed)


class DeployedReference:
    """The blueprint in the graph's own types."""

    def __init__(self, model: Model, blueprint: Blueprint) -> None:
        self.model, self.blueprint = model, blueprint
        self.made: dict[str, Evaluation] = {}
        self.walked: WeakKeyDictionary[Run, Walk] = WeakKeyDictionary()  # two levels ask for each

    def outputs(self, graph: str, inputs: State) -> State:
        if graph not in self.made:
            self.made[graph] = self.blueprint.evaluation(graph, exact=False)
        return {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
                for name, tensor in self.made[graph].run(inputs).items()}  # fmt: skip

    def advance(self, run: Run, evaluation: int, state: State) -> State:
        row = np.repeat(run.rows[evaluation][None], run.batch, axis=0)
        noise = np.zeros_like(state["base"]) if run.noise is None else run.noise[evaluation]
        inputs = {**run.inputs, **state, "row": row, "noise": noise}
        taken = {spec["name"]: np.dtype(spec["dtype"]) for spec in self.model.bundle.graph(run.graph)["inputs"]}
        said = self.outputs(run.graph, {name: inputs[name].astype(dtype) for name, dtype in taken.items()})
        after = {name.removesuffix("_next"): array for name, array in said.items()}
        return after | ({"x0_before": after["x0"]} if "x0_before" in state else {})

    def walk(self, run: Run) -> Walk:
        if run not in self.walked:
            self.walked[run] = walk(run, self.advance)
        return self.walked[run]

    def end(self, run: Run) -> Array:
        state = run.states[0]
        if "mask" not in state:  # else `walk` has the true selection
            return self.walk(run).free[-1]["base"]
        for k in range(len(run)):
            state = self.advance(run, k, state)
        return state["base"]

    def decode(self, run: Run, z: Array) -> Decoded:
        return Decoder(self.model, lambda graph, wanted, z: [self.outputs(graph, {"z": z})[name] for name in wanted])(
            run.task, run.graph, z
        )


def words_of(point: Point) -> str:
    parts = [f"batch {point.batch}"]
    if point.text_tokens:
        parts.append(f"text {point.text_tokens}")
    if any(point.size):
        parts.append(f"latents {point.size[0]}x{point.size[1]}")
    return ", ".join(parts)
