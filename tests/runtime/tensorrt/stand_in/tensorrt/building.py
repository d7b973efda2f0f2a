"""The builder: a network and its configuration become a plan, which holds the ONNX model with its weights."""

from __future__ import annotations

import hashlib
from operator import index
from pathlib import Path
from typing import Any

from .cuda import capability
from .enums import (
    BuilderFlag,
    DataType,
    HardwareCompatibilityLevel,
    MemoryPoolType,
    ProfilingVerbosity,
    Severity,
)
from .network import TYPES, INetworkDefinition
from .plan import VERSION, Dims, write
from .plugins import IPluginRegistry, fields_of, get_plugin_registry, key_of
from .words import ILogger, error, needs, planted, say, use

CACHE = b"stand-in timings"
REFITTING = {BuilderFlag.REFIT, BuilderFlag.REFIT_IDENTICAL, BuilderFlag.REFIT_INDIVIDUAL}


class IHostMemory(bytearray):
    """Of it: nbytes, dtype, and the buffer."""

    nbytes = property(len)
    dtype = property(lambda self: DataType.INT8)


class ITimingCache:
    __slots__ = ("_content",)

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(CACHE + self._content)


class IProgressMonitor:
    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None: ...


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, list[Dims]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[needs(input, str, "set_shape")] = [Dims(shape) for shape in (min, opt, max)]

    def get_shape(self, input: str) -> list[Dims]:
        return self._shapes[input]


class IBuilderConfig:
    __slots__ = (
        "_flags", "_limits", "_profiles", "_timing", "builder_optimization_level", "hardware_compatibility_level",
        "max_aux_streams", "plugins_to_serialize", "profiling_verbosity", "progress_monitor",
    )  # fmt: skip

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._limits: dict[MemoryPoolType, int] = {}
        self._profiles: list[dict[str, list[Dims]]] = []
        self._timing: ITimingCache | None = None
        self.builder_optimization_level, self.max_aux_streams = 3, -1
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.plugins_to_serialize: list[str] = []
        self.progress_monitor: IProgressMonitor | None = None

    num_optimization_profiles = property(lambda self: len(self._profiles))

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(needs(flag, BuilderFlag, "set_flag"))

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(needs(flag, BuilderFlag, "clear_flag"))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return needs(flag, BuilderFlag, "get_flag") in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[needs(pool, MemoryPoolType, "set_memory_pool_limit")] = index(pool_size)

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._limits.get(pool, 16 << 30)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        shapes = needs(profile, IOptimizationProfile, "add_optimization_profile")._shapes
        for name, three in shapes.items():
            ranks = {len(shape) for shape in three}
            if len(ranks) != 1 or any(sorted(sizes) != [*sizes] for sizes in zip(*three, strict=True)):
                error("IBuilderConfig::addOptimizationProfile", f"input {name} does not satisfy MIN<=OPT<=MAX: {three}")
                return -1
        self._profiles.append(dict(shapes))
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        content = bytes(memoryview(serialized_timing_cache))
        if content and not content.startswith(CACHE):
            say(Severity.WARNING, "Failed to deserialize timing cache. Returning an empty timing cache.")
            content = b""
        return ITimingCache(content[len(CACHE) :])

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timing = needs(cache, ITimingCache, "set_timing_cache")
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timing


class Builder:
    """On GPU 0, which it asks for its compute capability."""

    __slots__ = ("_capability", "logger")

    def __init__(self, logger: Any) -> None:
        self.logger: ILogger = use(logger)
        try:
            self._capability = capability()
        except OSError as failure:
            say(Severity.ERROR, f"CUDA initialization failure: {failure}")
            raise TypeError("pybind11::init(): factory function returned nullptr") from failure

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(index(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def get_plugin_registry(self) -> IPluginRegistry:
        return get_plugin_registry()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        needs(network, INetworkDefinition, "build_serialized_network")
        needs(config, IBuilderConfig, "build_serialized_network")
        refusal = "as planted" if planted("build") else _refusal(network, config)
        if refusal:
            error("IBuilder::buildSerializedNetwork", refusal)
            return None
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building", step):
                    monitor.phase_finish("Building")
                    return None
            monitor.phase_finish("Building")
        if config._timing is not None:
            config._timing._content += b"."
        plan = _plan(network, config, self._capability)
        return None if plan is None else IHostMemory(plan)


def _refusal(network: INetworkDefinition, config: IBuilderConfig) -> str:
    """Why there can be no engine; else ""."""
    if not network.num_outputs:
        return "Network must have at least one output"
    flags = {flag.name for flag in config._flags}
    if {"REFIT_INDIVIDUAL"} < flags & {"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"}:
        return "REFIT_INDIVIDUAL goes with no other REFIT"
    if "EXCLUDE_LEAN_RUNTIME" in flags and "VERSION_COMPATIBLE" not in flags:
        return "EXCLUDE_LEAN_RUNTIME is of VERSION_COMPATIBLE plans"
    if config.plugins_to_serialize and "VERSION_COMPATIBLE" not in flags:
        return "plugins are serialized with VERSION_COMPATIBLE plans"
    for library in config.plugins_to_serialize:
        if not Path(library).is_file():
            return f"no plugin library {library}"
    if not 0 <= config.builder_optimization_level <= 5:
        return f"builder_optimization_level is {config.builder_optimization_level}"
    for tensor in network._inputs:
        if -1 in tensor.shape and not config._profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined"
        for profile in config._profiles:
            three = profile.get(tensor.name)
            if three is None:
                if -1 in tensor.shape:
                    return f"input {tensor.name} is dynamic, and has no shapes in a profile"
            elif any(
                len(shape) != len(tensor.shape)
                or any(size != fixed for size, fixed in zip(shape, tensor.shape, strict=True) if fixed != -1)
                for shape in three
            ):
                return f"input {tensor.name} has shape {tensor.shape}, which a profile contradicts: {three}"
    unknown = {name for profile in config._profiles for name in profile} - {tensor.name for tensor in network._inputs}
    return f"a profile has shapes for {unknown}, which are no inputs" if unknown else ""


def _plan(network: INetworkDefinition, config: IBuilderConfig, built_for: str) -> bytes | None:
    import onnx

    from .computing import load

    model, flags = network._model, {flag.name for flag in config._flags}
    if DataType.BF16 in {
        *(tensor.dtype for tensor in (*network._inputs, *network._outputs)),
        *(TYPES[tensor.data_type] for tensor in model.graph.initializer),
    }:
        say(Severity.ERROR, "this stand-in for TensorRT computes on the CPU, which has no bfloat16: export in fp32")
        return None
    files = {
        {one.key: one.value for one in tensor.external_data}["location"]
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    folder = network._source or Path()
    onnx.load_external_data_for_model(model, str(folder))
    whole = model.SerializeToString()
    load(whole)  # what cannot run is not built
    about = {
        "tensorrt": VERSION,
        "capability": built_for,
        "compatible": config.hardware_compatibility_level.name,
        "flags": sorted(flags),
        "refittable": "STRIP_PLAN" in flags or any(flag.name in flags for flag in REFITTING),
        "host_code": bool(config.plugins_to_serialize)
        or ("VERSION_COMPATIBLE" in flags and "EXCLUDE_LEAN_RUNTIME" not in flags),
        "libraries": list(config.plugins_to_serialize),
        "verbosity": config.profiling_verbosity.name,
        "layers": [layer.name for layer in network._layers],
        "tensors": [
            {"name": one.name, "mode": mode, "dtype": one.dtype.name, "shape": one._sizes}
            for mode, several in (("INPUT", network._inputs), ("OUTPUT", network._outputs))
            for one in several
        ],
        "profiles": config._profiles or [{}],
        "plugins": [
            [key_of(layer._plugin), fields_of(layer._plugin)] for layer in network._layers if layer._plugin is not None
        ],
        "weights": {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer},
        "model": hashlib.sha256(network._content).hexdigest(),
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(files)},
    }  # fmt: skip
    return write(about, b"" if "STRIP_PLAN" in flags else whole)
