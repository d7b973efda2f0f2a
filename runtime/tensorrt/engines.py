"""What an engine file was built from and for.

Engines lie in a bundle's folder `engines`, under a key of everything that makes it another engine. What is known of
them lies in the user's cache: a bundle may come from a stranger, and TensorRT believes an engine and a timing cache
whatever they say.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.plugins.gpu.pack import SHIPPED
from mdm.runtime.bundle import ENGINES, Bundle
from mdm.runtime.tensorrt.profiles import Profile, shapes_of

BUILDER = 1  # raised when what builds engines changes them


def facts_of(bundle: Bundle, graph: str, profile: Profile, place: Mapping[str, str], plugins: bool) -> dict[str, Any]:
    """Everything that matters. `place`: the TensorRT that builds, and the GPU it builds for."""
    described = bundle.graph(graph)
    files = [described["file"], *described["weights"]]
    return {
        "builder": BUILDER,
        "graph": graph,
        "precision": bundle.manifest["precision"],
        "files": {name: bundle.manifest["files"][name]["sha256"] for name in files},
        "profile": profile.name,
        "shapes": {
            name: [list(shape) for shape in three] for name, three in shapes_of(bundle.manifest, graph, profile).items()
        },
        "workspace": profile.workspace,
        "level": profile.level,
        "kernels": hashlib.sha256(SHIPPED.read_bytes()).hexdigest() if plugins else None,
        **place,
    }


def key_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def engine_path(bundle: Bundle, facts: Mapping[str, Any]) -> Path:
    folder = bundle.path / ENGINES
    if folder.is_symlink():  # a bundle is a stranger's: what is written into it stays in it
        raise InputError(f"'{folder}' is a link, expected a folder\nremove it: engines are written into the bundle")
    return folder / f"{facts['graph']}-{key_of(facts)}.engine"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdm-deploy"


def timing_cache(tensorrt: str) -> Path:
    """What TensorRT has measured on this machine."""
    return cache_folder() / f"timing-{tensorrt}.cache"


def record_path(engine: Path) -> Path:
    """Of an engine that was built here."""
    return cache_folder() / "engines" / f"{engine.stem}.json"


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Whole, or not at all, whoever else writes it; a link that lies in the way is not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
