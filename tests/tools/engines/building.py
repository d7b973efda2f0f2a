"""Builds in a process of its own, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

from mdm.runtime.bundle import sha256_of

TINY = "step_text"


def build(bundle: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**environment, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    command = [sys.executable, "-m", "mdm.tools.main", "build", str(bundle), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def engines(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines").glob("*.engine"))


def record_of(made: dict[str, Any]) -> Path:
    """What the user's cache has of an engine."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy/engines"
    return folder / Path(made["file"]).stem / f"{made['sha256']}.json"


def change_nodes(bundle: Path, attribute: str, value: str, every: int) -> None:
    """In every so-manieth scan of a graph, signed anew."""
    path = bundle / f"{TINY}.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in [node for node in model.graph.node if node.op_type == "MambaSsdScan"][::every]:
        next(one for one in node.attribute if one.name == attribute).s = value.encode()
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
