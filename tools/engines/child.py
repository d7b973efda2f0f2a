"""The process that builds one engine: TensorRT may end it, and then ends nothing else.

    python -m mdm.tools.engines.child < request.json          # Request's fields; {} asks only what it is

It tells its progress in lines of JSON: {"phase": "parse"}, {"phase": "build"}, then {"done": {...}} or
{"error": "..."}.
TensorRT's own messages go to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.runtime.tensorrt.engines import write_whole


@dataclass(frozen=True)
class Request:
    model: str
    engine: str  # the file to write
    timing: str  # the timing cache: read if it is there, written at the end
    shapes: dict[str, list[list[int]]]  # by input: least, usual, most
    workspace: int
    level: int
    plugins: bool


def build(request: Request) -> dict[str, Any]:
    """Write the engine -> what is in it."""
    import tensorrt as trt

    if request.plugins:
        from mdm.plugins.tensorrt.python_plugin import register

        register()
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    # TensorRT 10 asks for it; 11 knows no other networks, and ignores it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    tell(phase="parse")
    if not parser.parse_from_file(request.model):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RuntimeError(f"its parser refuses the graph: {said}")
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    config.builder_optimization_level = request.level
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and loses what the export was held to
    profile = builder.create_optimization_profile()
    for name, three in request.shapes.items():
        profile.set_shape(name, *three)
    if config.add_optimization_profile(profile) < 0:
        raise RuntimeError(f"it refuses the profile {request.shapes}")
    timing = Path(request.timing)
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if cache is not None:  # another GPU's is not taken, and costs only time
        config.set_timing_cache(cache, ignore_mismatch=False)
    tell(phase="build")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("it builds no engine, and does not say why")
    write_whole(Path(request.engine), memoryview(plan))
    if (cache := config.get_timing_cache()) is not None:
        with suppress(OSError):  # the engine is there without it
            write_whole(timing, memoryview(cache.serialize()))
    return {"layers": len(layers), "plugins": layers.count(trt.LayerType.PLUGIN_V3), "bytes": plan.nbytes}


def about() -> dict[str, Any]:
    import tensorrt as trt

    return {"tensorrt": trt.__version__}


def tell(**content: Any) -> None:
    print(json.dumps(content), file=ANSWERS, flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":  # it ends with whoever asked, however that ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # What TensorRT prints must not come between our lines.
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        asked = json.load(sys.stdin)
        tell(done=build(Request(**asked)) if asked else about())
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error))
        sys.exit(1)
