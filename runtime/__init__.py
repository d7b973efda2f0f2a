"""Ground floor: runs a bundle with an inference engine, on a machine that has no PyTorch.

Never imports torch or onnx, and nothing of this project but `mdm.plugins`. The engine (onnxruntime) is an
extra of the package, because onnxruntime and onnxruntime-gpu install the same module and cannot share an
environment.
"""

from __future__ import annotations

from importlib.util import find_spec

from mdm.plugins.errors import EnvironmentLackError


def require_engine() -> None:
    """Raise, naming the extra to install, where no onnxruntime can be imported."""
    if find_spec("onnxruntime") is None:
        raise EnvironmentLackError(
            "No inference engine: the Python module onnxruntime is not installed.\n"
            "The engine is an extra, and an environment takes one of two.\n"
            'Install it: pip install "mdm-deploy[cpu]", or "mdm-deploy[gpu]" for an NVIDIA GPU.'
        )
