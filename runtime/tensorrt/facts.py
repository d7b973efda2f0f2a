"""What makes a TensorRT engine another one: what it is built from, for what, and how.

All of it is in an engine's key, so an engine that is there for just these facts need not be built again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.plugins.gpu.pack import SHIPPED
from mdm.runtime.bundle import Bundle, sha256_of
from mdm.runtime.tensorrt.profiles import Profile, Shapes, shapes_of

BUILDER = 2  # raised when what builds engines changes them, or the key


@dataclass(frozen=True)
class Options:
    """How to build."""

    level: int | None = None  # over the profiles'
    refit: bool = False  # the engine's weights can be replaced by others
    strip: bool = False  # the engine's file has no weights
    stream_weights: bool = False  # weights come over from host memory while it runs
    version_compatible: bool = False  # newer TensorRT runs it too
    hardware: str = "this"  # one of versions.HARDWARE
    library: Path | None = None  # the C++ plugins, instead of those in Python
    bodies: bool = False  # the operators' ONNX bodies, instead of plugins

    def check(self) -> None:
        """An error where two of them do not go together."""
        for first, second, why in self._wrong():
            raise InputError(f"{first} does not go with {second}\n{why}")

    def _wrong(self) -> Iterator[tuple[str, str, str]]:
        if self.strip and self.refit:
            yield "--strip", "--refit", "a stripped engine gets the bundle's weights back, and no others"
        if self.bodies and self.library:
            yield "--bodies", "--library", "with the bodies there are no plugins"
        if self.version_compatible and not self.bodies and not self.library:
            yield (
                "--version-compatible", "the plugins in Python",
                "the runtime that such an engine brings sees only plugins within the engine: add --library or --bodies",
            )  # fmt: skip


def facts_of(
    bundle: Bundle, graph: str, profiles: Sequence[Profile], options: Options, place: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that matters. `place`: where engines are to run, see engines.place_of."""
    return {
        "builder": BUILDER,
        "graph": graph,
        "precision": bundle.manifest["precision"],
        "files": files_of(bundle, graph),
        **settings_of([(profile, shapes_of(bundle.manifest, graph, profile)) for profile in profiles], options),
        **place,
    }


def settings_of(profiles: Sequence[tuple[Profile, Shapes]], options: Options) -> dict[str, Any]:
    """What a build does with a graph."""
    plugins = not options.bodies and not options.library
    return {
        "profiles": [
            {"name": profile.name, "shapes": {name: [list(shape) for shape in three] for name, three in shapes.items()}}
            for profile, shapes in profiles
        ],
        "workspace": max(profile.workspace for profile, _ in profiles),
        "level": max(profile.level for profile, _ in profiles) if options.level is None else options.level,
        "refit": options.refit,
        "strip": options.strip,
        "stream_weights": options.stream_weights,
        "version_compatible": options.version_compatible,
        "hardware": options.hardware,
        "library": sha256_of(options.library) if options.library else None,
        "kernels": shipped_kernels() if plugins else None,
    }


def files_of(bundle: Bundle, graph: str) -> dict[str, str]:
    """The hashes of what a graph is made of."""
    described = bundle.graph(graph)
    return {
        name: bundle.manifest["files"][name]["sha256"] for name in sorted({described["file"], *described["weights"]})
    }


@functools.cache
def shipped_kernels() -> str:
    """The hash of the kernels that the plugins in Python run."""
    return sha256_of(SHIPPED)


def key_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
