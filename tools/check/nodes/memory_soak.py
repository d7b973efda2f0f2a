"""How much memory it takes to find one wrong node in a large graph: python -m mdm.tools.check.nodes.memory_soak FOLDER

A random MDM of 49 blocks at width 1024 is exported, one node of a late block is spoilt, and the graph is bisected. What
is counted as weights is what the backend's session of the whole graph takes before it runs.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from mdm.export import export_bundle
from mdm.export.truth import Point
from mdm.export.weights import empty_model, shapes_of
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend
from mdm.runtime.safetensors_header import Entry, write_header
from mdm.tools.check.finding import Array
from mdm.tools.check.limits import ROUNDING, Multiples
from mdm.tools.check.nodes.bisect import bisect
from mdm.tools.check.standards.blueprint import make_blueprint

CONFIG: dict[str, Any] = {
    "family": "mdm", "width": 1024, "blocks": 49, "in_channels": 3, "image_size": 32, "patch": 2, "classes": 4,
    "state": 128, "head": 64, "latent": 12, "vae_width": 32, "vocabulary": 40, "text_lengths": [8],
    "schedule_image": {"kind": "cosine", "shift": 0.5}, "schedule_text": {"kind": "cosine", "shift": 2.0},
    "sampler": {"solver": "ddim", "steps": 3, "guidance": 1.5, "t_start": 0.99},
}  # fmt: skip
MOST = 2000  # MB
GRAPH, NODE = "denoise_image", "backbone.blocks.40.mixers.0.norm.Add"  # the epsilon under a root


def soak(folder: Path) -> bool:
    """Whether the right node is named in less than `MOST` beyond the weights."""
    checkpoint = folder / "random.safetensors"
    write_checkpoint(checkpoint)
    out = folder / "random.bundle"
    bundle = open_bundle(export_bundle(checkpoint, CONFIG, out, tokenizer=SHIPPED_TOKENIZER, validate=False))
    blueprint = make_blueprint(bundle, checkpoint, None)
    inputs = blueprint.truth.inputs(blueprint.spec(GRAPH), Point(2))
    backend = OrtBackend(bundle)
    operators = bundle.graph(GRAPH)["operators"]

    def run(model: onnx.ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        found: list[Array] = backend.session(model.SerializeToString(), GRAPH, operators).run(wanted, feeds)
        return found

    before = peak()
    backend.session(bundle.graph_bytes(GRAPH), GRAPH, operators)
    weights = peak() - before
    started = time.monotonic()
    errors, divergence = bisect(
        GRAPH, spoilt(onnx.load_from_string(bundle.graph_bytes(GRAPH))), blueprint.model(GRAPH),
        lambda name: blueprint.value(GRAPH, name), inputs, run, Multiples(), folder / "case",
    )  # fmt: skip
    seconds, whole = time.monotonic() - started, peak()
    named = divergence.node if divergence else "nothing"
    print(f"{len(errors.parts)} parts, {blueprint.plan.parameters / 1e6:.0f} M parameters, {seconds:.0f} s")
    print(f"peak {whole:.0f} MB, of which a session's weights {weights:.0f} MB: {whole - weights:.0f} MB beyond them,")
    print(f"Python and torch among them; aim: at most {MOST} MB")
    rounding = ROUNDING["float32"]
    own = zip(errors.parts, errors.own, errors.own_floor, strict=True)
    others = [error / max(floor, rounding) for part, error, floor in own if not NODE.startswith(f"{part}.")]
    print(f"the sound parts' own errors are up to {max(others):.2g} times their floor")
    print(f"named {named}, spoilt was {NODE}: {divergence.said if divergence else ''}")
    return named == NODE and whole - weights <= MOST


def write_checkpoint(path: Path) -> None:
    """Random weights, tensor by tensor, of the sizes that a trained model has."""
    shapes = shapes_of(empty_model(load_config(CONFIG)))
    entries, end = {}, 0
    for name, shape in shapes.items():
        entries[name] = Entry("F32", shape, end, 4 * math.prod(shape))
        end += 4 * math.prod(shape)
    draw = torch.Generator().manual_seed(1)
    with open(path, "wb") as file:
        file.write(write_header(entries))
        for name, shape in shapes.items():
            file.write(values(name, shape, draw).numpy().tobytes())


def values(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return (1 + 15 * torch.rand(shape, generator=draw)).log()
    if leaf == "dt_bias":
        return torch.expm1(0.001 + 0.1 * torch.rand(shape, generator=draw)).log()
    if leaf in ("D", "latent_scale") or ("norm" in name and leaf == "weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=draw) / math.sqrt(math.prod(shape[1:]) or 1)


def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
    node = next(node for node in model.graph.node if node.name == NODE)
    node.input[1] = "wrong"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "wrong"))
    return model


def peak() -> float:
    """Of this process's resident memory so far, in MB; counted anew from here on."""
    status = Path("/proc/self/status").read_text()
    found = next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return found


if __name__ == "__main__":
    sys.exit(0 if soak(Path(sys.argv[1])) else 1)
