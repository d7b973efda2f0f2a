"""Tiny models beside what they were exported to: each is made once a session, and only read.

"mdm" has a solver of its own for most tasks, "keep" selects tokens, "dim" adds noise at every step and has upsample
guidance, "latent" works in the latents of an external autoencoder, "half" is "mdm" in float16.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from mdm.runtime.bundle import open_bundle
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend
from mdm.tools.check.finding import Array
from mdm.tools.check.standards.blueprint import make_blueprint
from mdm.tools.check.standards.golden import GoldenStandard
from mdm.tools.check.standards.live import ReferenceStandard

SOLVERS_FOR = {
    "joint": {"solver": "dpmpp_2m_sde", "steps": 4}, "caption": {"solver": "mdm-paper", "steps": 4},
    "complete": {"solver": "heun"}, "ask": {"solver": "dim", "steps": 4},
}  # fmt: skip
# Of each: what differs from the tiny config, and how it is exported.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mdm": ({"sampler_for": SOLVERS_FOR}, {}),
    "keep": ({"keep": 0.5, "schedule_text": {"kind": "sd"}}, {}),
    "dim": ({"family": "dim", "sampler": {"solver": "euler-maruyama", "steps": 4, "guidance": 0.4}}, {"upsample": [2]}),
    "latent": ({"family": "dim", "in_channels": 4}, {}),
    "half": ({"sampler_for": SOLVERS_FOR}, {"precision": "fp16", "validate": False}),
}


@dataclass(frozen=True)
class Exported:
    bundle: Path
    checkpoint: Path
    autoencoder: Path | None

    def opened(self) -> Model:
        bundle = open_bundle(self.bundle)
        return Model(bundle, OrtBackend(bundle, threads=1))

    @cached_property
    def model(self) -> Model:
        return self.opened()

    @cached_property
    def reference(self) -> ReferenceStandard:
        return self.against_model((0,))

    def against_model(self, seeds: tuple[int, ...]) -> ReferenceStandard:
        return ReferenceStandard(
            self.model, make_blueprint(self.model.bundle, self.checkpoint, self.autoencoder), seeds
        )

    @cached_property
    def golden(self) -> GoldenStandard:
        return GoldenStandard(self.model)


def sign(folder: Path) -> None:
    """Sign all of a spoiled bundle anew, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for file, signed in manifest["files"].items():
        content = (folder / file).read_bytes()
        signed |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def spoil_golden(source: Path, folder: Path, name: str, change: Callable[[dict[str, Array]], object]) -> Path:
    """A copy of a bundle with one golden file changed, and signed anew."""
    shutil.copytree(source, folder)
    file = folder / "golden" / f"{name}.safetensors"
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file)
    sign(folder)
    return folder


def spoil_manifest(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
