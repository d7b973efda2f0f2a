"""The bytes of an engine: a magic word, the hash of the rest, and what the engine is in JSON before its ONNX model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from operator import index
from typing import Any

MAGIC = b"stand-in plan\0\0\0"
VERSION = os.environ.get("STAND_IN_TENSORRT", "11.4.0.106")


class Dims(tuple[int, ...]):
    """Sizes; equal to a list or tuple of the same."""

    def __new__(cls, sizes: Iterable[int] = ()) -> Dims:
        return super().__new__(cls, [index(size) for size in sizes])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, list)) and tuple(self) == tuple(other)

    __hash__ = tuple.__hash__


def write(about: dict[str, Any], model: bytes) -> bytes:
    head = json.dumps(about).encode()
    rest = len(head).to_bytes(8, "little") + head + model
    return MAGIC + hashlib.sha256(rest).digest() + rest


def read(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """None where that is no plan, or not a whole one."""
    start = len(MAGIC) + 32
    rest = content[start:]
    if not content.startswith(MAGIC) or hashlib.sha256(rest).digest() != content[len(MAGIC) : start]:
        return None
    end = 8 + int.from_bytes(rest[:8], "little")
    return json.loads(rest[8:end]), rest[end:]
