"""Small models made by hand, and bundles whose graphs a test may spoil and sign again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch (extra export) is not installed")

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.plugins.contract import DOMAIN
from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER, load_config
from mdm.reference.checkpoint import build_model

Dims = list[int | str]


@pytest.fixture(scope="session")
def model_of() -> Callable[..., ModelProto]:
    """model_of(nodes, {"x": ["batch", 4]}, ["y"], types={"x": "float16"}, initializers=[...], functions=[...])"""

    def make(
        nodes: list[NodeProto], inputs: dict[str, Dims], outputs: list[str], types: dict[str, str] | None = None,
        initializers: list[TensorProto] | None = None, functions: Any = (), opset: int = 20,
    ) -> ModelProto:  # fmt: skip
        def number(name: str) -> int:
            kind = (types or {}).get(name, "float32")
            return int(TensorProto.DataType.Value({"float32": "FLOAT"}.get(kind, kind.upper())))

        graph = helper.make_graph(
            nodes, "graph", [helper.make_tensor_value_info(name, number(name), dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(name, number(name), None) for name in outputs], initializers or [],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("other", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Callable[..., Path]:
    """exported("mdm-tiny" or "mdm" or "dim", precision="fp16", ...): a bundle of it, made once."""
    made: dict[str, Path] = {}

    def export(name: str, precision: str = "fp16", **changes: Any) -> Path:
        key = json.dumps([name, precision, changes])
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint: Path | str = SHIPPED_CHECKPOINT
            config: Any = name
            if name != "mdm-tiny":
                config = tiny(family=name, **changes)
                checkpoint = folder / "model.safetensors"
                save_file(build_model(load_config(config)).state_dict(), checkpoint)
                if name == "mdm":
                    shutil.copyfile(SHIPPED_TOKENIZER, folder / "model.tokenizer.model")
            made[key] = export_bundle(
                checkpoint, config, folder / f"{name}.bundle", precision=precision, validate=False
            )
        return made[key]

    return export


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[[Path, str, Callable[[ModelProto], bytes | None]], Path]:
    """spoiled(bundle, graph, change): a copy in which that graph is changed or given other bytes, and signed again."""

    def spoil(bundle: Path, graph: str, change: Callable[[ModelProto], bytes | None]) -> Path:
        copy = Path(shutil.copytree(bundle, tmp_path / "spoiled.bundle"))
        path, manifest = copy / f"{graph}.onnx", json.loads((copy / "manifest.json").read_text())
        model = onnx.load(path, load_external_data=False)
        content = change(model) or model.SerializeToString()
        path.write_bytes(content)
        signed = manifest["files"][path.name]
        signed["sha256"], signed["size"] = hashlib.sha256(content).hexdigest(), len(content)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    return spoil
