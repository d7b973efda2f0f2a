"""The header of a safetensors file: where each tensor's values stand. Reads the header alone; a file may have 16 GB.

    8 bytes N, little endian | N bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}} | values

`data_offsets` count from the end of the header; `Entry.offset` counts from the beginning of the file, as ONNX external
data does. Nothing in a file is trusted: one that passes has its values back to back, from the header's end to the
file's, each as long as its shape says. The safetensors package checks the same, but tells no offsets.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import parse_json, told

MAX_HEADER = 100_000_000  # bytes, the safetensors package's own limit
MAX_AXES = 32  # numpy's limit before 2.0
MAX_BYTES = 2**63 - 1  # of one tensor

# numpy has no bfloat16: its 16 bits are read as a whole number.
NUMPY: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor; `offset` and `length` are bytes."""

    dtype: str  # "F32"
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The checked header of the file that `path` leads to; links are followed."""
    what = f"safetensors file '{path}'"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise InputError(f"{what} is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(8)
            length = int.from_bytes(begin, "little")
            if len(begin) < 8 or length > min(MAX_HEADER, size - 8):
                raise InputError(
                    f"{what} has {size} bytes and claims a header of {length}\n"
                    f"expected 8 bytes and a header of at most {MAX_HEADER} bytes inside the file"
                )
            text = file.read(length)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{what} cannot be read: {_reason(error)}") from error
    if not text.startswith(b"{"):
        raise InputError(f"{what} has a header that begins with {text[:1]!r}, expected '{{'")
    fields = parse_json(text, f"the header of {what}", MAX_HEADER)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{what}: __metadata__ is {told(metadata)}, expected an object of texts")
    start = 8 + length
    tensors = {name: _entry(name, value, start, what) for name, value in fields.items()}
    _check_layout(tensors, start, size, what)
    return Header(tensors, metadata)


def read_array(path: str | Path, entry: Entry) -> np.ndarray[Any, Any]:
    """One tensor's values, copied out of the file: mapped pages would count as resident memory. BF16 as uint16."""
    count = math.prod(entry.shape)
    try:
        values = np.fromfile(path, NUMPY[entry.dtype], count, offset=entry.offset)
    except OSError as error:
        raise InputError(f"safetensors file '{path}' cannot be read: {_reason(error)}") from error
    if values.size < count:
        raise InputError(
            f"safetensors file '{path}' ends inside a tensor: {values.size} of {count} values at byte {entry.offset}\n"
            "it was cut after its header was read"
        )
    if entry.dtype == "BOOL":
        values = values != 0  # any byte may stand there; numpy's bool knows 0 and 1
    return values.reshape(entry.shape)


def write_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """All bytes of a file before its values, which begin at the next byte; equal input gives equal bytes.

    Only differences of the entries' offsets are written, so they may count from the first value as well as from the
    first byte of another file.
    """
    first = min((entry.offset for entry in entries.values()), default=0)
    end = max((entry.offset + entry.length for entry in entries.values()), default=0)
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, entry in entries.items():
        begin = entry.offset - first
        offsets = [begin, begin + entry.length]
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        _entry(name, fields[name], first, "a header to be written")
    _check_layout(entries, first, end, "a header to be written")
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(name: str, value: Any, start: int, what: str) -> Entry:
    """One line of the header, checked by itself."""
    what = f"{what}: tensor {told(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        found = f"the keys {told(', '.join(value))}" if isinstance(value, dict) else told(value)
        raise InputError(f"{what} has {found}\nexpected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY:
        raise InputError(f"{what} has the dtype {told(dtype)}\nexpected one of: {', '.join(NUMPY)}")
    if not _sizes(shape) or len(shape) > MAX_AXES:
        raise InputError(
            f"{what} has the shape {repr(shape)[:80]}\nexpected a list of at most {MAX_AXES} whole numbers, 0 or more"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{what} has the data_offsets {repr(offsets)[:80]}\nexpected [begin, end]")
    # The product without the zeros: an empty tensor may not hide a size that overflows elsewhere.
    bytes_each = np.dtype(NUMPY[dtype]).itemsize
    if math.prod(size for size in shape if size) * bytes_each > MAX_BYTES:
        raise InputError(f"{what} has the shape {repr(shape)[:80]}\nexpected less than 2^63 bytes")
    expected = math.prod(shape) * bytes_each
    if offsets[1] - offsets[0] != expected:
        raise InputError(
            f"{what} has {offsets[1] - offsets[0]} bytes of values\n"
            f"expected {expected}: {dtype} of shape {repr(shape)[:80]}"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], expected)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: Mapping[str, Entry], start: int, size: int, what: str) -> None:
    """Each tensor begins where the one before it ends, the last one ends where the file does."""
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if entry.offset != end:
            wrong = "leaves a hole" if entry.offset > end else "overlaps another tensor"
            raise InputError(f"{what}: tensor {told(name)} {wrong}\nit begins at byte {entry.offset}, expected {end}")
        end += entry.length
    if end != size:
        raise InputError(f"{what} has {size} bytes, its header describes {end}: it is cut, or something is appended")


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
