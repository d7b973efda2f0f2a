# Runs in a process of its own, with the stand-in for TensorRT: does what CUDA and TensorRT forbid, one thing after
# another, each on a fresh engine, and tells what came of it.
#
#     forbidden.py ONNX      a model that multiplies x [batch, 4] by a weight of 2 into y
#
# Out: {what was done: what the driver or TensorRT answered}

import contextlib
import json
import sys

import forbidden_by_cuda  # noqa: F401
import forbidden_by_tensorrt  # noqa: F401
from ready import CASES, STREAMS, device, driver

from mdm.plugins.errors import EngineError

told = {}
with device.current():
    for one in CASES:
        try:
            told[one.__name__] = one()
        except Exception as error:
            told[one.__name__] = str(error)
        for stream in STREAMS:  # a capture that is left would forbid the next case's allocations
            with contextlib.suppress(EngineError):
                driver.end_capture(stream)
        STREAMS.clear()
json.dump(told, sys.stdout)
