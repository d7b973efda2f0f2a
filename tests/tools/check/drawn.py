"""A bundle of a tiny random model with its blueprint, and ONNX Runtime for any part of its graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto
from safetensors.torch import save_file
from torch import Tensor

from mdm.export import export_bundle
from mdm.export.graphs import GraphSpec
from mdm.export.truth import Point
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.checkpoint import build_model
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import engine_errors, session_options
from mdm.tools.check.finding import Array
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes.bisect import bisect
from mdm.tools.check.nodes.submodel import Run
from mdm.tools.check.report import BlockErrors, Divergence
from mdm.tools.check.standards.blueprint import Blueprint, make_blueprint

GRAPH = "denoise_joint"


@dataclass
class Drawn:
    folder: Path  # the bundle
    blueprint: Blueprint

    def spec(self, graph: str) -> GraphSpec:
        return self.blueprint.spec(graph)

    def file(self, graph: str) -> ModelProto:
        return onnx.load(str(self.folder / f"{graph}.onnx"), load_external_data=False)

    def values(self, graph: str) -> Any:
        return lambda name: self.blueprint.value(graph, name)

    def inputs(self, graph: str, seed: int = 0, batch: int = 2) -> dict[str, Array]:
        """Of an odd text length where there is text."""
        spec, config = self.spec(graph), self.blueprint.plan.config
        size = (16, 8) if config.family == "dim" else (0, 0)
        return self.blueprint.truth.inputs(spec, Point(batch, 5 if "text" in spec.modalities else 0, size), seed)

    def run(self, model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        options = session_options(self.folder, threads=1)
        with engine_errors("a graph"):
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            found: list[Array] = session.run(wanted, feeds)
        return found

    def copy(self, folder: Path) -> Drawn:
        """With files of its own, to be spoilt."""
        shutil.copytree(self.folder, folder)
        return Drawn(folder, self.blueprint)


def draw(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: Any) -> Drawn:
    """Export and draw again; options are those of `export_bundle`."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint)
    if config["family"] == "mdm":
        shutil.copyfile(SHIPPED_TOKENIZER, folder / "model.tokenizer.model")
    with torch.random.fork_rng():
        out = export_bundle(checkpoint, config, folder / "a.bundle", validate=False, **options)
    return Drawn(out, make_blueprint(open_bundle(out), checkpoint, options.get("autoencoder")))


Make = Callable[..., Drawn]


def maker(tmp_path_factory: Any, tiny: Any, tiny_model: Any) -> Make:
    """make(precision=..., keep=..., ...): the same one for the same options."""
    known: dict[str, Drawn] = {}

    def made(precision: str = "fp32", tensors: dict[str, Tensor] | None = None, **changes: Any) -> Drawn:
        key = f"{precision} {changes} {id(tensors) if tensors else ''}"
        if key not in known:
            config = tiny(**changes)
            if tensors is None and config["family"] == "dim":
                with torch.random.fork_rng():
                    torch.manual_seed(3)
                    tensors = build_model(load_config(config)).state_dict()
            tensors = tensors or tiny_model(**changes).state_dict()
            known[key] = draw(tmp_path_factory.mktemp("drawn"), config, tensors, precision=precision)
        return known[key]

    return made


def place(
    drawn: Drawn, file: ModelProto | None = None, run: Run | None = None, graph: str = GRAPH, seed: int = 0,
    folder: Path | None = None,
) -> tuple[BlockErrors, Divergence | None]:  # fmt: skip
    return bisect(
        graph, file or drawn.file(graph), drawn.blueprint.model(graph), drawn.values(graph),
        drawn.inputs(graph, seed), run or drawn.run, Multiples(), folder,
    )  # fmt: skip


def node_named(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)
