"""What a result depends on, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import onnxruntime

from mdm.tools.check.fingerprint import fingerprint

from .deployed import Exported


def test_everything_that_matters_is_named(exported: Callable[[str], Exported]) -> None:
    one = exported("half")
    told = fingerprint(one.model)
    assert told["manifest"] == hashlib.sha256((one.bundle / "manifest.json").read_bytes()).hexdigest()
    assert told["checkpoint"] == f"half.safetensors, {hashlib.sha256(one.checkpoint.read_bytes()).hexdigest()}"
    assert told["precision"].startswith("fp16")
    assert told["backend"] == "ort-cpu"
    assert told["onnxruntime"] == onnxruntime.__version__
    assert told["bundle"].startswith("half, made 20")
    assert "torch" in told["exported with"]
    assert {"cpu", "system", "numpy", "torch", "onnx", "mdm-deploy"} <= told.keys()
    assert all(isinstance(value, str) and value for value in told.values())


def test_no_path_of_this_machine_is_named(exported: Callable[[str], Exported]) -> None:
    one = exported("half")
    assert str(one.bundle.parent) not in " ".join(fingerprint(one.model).values())
