"""What a deployment is measured against: cases for a graph, and whole runs of a task, with the right answers.

A `Standard` is the PyTorch model (`live.py`), the golden files of the bundle (here), or another engine (`other.py`).

Letters: S evaluations, B samples, L latent tokens, T text tokens, d latent width (for DiM latents are [C,H,W]),
m modalities, R columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from mdm.plugins.errors import InputError, ParityError
from mdm.runtime.model import Model
from mdm.runtime.request import sampler_for
from mdm.runtime.solver import PARTS, ROW, STOCHASTIC
from mdm.tools.check.finding import Array
from mdm.tools.check.standards.golden_files import CARRIED, fault_of_case, fault_of_run

State = dict[str, Array]  # what a step graph carries on: base, point, history; mask and x0_before where it selects
Advance = Callable[["Run", int, State], State]  # one evaluation: run, its number, the state before it -> after it


@dataclass(frozen=True)
class Case:
    """Inputs for a graph and what it should say; `deployed`: what the model itself says in the graph's types."""

    label: str
    inputs: State
    expected: State
    deployed: State | None = None


@dataclass(frozen=True)
class Decoded:
    """What latents say: pieces [B,T] and the margin by which each won over the next, pictures [B,C,H,W]."""

    ids: Array | None = None
    margin: Array | None = None
    picture: Array | None = None
    logits: Array | None = None  # [B,T,V], where they are at hand


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a task as it should be. `states` are those before each evaluation, and the last one's result."""

    task: str
    graph: str
    seed: int
    rows: Array  # float64 [S,m,R], as the runtime computes them now
    inputs: State  # what stays the same: y, guidance, given, uncond, uncond_y
    noise: Array | None  # [S,B,..]
    states: list[State]
    decoded: Decoded
    points: Array | None = None  # [S,B,..], where each evaluation led the model's own solver; None where none ran
    recorded: str = "float64"  # the type of the noise estimates that `states` rest on
    deployed: Deployed | None = None

    @property
    def label(self) -> str:
        return f"seed {self.seed}"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def batch(self) -> int:
        return len(self.states[0]["base"])

    def result(self, state: State, evaluation: int) -> Array:
        """What to compare after an evaluation: the point of the next one, and after the last the result."""
        return state["base" if evaluation == len(self) - 1 else "point"]


@dataclass(frozen=True)
class Walk:
    """States after each evaluation: with errors building up, and each from the true state before it."""

    free: list[State]
    forced: list[State]


class Deployed(Protocol):
    """The model itself in the graph's types: it gives the noise floor."""

    def walk(self, run: Run) -> Walk: ...

    def advance(self, run: Run, evaluation: int, state: State) -> State: ...

    def end(self, run: Run) -> Array: ...

    def decode(self, run: Run, z: Array) -> Decoded: ...


class Standard(Protocol):
    name: str
    precision: str  # which row of the fixed table serves where there is no floor

    def cases(self, graph: str) -> Iterator[Case]: ...

    def runs(self, task: str) -> Iterator[Run]: ...


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


def part_of(arrays: Mapping[str, Array], prefix: str) -> State:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def run_of(model: Model, task: str, seed: int, arrays: Mapping[str, Array], deployed: Deployed | None = None) -> Run:
    """A run as `export.golden.reference_run` records it. Its table is computed anew, as the runtime would."""
    given, outputs = part_of(arrays, "in."), part_of(arrays, "out.")
    base, steps = given["base"], int(given["steps"][0])
    sampler = model.manifest["sampler_for"].get(task, model.manifest["sampler"])
    noise = given["noise"] if sampler["solver"] in STOCHASTIC else None
    rows = model.rows(task, sampler_for(sampler, {"steps": steps}))
    if len(rows) != len(outputs["eps"]):
        raise ParityError(
            f"task '{task}': the sampler in the manifest makes {len(rows)} evaluations in {steps} steps\n"
            f"the model's own makes {len(outputs['eps'])}: the manifest's sampler is not the model's"
        )
    graph = model.task(task)["step"]
    taken = {spec["name"] for spec in model.bundle.graph(graph)["inputs"]} - set(CARRIED)
    inputs = {name: array for name, array in given.items() if name in taken}
    spread = Spread(model, graph, base.shape[1])
    states = list(replay(rows, outputs["eps"], base, given.get("given"), noise, outputs.get("mask"), spread))
    picture = outputs["z"] if makes_pixels(model, graph) else outputs.get("picture")
    points = np.concatenate([outputs["points"][1:], outputs["z"][None]])
    decoded = Decoded(outputs.get("ids"), outputs.get("margin"), picture, outputs.get("logits"))
    return Run(task, graph, seed, rows, inputs, noise, states, decoded, points, outputs["eps"].dtype.name, deployed)


def makes_pixels(model: Model, graph: str) -> bool:
    """A DiM without an autoencoder: its latents are the picture."""
    described = model.bundle.graph(graph)
    has_decoder = model.half("decode", described["image_size"]) in model.manifest["graphs"]
    channels = next(spec["shape"][1] for spec in described["inputs"] if spec["name"] == "base")
    return model.text is None and not has_decoder and channels in (1, 3)


class Spread:
    """Lays a row's columns over the latents of a graph: a modality's number goes to its tokens."""

    def __init__(self, model: Model, graph: str, tokens: int) -> None:
        described, self.tokens = model.bundle.graph(graph), [1]
        if len(described["modalities"]) == 2:
            pictures = described["pictures"] * (described["image_size"] // model.picture["patch"]) ** 2
            self.tokens = [tokens - pictures, pictures]

    def columns(self, row: Array) -> dict[str, Array]:
        """row [..,m,R] -> each column [..,L,1], or [..,1,1] where there is one modality"""
        spread = np.repeat(row, self.tokens, axis=-2)[..., None, :]  # [..,L,1,R]
        return dict(zip(ROW, np.moveaxis(spread, -1, 0), strict=True))


def unrest_of(columns: Mapping[str, Array], x0: Array, before: Array, given: Array) -> Array:
    """By what a selecting model ranks tokens: (alpha / sigma)^2 times the mean square that the estimate moved.

    [B,L]; -1 for what is given, which is always selected.
    """
    moved = np.square(x0.astype(np.float64) - before).mean(-1)
    return np.where(given, -1.0, (columns["alpha"] / columns["sigma"]).squeeze(-1) ** 2 * moved)


def tie_of(deployed: Array, unrest: Array, multiple: float) -> float:
    """How near, relative, two tokens' unrest must be for arithmetic to swap them: by what it changes most tokens'."""
    counted = unrest > 0
    return multiple * float(np.median(np.abs(deployed - unrest)[counted] / unrest[counted])) if counted.any() else 0.0


def tie_of_logits(deployed: Array, logits: Array, multiple: float, table: float) -> float:
    """How near two logits must be for arithmetic to swap them; from the table where arithmetic overflows."""
    moved = multiple * float(np.abs(deployed - logits).max())
    return moved if np.isfinite(moved) else table


def replay(
    rows: Array, eps: Array, base: Array, given: Array | None, noise: Array | None, masks: Array | None, spread: Spread
) -> Iterator[State]:
    """The states that a table goes through with these noise estimates, in float64: one before each row, one behind."""
    base = base.astype(np.float64)
    kept = np.zeros((), bool) if given is None else given[..., None]  # [B,L,1]
    history = np.zeros((len(base), 3, *base.shape[1:]))
    state: State = {"base": base, "point": base, "history": history}
    if masks is not None:
        state |= {"mask": masks[0], "x0_before": np.zeros_like(base)}
    for k, row in enumerate(rows):
        yield state
        c, point, estimate = spread.columns(row), state["point"], eps[k].astype(np.float64)
        m = c["p"] * point + c["q"] * estimate
        slots = [np.where(c[f"slot{j}"] == 1, m, state["history"][:, j]) for j in range(3)]
        drawn = np.zeros_like(base) if noise is None else noise[k]
        parts = dict(zip(PARTS, (state["base"], *slots, drawn), strict=True))
        state = {
            kind: np.where(kept, state[kind], sum(c[f"{kind}_{name}"] * part for name, part in parts.items()))
            for kind in ("base", "point")
        } | {"history": np.stack(slots, 1)}
        if masks is not None:
            x0 = np.where(kept, point, (point - c["sigma"] * estimate) / c["alpha"])
            state |= {"mask": masks[min(k + 1, len(masks) - 1)], "x0_before": x0}
    yield state
