"""Requests from a file.

    .txt     a prompt a line, or for tasks that want nothing else a picture's path
    .jsonl   an object a line: {"prompt": "two big red circles", "seed": 7, "steps": 40, "picture": "a.png"}
    .png     a picture that a bundle made: the request that stands in it

What a line leaves out comes from the command line. A picture's request leaves nothing out, so there the command line
comes first: `--from a.png --seed 8` varies it. Paths of pictures are relative to the file that names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import sha256_of
from mdm.runtime.json_schema import parse_json, told
from mdm.runtime.pictures import read_file, read_picture
from mdm.runtime.request import WORDS, Request
from mdm.runtime.solver import SOLVERS
from mdm.runtime.words import nearest

MAX_LINES = 100_000
MAX_LINE = 2**20  # bytes
METADATA = "mdm"  # key of the text in our PNG files
PICTURE_HASH = "picture_sha256"  # in it, of the picture that was given
FIELDS = tuple(name for name in WORDS if name != "noise")  # an array, which no line of text holds
OWN_TO_SOLVERS = {"final_zero"}.union(*(solver.options for solver in SOLVERS.values()))


@dataclass(frozen=True)
class Asked:
    """The fields of a request, and where they stand, for whoever has to mend them."""

    fields: dict[str, Any]
    where: str = ""
    checkpoint: object = None  # SHA-256 of the one that made the picture which the request is from

    def request(self) -> Request:
        with self.blamed():
            return Request.of(**self.fields)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What is found wrong in here is told with its place."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.where}: {error}" if self.where else str(error)) from error


def read_requests(path: Path, line_is: str, given: dict[str, Any]) -> list[Asked]:
    """The requests of a file. `line_is`: the field that a line of text is; `given`: the command line's fields."""
    if path.suffix == ".png":
        return [from_picture(path, given)]
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"--from '{path}' is not a file of requests\nexpected .txt or .jsonl with one a line, or a .png made by mdm"
        )
    asked = []
    for number, line in numbered_lines(path):
        where = f"file '{path}', line {number}"
        found = {line_is: line} if path.suffix == ".txt" else from_json(line, where)
        asked.append(Asked(given | beside(path, found), where))
    if not asked:
        raise InputError(f"file '{path}' is empty, expected a request a line")
    return asked


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold anything."""
    try:
        text = read_file(path, f"file '{path}'").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"file '{path}' is not UTF-8 text: byte {error.start} is wrong") from error
    if text.count("\n") > MAX_LINES:
        raise InputError(f"file '{path}' has more than {MAX_LINES} lines: split it")
    # Not splitlines(), which also splits at characters that JSON allows within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip():
            yield number, line


def from_json(line: str, where: str) -> dict[str, Any]:
    found = parse_json(line.encode(), where, MAX_LINE)
    if not isinstance(found, dict):
        raise InputError(f'{where} is {told(found)}, expected an object such as {{"prompt": "two red circles"}}')
    for name in found:
        if name not in FIELDS:
            raise InputError(
                f"{where} has the unknown field {told(name)}{nearest(name, FIELDS)}\nfields: {', '.join(FIELDS)}"
            )
    if not isinstance(found.get("picture"), str | None):
        raise InputError(f"{where}: picture is {told(found['picture'])}, expected a path")
    return {name: value for name, value in found.items() if value is not None}


def from_picture(path: Path, given: dict[str, Any]) -> Asked:
    where = f"picture '{path}'"
    text = read_picture(path).info.get(METADATA)
    if not isinstance(text, str):
        raise InputError(f"{where} holds no request\nexpected a picture that mdm generate, joint or turn made")
    record = parse_json(text.encode(), f"the request in {where}", MAX_LINE)
    if not isinstance(record, dict) or not isinstance(record.get("picture"), str | None):
        raise InputError(f"the request in {where} is not one of ours")
    # Beside the request the record tells what came of it, which is not asked for again.
    found = {name: record[name] for name in FIELDS if name in record}
    if given.get("solver", found.get("solver")) != found.get("solver"):
        found = {name: value for name, value in found.items() if name not in OWN_TO_SOLVERS}
    asked = beside(path, found)
    if "picture" in asked and "picture" not in given and sha256_of(asked["picture"]) != record.get(PICTURE_HASH):
        raise InputError(
            f"{where} was made from another '{asked['picture'].name}' than the one that lies beside it now\n"
            "put the right one there"
        )
    return Asked(asked | given, where, record.get("checkpoint"))


def beside(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """With the picture's path as seen from here."""
    return fields | {"picture": path.parent / fields["picture"]} if "picture" in fields else fields
