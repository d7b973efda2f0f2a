"""Ground floor: runs a bundle with an inference engine, on a machine that has no PyTorch.

    from mdm.runtime import load
    [result] = load("tiny.bundle").generate("two big red circles on the left")

Never imports torch or onnx, and nothing of this project but `mdm.plugins`. The engine (onnxruntime) is an
extra of the package, because onnxruntime and onnxruntime-gpu install the same module and cannot share an
environment; it is imported when a bundle is loaded.
"""

from __future__ import annotations

from mdm.runtime.ort import require_engine
from mdm.runtime.pipeline import Pipeline, Step, load
from mdm.runtime.request import Request, Result

__all__ = ["Pipeline", "Request", "Result", "Step", "load", "require_engine"]
