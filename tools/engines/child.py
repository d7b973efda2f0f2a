"""The process that builds one engine: TensorRT may end it, and then ends nothing else.

    python -m mdm.tools.engines.child < request.json          # Request's fields; {} asks only what it is

It tells its progress in lines of JSON: {"phase": "parse"}, ..., then {"done": {...}} or {"error": "..."}, with "kind"
if the error is one of ours, in our words. TensorRT's own messages go to stderr.
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
from threading import Lock
from typing import Any

from mdm.plugins.errors import InputError, MdmError
from mdm.runtime.tensorrt.records import write_whole
from mdm.runtime.tensorrt.versions import (
    PLUGINS_FIRST,
    hardware_level,
    load_lean_runtime,
    network_flags,
    plugin_of,
    registered_plugins,
    tensorrt_module,
    version_of,
)
from mdm.tools.engines.asked import check_plugins, without_functions


@dataclass(frozen=True)
class Request:
    model: str
    folder: str  # where weights that lie outside the model are
    operators: dict[str, int]  # of which it is made
    engine: str  # the file to write
    timing: str  # the timing cache: read if it is there, written at the end
    facts: dict[str, Any]  # what the engine is to be: at least what settings_of gives
    library: str | None  # of plugins


def build(request: Request) -> dict[str, Any]:
    """Write the engine's file -> what is in it."""
    trt, facts = tensorrt_module(), request.facts
    level = hardware_level(trt, facts["hardware"])  # before anything takes time
    provide_plugins(trt, request)
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    tell(phase="parse")
    contents = parse(trt, network, log, request)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, facts["workspace"])
    config.builder_optimization_level = facts["level"]
    if facts["hardware"] != "this":
        config.hardware_compatibility_level = level
    config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and loses what the export was held to
    for flag in flags(facts):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if facts["version_compatible"]:
        load_lean_runtime()
        config.plugins_to_serialize = [request.library] if request.library else []
    for described in facts["profiles"]:
        profile = builder.create_optimization_profile()
        for name, three in described["shapes"].items():
            profile.set_shape(name, *three)
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"it refuses the profile {described}")
    timing = Path(request.timing)
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if cache is not None:  # another GPU's is not taken, and costs only time
        config.set_timing_cache(cache, ignore_mismatch=False)
    monitor = monitor_of(trt)  # TensorRT keeps no reference
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("it builds no engine, and does not say why")
    tell(phase="write")
    Path(request.engine).write_bytes(memoryview(plan))
    if (cache := config.get_timing_cache()) is not None:
        with suppress(OSError):  # the engine is there without it
            write_whole(timing, memoryview(cache.serialize()))
    return contents


def provide_plugins(trt: Any, request: Request) -> None:
    if request.library:
        if trt.get_plugin_registry().load_library(request.library) is None:
            raise InputError(
                f"TensorRT {trt.__version__} takes no plugins from '{request.library}'\n"
                "expected the library that mdm plugin build makes, with the headers of this TensorRT's major version"
            )
    elif request.facts["kernels"]:
        from mdm.plugins.tensorrt.python_plugin import register

        register()


def parse(trt: Any, network: Any, log: Any, request: Request) -> dict[str, Any]:
    """Read the graph into the network -> what the network has."""
    parser, content = trt.OnnxParser(network, log), Path(request.model).read_bytes()
    wanted = request.operators if request.library or request.facts["kernels"] else {}
    if wanted and version_of(trt.__version__) < version_of(PLUGINS_FIRST):
        content = without_functions(content)
    if not parser.parse(content, str(Path(request.folder) / Path(request.model).name)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RuntimeError(f"its parser refuses the graph: {said}")
    layers = [plugin_of(trt, network.get_layer(i)) for i in range(network.num_layers)]
    plugins = [kind for kind in layers if kind is not None]
    kinds = check_plugins(wanted, plugins, registered_plugins(trt), Path(request.model))
    return {"layers": len(layers), "plugins": len(plugins), "operators": kinds}


def flags(facts: dict[str, Any]) -> list[str]:
    """Of trt.BuilderFlag."""
    wanted = {
        "REFIT": facts["refit"], "STRIP_PLAN": facts["strip"], "REFIT_IDENTICAL": facts["strip"],
        "WEIGHT_STREAMING": facts["stream_weights"], "VERSION_COMPATIBLE": facts["version_compatible"],
    }  # fmt: skip
    return [flag for flag, is_wanted in wanted.items() if is_wanted]


def monitor_of(trt: Any) -> Any:
    """Tells TensorRT's phases, the outer two levels: "a", "a / b"."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer.add(phase_name)
                tell(phase=phase_name)
            elif parent_phase in self.outer:
                tell(phase=f"{parent_phase} / {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.outer.discard(phase_name)

    return Monitor()


def tell(**content: Any) -> None:
    with TELLING:  # TensorRT's phases come from any of its threads
        print(json.dumps(content), file=ANSWERS, flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":  # it ends with whoever asked, however that ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # What TensorRT prints must not come between our lines.
    ANSWERS, TELLING = os.fdopen(os.dup(1), "w"), Lock()
    os.dup2(2, 1)
    try:
        asked = json.load(sys.stdin)
        tell(done=build(Request(**asked)) if asked else {"tensorrt": tensorrt_module().__version__})
    except MdmError as error:
        tell(error=str(error), kind=type(error).__name__)
        sys.exit(1)
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error))
        sys.exit(1)
