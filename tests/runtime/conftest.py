"""For the bundle reader: a small sound bundle, and `refusal`, which uses one up and says how it was refused.

    def test_cut(folder, refusal):
        os.truncate(folder / "step_image.onnx", 5)
        assert "has 5 bytes" in refusal(folder)

The reader parses no graph, so the graphs hold any bytes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from mdm.plugins.errors import MdmError
from mdm.runtime.bundle import manifest_schema, open_bundle

CONTENT: dict[str, bytes] = {
    "step_image.onnx": b"not really a graph" * 20,
    "decode_image.onnx": b"nor this",
    "weights.safetensors": save({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float16)}),
    "tokenizer.model": b"pieces",
    "golden/joint.safetensors": save({"x": np.zeros(2)}, {"mdm": "1"}),
    "sampler/table.json": b"[]",
}

TENSOR = {"name": "point", "dtype": "float32", "shape": ["B", "L", 16]}


def graph(file: str, role: str) -> dict[str, Any]:
    return {
        "file": file, "role": role, "modalities": ["image"], "pictures": 1, "guided": True, "upsample": 0,
        "image_size": None, "inputs": [TENSOR, {"name": "row", "dtype": "bool", "shape": []}], "outputs": [TENSOR],
        "nodes": 12, "operators": {"mdm::MambaSsdScan": 2, "MatMul": 10}, "weights": ["weights.safetensors"],
    }  # fmt: skip


SAMPLER = {
    "solver": "dpmpp_2m", "steps": 20, "guidance": 2.0, "spacing": "logsnr", "t_start": 0.997, "t_end": 0.001,
    "final_zero": False, "eta": 0.5, "order": None,
}  # fmt: skip


def manifest_of(content: dict[str, bytes]) -> dict[str, Any]:
    return {
        "schema": 1, "name": "tiny", "created": "2026-01-31T12:00:00+00:00", "config": {"family": "mdm"},
        "precision": "fp16", "fp32_layers": ["*.norm"], "opset": 21, "parameters": 9,
        "graphs": {
            "step_image": graph("step_image.onnx", "step"), "decode_image": graph("decode_image.onnx", "decode"),
        },
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
        },
        "tasks": {"class_to_image": {"text": "", "image": "made", "drops": "class", "set": "image",
                                     "step": "step_image", "table": "sampler/table.json"}},
        "null_class": 4,
        "row": ["t", "alpha"], "schedules": {"image": {"kind": "cosine"}}, "sampler": SAMPLER,
        "sampler_for": {"joint": SAMPLER},
        "picture": {"channels": 3, "size": 32, "range": [-1, 1], "patch": 4, "latent_scale": None, "factor": 1},
        "text": {"lengths": [8, 20], "vocabulary": 40, "tokenizer": "tokenizer.model", "pad": 0},
        "provenance": {
            "checkpoint": {
                "file": "a b.safetensors", "size": 5, "sha256": "0" * 64, "format": "safetensors", "dtype": "F32"
            },
            "tools": {"torch": "2.13.0+cpu"},
        },
        "validation": {"state": "passed", "limit": 1e-4}, "golden": {"joint": "golden/joint.safetensors"},
    }  # fmt: skip


MANIFEST = manifest_of(CONTENT)


@pytest.fixture
def manifest() -> dict[str, Any]:
    """The sound bundle's manifest, to be changed at will."""
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound bundle, which a test may spoil. Beside it lies a file that no bundle may reach."""
    made = tmp_path / "tiny.bundle"
    for name, data in CONTENT.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    (made / "manifest.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "secret").write_bytes(b"secret")
    return made


OPENED: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir") and not isinstance(arguments[0], int):
        OPENED.append(os.fsdecode(arguments[0] or "."))


sys.addaudithook(note_opened)  # for good: a hook cannot be taken away


@contextlib.contextmanager
def opened_inside(folder: Path) -> Iterator[list[str]]:
    """What is opened meanwhile; anything outside of the folder is a failure."""
    global OPENED
    manifest_schema()  # read once, from the package
    opened: list[str] = []
    OPENED = opened
    try:
        yield opened
    finally:
        OPENED = None
    root = folder.resolve()
    assert [path for path in set(opened) if not Path(path).resolve().is_relative_to(root)] == []


@pytest.fixture
def inside() -> Callable[[Path], contextlib.AbstractContextManager[list[str]]]:
    return opened_inside


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """Opens a bundle and asks for everything: "" if all is as signed, else what the MdmError says."""

    def use_all(folder: Path) -> str:
        said = ""
        with opened_inside(folder):
            try:
                bundle = open_bundle(folder)
                bundle.extra_files()
                for name in bundle.manifest["graphs"]:
                    content = bundle.graph_bytes(name)
                    assert hashlib.sha256(content).hexdigest() == bundle.manifest["files"][f"{name}.onnx"]["sha256"]
                for name in bundle.manifest["files"]:
                    assert bundle.file(name).resolve().is_relative_to(folder.resolve())
                bundle.verify()
            except MdmError as error:
                said = str(error) or repr(error)
        assert len(said.splitlines()) <= 3
        if not said:  # parsed strictly, it is still what any reader of JSON sees
            assert bundle.manifest == json.loads((folder / "manifest.json").read_bytes())
        return said

    return use_all
