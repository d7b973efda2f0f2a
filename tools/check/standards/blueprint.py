"""What a bundle should hold: its graphs drawn anew from the checkpoint, and the PyTorch model beside them in float64.

The drawing has a name for every tensor, so that errors can be placed; the model knows nothing of graphs. That they say
the same in float64 is measured here, and only then is the drawing a standard for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor

from mdm.export.bundle import external_of, make_plan
from mdm.export.graphs import Built, GraphSpec, Plan
from mdm.export.precision import make_precision
from mdm.export.truth import Truth
from mdm.export.weights import Stored, Weights
from mdm.plugins.errors import InputError
from mdm.reference import load_config
from mdm.runtime.bundle import Bundle, sha256_of
from mdm.tools.check.nodes.evaluator import Evaluation

MOST_HELD = 1_000_000_000  # bytes of weights in float32 that are kept in memory rather than read at every use


@dataclass
class Blueprint:
    """A bundle's graphs as this version of the exporter draws them."""

    plan: Plan
    weights: Weights
    built: Mapping[str, Built]
    truth: Truth  # float64
    held: dict[Stored, Tensor] = field(default_factory=dict)  # a small model's weights, once they were read

    def spec(self, graph: str) -> GraphSpec:
        return self.built[graph].spec

    def model(self, graph: str) -> ModelProto:
        return self.built[graph].model

    def value(self, graph: str, name: str) -> Tensor:
        """An initializer as the checkpoint has it, before any rounding to the graph's type."""
        stored = self.built[graph].stored[name]
        if 4 * self.plan.parameters > MOST_HELD:
            return self.weights.value(stored)
        if stored not in self.held:
            self.held[stored] = self.weights.value(stored)
        return self.held[stored]

    def evaluation(self, graph: str, exact: bool) -> Evaluation:
        return Evaluation(self.model(graph), partial(self.value, graph), exact)


def make_blueprint(bundle: Bundle, checkpoint: Path, autoencoder: Path | None) -> Blueprint:
    """Draw the bundle's graphs again. The checkpoint must be the one that the bundle was exported from."""
    manifest = bundle.manifest
    signed = manifest["provenance"]["checkpoint"]["sha256"]
    if (found := sha256_of(checkpoint)) != signed:
        raise InputError(
            f"'{checkpoint}' is not the checkpoint that bundle '{bundle.path}' was exported from\n"
            f"its SHA-256 is {found[:16]}..., the manifest has {signed[:16]}...\n"
            "name the right one with --checkpoint"
        )
    own = manifest["config"]["image_size"]
    graphs: Mapping[str, Any] = manifest["graphs"]
    sizes = dict.fromkeys([own, *(g["image_size"] for g in graphs.values() if g["image_size"])])
    factors = {graph["upsample"] for graph in graphs.values()} - {0}
    external = external_of(autoencoder, manifest["picture"]["latent_scale"]) if autoencoder else None
    plan = make_plan(
        checkpoint, load_config(manifest["config"]), make_precision(manifest["precision"], manifest["fp32_layers"]),
        manifest["opset"], list(sizes), sorted(factors), external,
    )  # fmt: skip
    weights = Weights(plan.checkpoint, plan.precision.activations)
    built = {one.spec.name: one for one in plan.build(weights)}
    return Blueprint(plan, weights, built, Truth(plan.checkpoint, plan.config, external, torch.float64))
