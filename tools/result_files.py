"""Where results go: numbered files of a folder with a line each in `results.jsonl`, or one picture that was named.

    out/0000.png  0001.png  0000-0001-grid.png  0000-filmstrip.png  0000-step05.png  results.jsonl

Numbers go on from what is there, so nothing in a folder is overwritten. A file appears whole or not at all.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.runtime import Result
from mdm.runtime.bundle import sha256_of
from mdm.tools.requests_file import METADATA, PICTURE_HASH

RESULTS = "results.jsonl"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def files_for(out: Path | None, count: int, pictures: bool) -> ResultFiles | None:
    """Where `count` results go, with new pictures among them or without; None: nowhere."""
    if out is None and not pictures:
        return None
    out = out or Path("out")
    try:
        named = out.suffix.lower() in PICTURE_SUFFIXES and not out.is_dir()
        if named and not pictures:
            raise InputError(f"--out '{out}' names a picture, but this makes text alone\nname a folder")
        if named and out.suffix != ".png":
            raise InputError(
                f"--out '{out}' is no name for a PNG file\npictures are written as .png: name one, or a folder"
            )
        if named and count > 1:
            raise InputError(f"--out '{out}' names one picture, but {count} are to be made\nname a folder")
        files = ResultFiles(out.parent, out.stem) if named else ResultFiles(out)
        # Looked at before any computing: it would be lost.
        there = next(folder for folder in (files.folder, *files.folder.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long
        raise InputError(f"--out {str(out)[:80]!r} is no name for a folder or picture") from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written at --out '{out}': '{there}' is no folder that may be written to")
    return files


class ResultFiles:
    def __init__(self, folder: Path, name: str | None = None) -> None:
        """`name`: of the one picture; without it files are numbered."""
        self.folder, self.name = folder, name
        self.next = 0
        if name is None and folder.is_dir():
            numbers = [int(found[1]) for entry in os.listdir(folder) if (found := re.match(r"(\d{4,9})[-.]", entry))]
            self.next = max(numbers, default=-1) + 1

    def reserve(self) -> str:
        """The name, less its suffix, of the next result's files."""
        self.next += 1
        return self.name or f"{self.next - 1:04}"

    def save_picture(self, stem: str, image: Image.Image, record: Mapping[str, Any] | None = None) -> Path:
        """A PNG file with the record in its text, by which the picture can be made again."""
        info = PngInfo()
        if record is not None:  # less what differs from run to run: the same request gives the same file
            info.add_text(METADATA, json.dumps({name: value for name, value in record.items() if name != "seconds"}))
        content = io.BytesIO()
        image.save(content, "PNG", pnginfo=info)
        return self.save(stem, ".png", content.getvalue())

    def save_latents(self, stem: str, latents: np.ndarray[Any, Any]) -> Path:
        content = io.BytesIO()
        np.save(content, latents)
        return self.save(stem, ".npy", content.getvalue())

    def save(self, stem: str, suffix: str, content: bytes) -> Path:
        while self.name is None and (self.folder / (stem + suffix)).exists():  # another run's, begun meanwhile
            stem = re.sub(r"^\d+", self.reserve(), stem)
        path = self.folder / (stem + suffix)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return path

    def note(self, record: Mapping[str, Any]) -> None:
        """A further line of results.jsonl, whole or not at all; a picture that was named has it in itself alone."""
        if self.name is not None:
            return
        path = self.folder / RESULTS
        line = json.dumps(record).encode() + b"\n"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(line) != len(line):  # what a disk does that becomes full
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except BaseException:
                    file.truncate(before)
                    raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = f"'{path}' cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentLackError(f"{said}\nfiles that were finished before it are whole") from error
        raise InputError(said) from error


def record_of(result: Result, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a result: the request, the outcome and the model. A given picture by name and hash: a path would
    tell strangers about this machine, and of that name there are many."""
    picture = result.request.picture
    given = {}
    if isinstance(picture, str | Path):
        given = {"picture": Path(picture).name}
        with suppress(InputError):  # it may be gone by now
            given[PICTURE_HASH] = sha256_of(picture)
    model = {"bundle": manifest["name"], "checkpoint": manifest["provenance"]["checkpoint"]["sha256"]}
    return result.facts() | given | model
