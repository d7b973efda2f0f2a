"""ONNX Runtime on the CPU, with our native operators, in the place of a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from mdm.runtime.ort import session_options

NUMPY = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip


def load(model: bytes, weights: Path = Path()) -> Any:
    """A session; weights that are not in the model lie in that folder."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, session_options(weights, 1), providers=["CPUExecutionProvider"])


def view(address: int, dtype: str, shape: tuple[int, ...]) -> Any:
    """The tensor that lies there, not a copy."""
    made = np.empty(0, NUMPY[dtype])
    size = int(np.prod(shape, dtype=np.int64)) * made.itemsize
    if not size:
        return np.empty(shape, made.dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(address), made.dtype).reshape(shape)
