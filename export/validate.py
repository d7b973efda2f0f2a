"""Whether a graph computes what the PyTorch model computes: ONNX's checker, then ONNX Runtime at three points.

The figure is the largest difference of an output over the largest value the model has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file

from mdm.export.golden import default_run
from mdm.export.graphs import Built, GraphSpec, Plan
from mdm.export.truth import Arrays, Point, Truth, points_of
from mdm.export.twin import write_twin
from mdm.export.weights import Weights
from mdm.plugins.errors import InputError, ParityError
from mdm.plugins.machine import free_memory
from mdm.reference.config import Config
from mdm.runtime.ort import session_options

# Of one evaluation, and of a whole run of a sampler: some thirty times what mdm-tiny and DiM's sizes showed.
LIMITS = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-4}  # bf16: of the twin, whose weights are the model's
RUN_LIMITS = {"fp32": 1e-3, "fp16": 1e-1}
CHOICES = ("ids", "mask_next")
CUT_ABOVE = 3_000_000_000  # bytes in float32: larger models are validated as three blocks of themselves
ROOM = 2.5  # times that size must be free to run the whole model beside its graph


@dataclass(frozen=True)
class Measured:
    """The worst of a graph's outputs at one point."""

    graph: str
    output: str
    error: float


def check_file(path: Path) -> None:
    """ONNX's own checks, with strict type and shape inference."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker has many classes
        raise ParityError(f"graph '{path.stem}' is not valid ONNX: {' '.join(str(error).split())[:300]}") from error


def session(path: Path) -> onnxruntime.InferenceSession:
    """With the native scans where they are built, else by the bodies in the file."""
    return onnxruntime.InferenceSession(str(path), session_options(path.parent), providers=["CPUExecutionProvider"])


def measure(
    folder: Path, specs: Sequence[GraphSpec], config: Config, truth: Truth, limit: float, count: int = 3
) -> Iterator[Measured]:
    """Run each graph at `count` points; the first that is off is an error."""
    for spec in specs:
        run = session(folder / f"{spec.name}.onnx")
        for point in points_of(spec, config)[:count]:
            inputs = truth.inputs(spec, point)
            expected = truth.outputs(spec, inputs)
            names = [output.name for output in run.get_outputs()]
            found = dict(zip(names, run.run(None, inputs), strict=True))
            yield compare(spec, point, found, expected, truth.choices(spec, inputs, found), limit)


def compare(spec: GraphSpec, point: Point, found: Arrays, expected: Arrays, choices: Arrays, limit: float) -> Measured:
    """`choices`: what the graph should have chosen, by the numbers it found."""
    worst = Measured(spec.name, "", -1.0)
    for name, truth in expected.items():
        if not np.isfinite(truth).all():
            raise InputError(
                f"the checkpoint's own model gives '{name}' of '{spec.name}' that is not finite\n"
                "its weights are damaged, or not of this config"
            )
        if found[name].shape != truth.shape:
            raise ParityError(f"graph '{spec.name}': output '{name}' is {found[name].shape}, expected {truth.shape}")
        if name in CHOICES:  # near a tie rounding decides: what matters is the choice from the graph's own numbers
            if not np.array_equal(found[name], choices[name]):
                raise ParityError(f"graph '{spec.name}': output '{name}' at {point} is not what its numbers ask for")
            continue
        error = relative_error(found[name], truth)
        if not error <= limit:  # also for NaN
            raise ParityError(
                f"graph '{spec.name}' computes something else than the model: output '{name}' at {point}\n"
                f"differs by {error:.2g} of its largest value, expected at most {limit:g}\n"
                "the bundle was not written; please report this"
            )
        worst = max(worst, Measured(spec.name, name, error), key=lambda m: m.error)
    return worst


class Validation:
    """All graphs of a bundle that lies in `folder`, against the model it was made from."""

    def __init__(self, folder: Path, plan: Plan, built: Sequence[Built]) -> None:
        self.folder, self.plan, self.built = folder, plan, built
        self.fits = ROOM * 4 * plan.parameters < free_memory()
        self.truth = Truth(plan.checkpoint, plan.config, plan.external)

    def check_files(self) -> None:
        for built in self.built:
            check_file(self.folder / f"{built.spec.name}.onnx")

    def run(self) -> dict[str, Any]:
        """The manifest's record of what was compared."""
        record: dict[str, Any] = {
            "state": "passed",
            "by": "ONNX Runtime's CPU" + (", a float32 twin" if self.plan.precision.name == "bf16" else ""),
            "limit": LIMITS[self.plan.precision.name],
        }
        if 4 * self.plan.parameters <= CUT_ABOVE:
            return record | {"model": "whole", "graphs": self.measured(self.folder, self.built, self.truth, 3)}
        cut = self.plan.cut()
        with TemporaryDirectory(dir=self.folder) as place:
            built = write_part(cut, Path(place))
            graphs = self.measured(Path(place), built, Truth(cut.checkpoint, cut.config, cut.external), 3)
        record |= {"model": f"{cut.config.blocks} of {self.plan.config.blocks} blocks", "graphs": graphs}
        if not self.fits:
            return record | {"whole": "not run: it does not fit into this machine's memory"}
        return record | {"whole": self.measured(self.folder, self.built, self.truth, 1)}

    def measured(self, folder: Path, built: Sequence[Built], truth: Truth, count: int) -> dict[str, Any]:
        """graph -> the worst of its points."""
        if self.plan.precision.name == "bf16":
            # ONNX Runtime's CPU has no bfloat16: the same graphs with float32 in its place, the weights' values kept.
            with TemporaryDirectory(dir=folder) as place:
                for one in built:
                    name = f"{one.spec.name}.onnx"
                    write_twin(folder / name, Path(place) / name)
                return self.worst(Path(place), built, rounded_truth(truth, built), count)
        return self.worst(folder, built, truth, count)

    def worst(self, folder: Path, built: Sequence[Built], truth: Truth, count: int) -> dict[str, Any]:
        graphs: dict[str, Any] = {}
        limit = LIMITS[self.plan.precision.name]
        for one in measure(folder, [b.spec for b in built], truth.config, truth, limit, count):
            known = graphs.setdefault(one.graph, {"points": 0, "output": "", "error": -1.0})
            known["points"] += 1
            if one.error > known["error"]:
                known |= {"output": one.output, "error": float(f"{one.error:.2g}")}
        return graphs

    def runs(self, golden: Mapping[str, str]) -> dict[str, Any]:
        """Each task's golden run again, by the step graph alone -> the record's "runs", task: error at its end."""
        if self.plan.precision.name == "bf16":
            return {"runs": {"skipped": "ONNX Runtime's CPU has no bfloat16"}}
        record, limit = {}, RUN_LIMITS[self.plan.precision.name]
        for name, file in golden.items():
            if not name.startswith("task_"):
                continue
            task = name.removeprefix("task_")
            arrays = load_file(self.folder / file)
            end = run_step_graph(self.folder / f"{default_run(self.plan.config, task).graph}.onnx", arrays)
            error = relative_error(end, arrays["out.z"])
            if not error <= limit:
                raise ParityError(
                    f"a whole run of task '{task}' by the step graph ends elsewhere than the model's\n"
                    f"found a difference of {error:.2g} of the largest value, expected at most {limit:g}"
                )
            record[task] = float(f"{error:.2g}")
        return {"runs": record, "run_limit": limit}


def write_part(plan: Plan, folder: Path) -> list[Built]:
    """The graphs of a part of the model."""
    weights = Weights(plan.checkpoint, plan.precision.activations, part=True)
    built = plan.build(weights)
    weights.write_derived(folder)
    for one in built:
        weights.place(one.model, one.stored)
        (folder / f"{one.spec.name}.onnx").write_bytes(one.model.SerializeToString())
    return built


def rounded_truth(truth: Truth, built: Sequence[Built]) -> Truth:
    """The same model with those weights rounded that the graphs hold in bfloat16."""
    half = {stored.key for one in built for stored in one.stored.values() if stored.dtype == "bfloat16"}
    external = deepcopy(truth.external)
    if external is not None:
        for name, parameter in external.model.named_parameters():
            if f"autoencoder.{name}" in half:
                parameter.data = parameter.data.bfloat16().float()
    return Truth(truth.checkpoint.with_rounded(half), truth.config, external)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    if not np.isfinite(found).all():
        return float("nan")
    return float(np.abs(found.astype(np.float64) - truth).max() / max(float(np.abs(truth).max()), 1e-30))


def run_step_graph(path: Path, golden: Arrays) -> np.ndarray:
    """A whole run by a step graph, from a golden file's inputs -> the latents at its end."""
    run = session(path)
    names = [spec.name for spec in run.get_inputs()]
    given = {name.removeprefix("in."): array for name, array in golden.items() if name.startswith("in.")}
    rows, z = given.pop("rows"), given["base"]  # [S,m,R]
    noise = given.pop("noise", np.zeros((len(rows), *z.shape), np.float32))
    state = {"point": z, "history": np.zeros((z.shape[0], 3, *z.shape[1:]), np.float32), **given}
    if "mask" in names:
        state |= {"mask": np.ones(z.shape[:2], np.float32), "x0_before": np.zeros_like(z)}
    for row, drawn in zip(rows, noise, strict=True):
        state |= {"row": np.repeat(row[None], len(z), axis=0), "noise": drawn}
        outputs = dict(
            zip([o.name for o in run.get_outputs()], run.run(None, {n: state[n] for n in names}), strict=True)
        )
        state |= {name.removesuffix("_next"): array for name, array in outputs.items() if name.endswith("_next")}
        state["x0_before"] = outputs["x0"]
    return state["base"]
