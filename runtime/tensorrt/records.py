"""What is known of an engine: a manifest beside it in the bundle, and the same record in the user's cache.

A bundle may come from a stranger, and TensorRT believes an engine whatever it says. So the bundle's manifest says what
an engine claims to be; that it was built here, or that its maker is trusted, is what the record in the cache says.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import ENGINES, Bundle, sha256_of
from mdm.runtime.json_schema import parse_json, validate
from mdm.runtime.tensorrt.facts import BUILDER, key_of
from mdm.runtime.tensorrt.versions import HARDWARE, Kind

MAX_RECORD = 2**20  # bytes; a graph of 20 inputs and three profiles takes 6 KB

_TEXT = {"type": "string", "maxLength": 300, "pattern": r"[^\x00-\x1f\x7f]*", "description": "a line of text"}
_SHA256 = {"type": "string", "pattern": "[0-9a-f]{64}", "description": "a SHA-256"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
_FLAG = {"type": "boolean"}
_SHAPE = {"type": "array", "items": _COUNT, "maxItems": 16}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False,
    }  # fmt: skip


_SCHEMA = _object({
    "facts": _object({
        "builder": {"const": BUILDER},
        "graph": _TEXT,
        "precision": _TEXT,
        "files": {"type": "object", "propertyNames": _TEXT, "additionalProperties": _SHA256},
        "profiles": {
            "type": "array", "minItems": 1, "maxItems": 1000,
            "items": _object({
                "name": _TEXT,
                "shapes": {
                    "type": "object", "propertyNames": _TEXT,
                    "additionalProperties": {"type": "array", "items": _SHAPE, "minItems": 3, "maxItems": 3},
                },
            }),
        },
        "workspace": _COUNT,
        "level": {"type": "integer", "minimum": 0, "maximum": 5},
        "refit": _FLAG, "strip": _FLAG, "stream_weights": _FLAG, "version_compatible": _FLAG,
        "hardware": {"enum": [*HARDWARE]},
        "library": _SHA256 | {"type": ["string", "null"]},
        "kernels": _SHA256 | {"type": ["string", "null"]},
        "tensorrt": _TEXT, "gpu": _TEXT, "platform": _TEXT,
    }),
    "sha256": _SHA256,
    "bytes": _COUNT | {"minimum": 1},
    "seconds": {"type": "number", "minimum": 0, "maximum": 1e9},
    "built": {
        "type": "string", "pattern": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
        "description": "a time in UTC, as in 2026-01-31T12:00:00.000Z",
    },
    "contents": _object({
        "layers": _COUNT,
        "plugins": _COUNT,
        "operators": {
            "type": "array", "maxItems": 1000, "items": {"type": "array", "items": _TEXT, "minItems": 3, "maxItems": 3},
        },
    }),
})  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Of one engine."""

    facts: Mapping[str, Any]  # what facts_of gives
    sha256: str
    bytes: int
    seconds: float  # that the build took
    built: str  # when, in UTC, or when mdm build last found it there: of several engines the newest is run
    contents: Mapping[str, Any]  # layers and plugins, counted, and the kinds of plugins

    @classmethod
    def of_engine(
        cls, path: Path, facts: Mapping[str, Any], seconds: float, built: str, contents: Mapping[str, Any]
    ) -> Record:
        """Of a file that was just built."""
        return cls(facts, sha256_of(path), path.stat().st_size, seconds, built, contents)

    @property
    def profiles(self) -> list[str]:
        """Their names, in the engine's order."""
        return [profile["name"] for profile in self.facts["profiles"]]

    @property
    def operators(self) -> list[Kind]:
        """The plugins that it runs."""
        return [(name, version, namespace) for name, version, namespace in self.contents["operators"]]

    @property
    def stripped(self) -> bool:
        """Its weights are to come from the bundle."""
        return bool(self.facts["strip"])

    @property
    def streams(self) -> bool:
        return bool(self.facts["stream_weights"])

    @property
    def carries_code(self) -> bool:
        """A runtime, and the plugins' library if it has any: TensorRT runs that code on the host."""
        return bool(self.facts["version_compatible"])

    @property
    def how(self) -> list[str]:
        """What was asked of the build beside profiles, as mdm build has it."""
        flags = ("refit", "strip", "stream_weights", "version_compatible", "library")
        hardware = f"hardware {self.facts['hardware']}"
        bodies = not self.facts["kernels"] and not self.facts["library"]
        return [
            *(flag.replace("_", "-") for flag in flags if self.facts[flag]), *["bodies"] * bodies,
            *[hardware] * (self.facts["hardware"] != "this"),
        ]  # fmt: skip

    @property
    def built_for(self) -> str:
        return f"{self.facts['gpu']}, TensorRT {self.facts['tensorrt']} on {self.facts['platform']}"

    def is_of(self, other: Record) -> bool:
        """Of the same engine, which may have been built more than once: all but the times."""
        return replace(self, built=other.built, seconds=other.seconds) == other

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1).encode())

    def check_engine(self, path: Path) -> None:
        """An error where the engine's file is not the one that this was written of."""
        self.open_engine(path).close()

    def open_engine(self, path: Path) -> mmap.mmap:
        """The engine's file in memory, whose content is what this was written of."""
        found = _regular(path)
        if found.st_size != self.bytes:
            raise InputError(f"'{path}' has {found.st_size} bytes, expected {self.bytes}")
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), self.bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # it was changed just now
            raise InputError(f"'{path}' cannot be read: {error}") from error
        if (sha256 := hashlib.sha256(content).hexdigest()) != self.sha256:
            content.close()
            raise InputError(f"'{path}' has the SHA-256 {sha256[:16]}..., expected {self.sha256[:16]}...")
        return content


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_record(path: Path, engine: Path) -> Record:
    """Of an engine, from a file that anyone may have written."""
    _regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECORD + 1)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    what = f"'{path}'"
    fields = parse_json(content, what, MAX_RECORD)
    validate(fields, _SCHEMA, what)
    record = Record(**fields)
    stem = f"{record.facts['graph']}-{key_of(record.facts)}"
    if engine.stem != stem:
        raise InputError(f"{what} is of another engine: '{stem}'")
    return record


def _regular(path: Path) -> os.stat_result:
    try:
        found = path.lstat()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"'{path}' is not a regular file")
    return found


def engine_path(bundle: Bundle, facts: Mapping[str, Any]) -> Path:
    return engines_folder(bundle) / f"{facts['graph']}-{key_of(facts)}.engine"


def engines_folder(bundle: Bundle) -> Path:
    folder = bundle.path / ENGINES
    if folder.is_symlink():  # a bundle is a stranger's: what is written into it stays in it
        raise InputError(f"'{folder}' is a link, expected a folder\nremove it: engines are written into the bundle")
    return folder


def manifest_path(engine: Path) -> Path:
    """What the bundle says of its engine."""
    return engine.with_suffix(".json")


def manifests(bundle: Bundle, graph: str) -> Iterator[tuple[Path, Path]]:
    """A graph's engines, with their manifests; there may be none."""
    folder = engines_folder(bundle)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if re.fullmatch(re.escape(graph) + "-[0-9a-f]{16}\\.json", name):
            yield (folder / name).with_suffix(".engine"), folder / name


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdm-deploy"


def timing_cache(tensorrt: str) -> Path:
    """What TensorRT has measured on this machine. It is the user's, too: TensorRT believes it."""
    return cache_folder() / f"timing-{tensorrt}.cache"


def record_path(engine: Path, sha256: str) -> Path:
    """Of an engine that was built here, or whose maker is trusted. Two copies of a bundle have engines of one name."""
    return cache_folder() / "engines" / engine.stem / f"{sha256}.json"


def known_records(engine: Path) -> list[Record]:
    """What the user's cache has of engines of this name, the newest first."""
    found = []
    for path in record_path(engine, "").parent.glob("*.json"):
        with suppress(InputError):
            found.append(read_record(path, engine))
    return sorted(found, key=lambda record: record.built, reverse=True)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    with made_whole(path) as partial:
        partial.write_bytes(content)


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """An empty file to write, which takes its place at the end: whole, or not at all, whoever else writes it. A link
    that lies in the way is not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(number)
    try:
        yield Path(partial)
        os.chmod(partial, 0o644)  # who runs engines may be another user
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
