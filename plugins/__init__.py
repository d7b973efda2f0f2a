"""Ground floor: our operators (two scans, one short convolution) and what every other folder shares with them.

`contract.py` says what the operators are; `functions.py` and `linear_attention.py` write them in ONNX's own operators;
`cpu/` is the native ONNX Runtime library, which `library.py` finds and registers. Imports nothing else of this project.
"""

from __future__ import annotations

import os

from mdm.plugins.library import cpu_library_path, register

__all__ = ["cpu_library_path", "register"]

# From 1.29 on ONNX Runtime's Linux builds report every session to Microsoft, unless this is set before the import.
# Whatever of ours imports it has imported this first. Whoever wants the reports sets the variable otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
