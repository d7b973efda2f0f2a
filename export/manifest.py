"""The manifest of a bundle: everything a host must know that is not in the graphs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from onnx import ModelProto, ValueInfoProto

from mdm.export.golden import set_of, tasks_of
from mdm.export.graph import ONNX_TYPES
from mdm.export.graphs import Built
from mdm.export.precision import Precision
from mdm.export.weights import Checkpoint
from mdm.reference.config import Config
from mdm.runtime.bundle import SCHEMA
from mdm.runtime.solver import ROW, sampler_of

NAMES = {int(number): name for name, number in ONNX_TYPES.items()}
TOOLS = ("mdm-deploy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "numpy", "safetensors")


def tool_versions() -> dict[str, str]:
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime-gpu is another distribution
            continue
    return found


def graph_entry(built: Built, model: ModelProto) -> dict[str, Any]:
    spec = built.spec
    operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return {
        "file": f"{spec.name}.onnx",
        "role": spec.role,
        "modalities": list(spec.modalities),
        "pictures": spec.pictures,
        "guided": spec.guided,
        "upsample": spec.upsample,
        "image_size": spec.image_size,
        "inputs": [_tensor(info) for info in model.graph.input],
        "outputs": [_tensor(info) for info in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(sorted(operators.items())),
        "weights": sorted({stored.file for stored in built.stored.values()}),
    }


def _tensor(info: ValueInfoProto) -> dict[str, Any]:
    tensor = info.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": info.name, "dtype": NAMES[tensor.elem_type], "shape": shape}


def make_manifest(
    name: str,
    created: str,
    config: Config,
    checkpoint: Checkpoint,
    sha256: str,
    precision: Precision,
    opset: int,
    graphs: Mapping[str, dict[str, Any]],
    files: Mapping[str, dict[str, Any]],
    tokenizer: str | None,
    autoencoder: dict[str, Any] | None,
    validation: dict[str, Any],
    golden: dict[str, str],
) -> dict[str, Any]:
    tasks = tasks_of(config)
    fields = json.loads(config.to_json())
    text = None
    if config.family == "mdm":
        text = {"lengths": list(config.text_lengths), "vocabulary": config.vocabulary, "tokenizer": tokenizer}
    return {
        "schema": SCHEMA,
        "name": name,
        "created": created,
        "config": fields,
        "precision": precision.name,
        "fp32_layers": list(precision.fp32_layers),
        "opset": opset,
        "parameters": sum(math.prod(shape) for shape in checkpoint.expected.values()),
        "graphs": dict(graphs),
        "files": {path: files[path] for path in sorted(files)},
        "tasks": {
            task: {"text": t.text, "image": t.image, "drops": t.drops, "graph": set_of(t)} for task, t in tasks.items()
        },
        "row": list(ROW),
        "schedules": {"image": dict(config.schedule_image)}
        | ({"text": dict(config.schedule_text)} if config.schedule_text else {}),
        "sampler": sampler_of(fields),
        "sampler_for": {task: sampler_of(fields, task) for task in config.sampler_for if task in tasks},
        "picture": {
            "channels": 3 if autoencoder else config.in_channels,
            "size": config.image_size * (autoencoder["factor"] if autoencoder else 1),
            "range": [-1.0, 1.0],
            "patch": config.patch,
            "latent_scale": autoencoder["scale"] if autoencoder else None,
            "factor": autoencoder["factor"] if autoencoder else 1,
        },
        "text": text,
        "provenance": {
            "checkpoint": {
                "file": checkpoint.path.name,
                "size": checkpoint.path.stat().st_size,
                "sha256": sha256,
                "format": checkpoint.format,
                "dtype": checkpoint.bulk_type,
            },
            "tools": tool_versions(),
        },
        "validation": validation,
        "golden": golden,
    }
