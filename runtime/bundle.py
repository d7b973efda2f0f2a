"""Reads a bundle: a folder from a stranger, in which nothing is trusted.

`open_bundle` checks the manifest against `manifest.schema.json`, and that every file it signs is there, a regular file
inside the folder, of the signed size. No file's content is parsed before that: a graph's bytes are handed out only if
they hash to what the manifest signs, and `verify` hashes everything. What the manifest does not list is never read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import parse_json, told, validate
from mdm.runtime.safetensors_header import read_header
from mdm.runtime.words import nearest

MANIFEST = "manifest.json"
ENGINES = "engines"  # made from the bundle on one machine: not part of what the manifest signs
SCHEMA = 1
MAX_MANIFEST = 16 * 2**20  # bytes
MAX_CONTENT = 64 * 2**20  # bytes of a file that is read whole: a graph, its weights beside it, has a few hundred KB
MAX_VALUES = 2**28  # of one input or output: 1 GB in float32


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `manifest` fits the schema and names only files that are there."""

    path: Path
    manifest: dict[str, Any]

    def graph(self, name: str) -> dict[str, Any]:
        """What the manifest says of a graph."""
        graphs: dict[str, dict[str, Any]] = self.manifest["graphs"]
        if name not in graphs:
            raise InputError(
                f"bundle '{self.path}' has no graph {told(name)}{nearest(name, graphs)}\n"
                f"graphs: {', '.join(graphs) or 'none'}"
            )
        return graphs[name]

    def graph_bytes(self, name: str) -> bytes:
        """A graph's file, whole, after its hash was found right."""
        return self.content(self.graph(name)["file"])

    def content(self, name: str) -> bytes:
        """A small file, whole, after its hash was found right."""
        path, signed = self.file(name), self.manifest["files"][name]
        if signed["size"] > MAX_CONTENT:
            raise InputError(f"file '{path}' has {signed['size']} bytes, expected at most {MAX_CONTENT}")
        with _reading(path), path.open("rb") as opened:
            content = opened.read(MAX_CONTENT + 1)
        _compare(hashlib.sha256(content).hexdigest(), signed["sha256"], path)
        return content

    def file(self, name: str) -> Path:
        """Where a file of the manifest lies, checked again: it is there, regular, of the signed size."""
        signed = self.manifest["files"]
        if name not in signed:
            raise InputError(f"the manifest of bundle '{self.path}' lists no file {told(name)}{nearest(name, signed)}")
        return _find(self.path, name, signed[name]["size"])

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Hash every file; the first that is not the signed one is an error. `progress` is told bytes as they pass."""
        for name in self.manifest["files"]:
            self.check(name, progress)

    def check(self, name: str, progress: Callable[[int], object] | None = None) -> None:
        """Hash a file of the manifest."""
        path = self.file(name)
        _compare(sha256_of(path, progress), self.manifest["files"][name]["sha256"], path)

    def extra_files(self) -> list[str]:
        """What lies in the folder without being listed, engines aside; links are named, not followed."""
        known = {MANIFEST, *self.manifest["files"]}
        return sorted(name for name in _names(self.path) if name not in known)


def open_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder, after every check that takes no time: all but the hashes."""
    root = Path(path)
    try:
        found = root.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        found = False
    if not found:
        raise InputError(f"bundle '{path}' is not a folder\nexpected what mdm export writes: a folder with {MANIFEST}")
    what = f"manifest of bundle '{path}'"
    manifest = parse_json(_read_manifest(root), what, MAX_MANIFEST)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise InputError(
            f"bundle '{path}' was made by a newer mdm-deploy: its manifest has schema {schema}\n"
            f"expected at most {SCHEMA}: upgrade mdm-deploy"
        )
    validate(manifest, manifest_schema(), what)
    for name, signed in manifest["files"].items():
        if name == MANIFEST or name.startswith(f"{ENGINES}/"):
            raise InputError(f"{what} lists the file '{name}'\nexpected neither itself nor anything below {ENGINES}/")
        _find(root, name, signed["size"])
    for user, name in _named_files(manifest):
        if name not in manifest["files"]:
            raise InputError(f"{what}: {user} is {told(name)}, which is not one of its files")
    for name, graph in manifest["graphs"].items():
        _check_graph(name, graph, what)
    for name, task in manifest["tasks"].items():
        if task["step"] not in manifest["graphs"]:
            raise InputError(f"{what}: the step graph of task '{name}' is {told(task['step'])}, which is not there")
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            read_header(root / name)
    return Bundle(root, manifest)


@functools.cache
def manifest_schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((files("mdm.runtime") / "manifest.schema.json").read_text("utf-8"))
    return schema


def sha256_of(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file, read in pieces; `progress` is told the size of each piece."""
    with _reading(path), _Counted(path, progress) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Counted(io.FileIO):
    """A file that tells `progress` of every piece `hashlib.file_digest` reads from it."""

    def __init__(self, path: str | Path, progress: Callable[[int], object] | None) -> None:
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        if size and self.progress is not None:
            self.progress(size)
        return size


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"file '{path}' cannot be read: {error.strerror}") from error


def _compare(found: str, signed: str, path: Path) -> None:
    if found != signed:
        raise InputError(
            f"'{path}' is not the file that the manifest signs\n"
            f"its SHA-256 is {found[:16]}..., expected {signed[:16]}...: it was changed, copy or export it again"
        )


def _read_manifest(root: Path) -> bytes:
    path = _find(root, MANIFEST)
    with _reading(path), path.open("rb") as file:
        return file.read(MAX_MANIFEST + 1)


def _find(root: Path, name: str, size: int | None = None) -> Path:
    """A file of the bundle, by lstat alone: there, no link on the way to it, regular, of that size."""
    path = root
    for part in name.split("/"):
        path = path / part
        try:
            found = path.lstat()
        except OSError as error:
            raise InputError(
                f"bundle '{root}' lacks the file '{name}': {error.strerror}\n"
                f"expected {MANIFEST} and every file that it lists; was the folder copied whole?"
            ) from error
        if stat.S_ISLNK(found.st_mode):
            raise InputError(
                f"'{path}' is a link, expected a file of its own\n"
                "a link may lead out of the bundle; ONNX Runtime and onnx.checker refuse such files\n"
                "copy the bundle with its links followed: cp -rL"
            )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"'{path}' in a bundle is not a regular file")
    if size is not None and found.st_size != size:
        raise InputError(
            f"'{path}' has {found.st_size} bytes, the manifest signs {size}\n"
            "it was cut or changed: copy or export the bundle again"
        )
    return path


def _check_graph(name: str, graph: dict[str, Any], what: str) -> None:
    if graph["file"] != f"{name}.onnx":
        raise InputError(f"{what}: graph '{name}' has the file '{graph['file']}', expected '{name}.onnx'")
    for tensor in graph["inputs"] + graph["outputs"]:
        if math.prod(size for size in tensor["shape"] if isinstance(size, int)) > MAX_VALUES:
            raise InputError(
                f"{what}: graph '{name}' has the tensor {told(tensor['name'])} of shape {tensor['shape']}\n"
                f"expected at most {MAX_VALUES} values"
            )


def _named_files(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every place in a manifest that names a file, and the name."""
    for name, graph in manifest["graphs"].items():
        yield f"the file of graph '{name}'", graph["file"]
        for weights in graph["weights"]:
            yield f"a weights file of graph '{name}'", weights
    for name, task in manifest["tasks"].items():
        yield f"the table of task '{name}'", task["table"]
    for name, file in manifest["golden"].items():
        yield f"golden {told(name)}", file
    if manifest["text"] and manifest["text"]["tokenizer"] is not None:
        yield "the tokenizer", manifest["text"]["tokenizer"]


def _names(root: Path) -> Iterator[str]:
    """The files and links below a folder, with / between the parts; no link is followed."""
    folders = [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        with _reading(folder), os.scandir(folder) as entries:
            for entry in entries:
                # Bytes that are no text, which a file's name may hold, could not be printed.
                name = prefix + os.fsencode(entry.name).decode("utf-8", "backslashreplace")
                if not entry.is_dir(follow_symlinks=False):
                    yield name
                elif name != ENGINES:
                    folders.append((Path(entry.path), f"{name}/"))
