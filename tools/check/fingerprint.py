"""Everything that a check's result depends on, and the versions of what was at work."""

from __future__ import annotations

import platform

from mdm.plugins import machine
from mdm.plugins.errors import EnvironmentLackError
from mdm.plugins.library import cpu_library_path, instruction_set
from mdm.runtime.bundle import MANIFEST, sha256_of
from mdm.runtime.model import Model

TOOLS = ("mdm-deploy", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "onnx")


def fingerprint(model: Model) -> dict[str, str]:
    bundle, manifest = model.bundle, model.manifest
    made = manifest["provenance"]
    return {
        "bundle": f"{manifest['name']}, made {manifest['created']}",
        "manifest": sha256_of(bundle.path / MANIFEST),
        "checkpoint": f"{made['checkpoint']['file']}, {made['checkpoint']['sha256']}",
        "precision": ", ".join([manifest["precision"], *(f"fp32: {one}" for one in manifest["fp32_layers"])]),
        "exported with": ", ".join(f"{name} {number}" for name, number in made["tools"].items()),
        "backend": model.backend.name,
        "cpu": f"{machine.cpu_name()}, {getattr(model.backend, 'threads', None) or machine.cores().threads} threads",
        "scans": scans(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **machine.versions(TOOLS),
    }


def scans() -> str:
    """What computes our operators on the CPU."""
    try:
        return f"native library, {instruction_set()}, {sha256_of(cpu_library_path())}"
    except EnvironmentLackError:
        return "function bodies"
