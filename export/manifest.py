"""The manifest of a bundle: everything a host must know that is not in the graphs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from onnx import ValueInfoProto

from mdm.export.golden import default_run, set_of, tasks_of
from mdm.export.graph import ONNX_TYPES
from mdm.export.graphs import Built, Plan
from mdm.plugins.machine import versions
from mdm.reference.tokenizer import PAD
from mdm.runtime.bundle import SCHEMA
from mdm.runtime.solver import ROW, sampler_of

NAMES = {int(number): name for name, number in ONNX_TYPES.items()}
TOOLS = ("mdm-deploy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "numpy", "safetensors")


def graph_entry(built: Built) -> dict[str, Any]:
    spec, graph = built.spec, built.model.graph
    operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return {
        "file": f"{spec.name}.onnx",
        "role": spec.role,
        "modalities": list(spec.modalities),
        "pictures": spec.pictures,
        "guided": spec.guided,
        "upsample": spec.upsample,
        "image_size": spec.image_size,
        "inputs": [_tensor(info) for info in graph.input],
        "outputs": [_tensor(info) for info in graph.output],
        "nodes": len(graph.node),
        "operators": dict(sorted(operators.items())),
        "weights": sorted({stored.file for stored in built.stored.values()}),
    }


def _tensor(info: ValueInfoProto) -> dict[str, Any]:
    tensor = info.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": info.name, "dtype": NAMES[tensor.elem_type], "shape": shape}


def facts_of(plan: Plan, sha256: str, tokenizer: str | None) -> dict[str, Any]:
    """What a host must know beside the graphs and files; `sha256` is the checkpoint's."""
    config, external, checkpoint = plan.config, plan.external, plan.checkpoint
    fields = json.loads(config.to_json())
    tasks = tasks_of(config)
    factor = external.model.shape.factor if external else 1
    text = None
    if config.family == "mdm":
        text = {
            "lengths": list(config.text_lengths), "vocabulary": config.vocabulary, "tokenizer": tokenizer, "pad": PAD,
        }  # fmt: skip
    specs = {"image": config.schedule_image, "text": config.schedule_text}
    return {
        "schema": SCHEMA,
        "config": fields,
        "precision": plan.precision.name,
        "fp32_layers": list(plan.precision.fp32_layers),
        "opset": plan.opset,
        "parameters": plan.parameters,
        "tasks": {
            name: {
                "text": task.text,
                "image": task.image,
                "drops": task.drops,
                "set": set_of(task),
                "step": default_run(config, name, 1).graph,
                "table": f"sampler/{name}.json",
            }
            for name, task in tasks.items()
        },
        "null_class": config.classes,
        "row": list(ROW),
        "schedules": {modality: dict(spec) for modality, spec in specs.items() if spec},
        "sampler": sampler_of(fields),
        "sampler_for": {task: sampler_of(fields, task) for task in config.sampler_for if task in tasks},
        "picture": {
            "channels": external.model.shape.picture if external else config.in_channels,
            "size": config.image_size * factor,
            "range": [-1.0, 1.0],
            "patch": config.patch,
            "latent_scale": external.scale if external else None,
            "factor": factor,
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
            "tools": versions(TOOLS),
        },
    }
