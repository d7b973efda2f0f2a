"""A recorded run, with the states that the runtime's own table goes through on it.

Letters: S evaluations, B samples, L latent tokens, d latent width (for DiM latents are [C,H,W]), m modalities,
R columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mdm.plugins.errors import ParityError
from mdm.runtime.model import Model
from mdm.runtime.request import sampler_for
from mdm.runtime.solver import PARTS, ROW, STOCHASTIC
from mdm.tools.check.finding import Array
from mdm.tools.check.standards.golden_files import CARRIED
from mdm.tools.check.standards.standard import Decoded, Deployed, Run, State


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
