"""The runtime: a plan becomes an engine, whose weights take memory of the device; refitting gives it others."""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

from .building import IHostMemory
from .computing import load
from .context import IExecutionContext, sizes_of, volume
from .cuda import Memory, capability, capturing, enqueue, free_memory, has_context
from .enums import (
    DataType,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    ProfilingVerbosity,
    Severity,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
    TensorRTPhase,
)
from .network import ParserError
from .plan import VERSION, Dims, read
from .plugins import IPluginRegistry, get_plugin_registry, plugin_of
from .words import ILogger, error, needs, planted, say, use

MIB = 2**20


class Runtime:
    __slots__ = ("engine_host_code_allowed", "logger")

    def __init__(self, logger: Any) -> None:
        self.logger: ILogger = use(logger)
        self.engine_host_code_allowed = False

    def get_plugin_registry(self) -> IPluginRegistry:
        return get_plugin_registry()

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(memoryview(serialized_engine))
        if planted("deserialize"):
            return None
        found = read(content)
        if found is None:
            return _no_engine("the plan's magic tag or checksum does not match")
        about, model = found
        if refusal := self._refusal(about):
            return _no_engine(refusal)
        plugins = []
        for key, fields in about["plugins"]:
            try:
                plugin = plugin_of(tuple(key), fields, TensorRTPhase.RUNTIME)
            except Exception as failure:
                return _no_engine(f"creating the plugin {key} failed: {failure}")
            if plugin is None:
                return _no_engine(f"Cannot find plugin: {key[0]}, version: {key[1]}, namespace:{key[2]}")
            plugins.append(plugin)
        try:
            return ICudaEngine(about, model, plugins, self)
        except MemoryError as failure:
            return _no_engine(f"OutOfMemory: {failure}")

    def _refusal(self, about: dict[str, Any]) -> str:
        if not has_context():
            return "stand-in: no CUDA context is current, so that TensorRT would take GPU 0's"
        portable = "VERSION_COMPATIBLE" in about["flags"]
        built, here = (tuple(map(int, version.split(".")[:2])) for version in (about["tensorrt"], VERSION))
        if about["tensorrt"] != VERSION and not (portable and built <= here):
            return f"not compatible with this version of TensorRT, expecting {about['tensorrt']} got {VERSION}"
        if about["host_code"] and not self.engine_host_code_allowed:
            return "the plan holds host code, and engine_host_code_allowed is not set"
        found, level = capability(), HardwareCompatibilityLevel.__members__[about["compatible"]]
        ampere = level is HardwareCompatibilityLevel.AMPERE_PLUS and int(found.split(".")[0]) >= 8
        if found != about["capability"] and not ampere:
            return f"generated on an incompatible device, expecting compute {about['capability']} got compute {found}"
        for library in about["libraries"]:
            get_plugin_registry().load_library(library)
        return ""


def _no_engine(reason: str) -> None:
    error("IRuntime::deserializeCudaEngine", reason)


class ICudaEngine:
    __slots__ = (
        "__weakref__", "_about", "_budget", "_contexts", "_plugins", "_refits", "_runtime", "_session", "_tensors",
        "_weights",
    )  # fmt: skip

    def __init__(self, about: dict[str, Any], model: bytes, plugins: list[Any], runtime: Runtime) -> None:
        self._about, self._plugins, self._runtime = about, plugins, runtime
        self._tensors = {tensor["name"]: tensor for tensor in about["tensors"]}
        self._session = load(model) if model else None  # none: it is to be refitted first
        self._refits: list[tuple[int, list[bool]]] = []  # those not yet done: stream, and whether they are
        self._budget = self.streamable_weights_size
        self._contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        self._weights = Memory(max(sum(about["weights"].values()), 1))

    num_io_tensors = property(lambda self: len(self._tensors))
    num_layers = property(lambda self: len(self._about["layers"]))
    num_optimization_profiles = property(lambda self: len(self._about["profiles"]))
    refittable = property(lambda self: self._about["refittable"])
    name = property(lambda self: "Unnamed Network 0")
    hardware_compatibility_level = property(
        lambda self: HardwareCompatibilityLevel.__members__[self._about["compatible"]]
    )
    profiling_verbosity = property(lambda self: ProfilingVerbosity.__members__[self._about["verbosity"]])

    def serialize(self) -> IHostMemory:
        raise NotImplementedError("the stand-in's engines are not serialized again")

    # ----------------------------------------------------------------------------------------------------- tensors

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.__members__[self._tensors[name]["mode"]] if name in self._tensors else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.__members__[self._tensors[name]["dtype"]]

    def get_tensor_format(self, name: str, profile_index: int = 0) -> TensorFormat:
        return TensorFormat.LINEAR

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_shape(self, name: str) -> Dims:
        return sizes_of(self._tensors[name]["shape"] or (), {})

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if (
            self.get_tensor_mode(name) is not TensorIOMode.INPUT
            or not 0 <= profile_index < self.num_optimization_profiles
        ):
            error("ICudaEngine::getProfileShape", f"no input {name} in profile {profile_index}")
            return []
        fixed = [Dims(self.get_tensor_shape(name))] * 3
        return [Dims(shape) for shape in self._about["profiles"][profile_index].get(name, fixed)]

    # ------------------------------------------------------------------------------------------------------ memory

    def _activations(self, shapes: dict[str, Any]) -> int:
        """For inputs of these shapes: made up, and more for larger ones."""
        largest = sum(volume(shape) for shape in shapes.values())
        return MIB + 256 * (largest // 8 + 1) + int(self.weight_streaming_scratch_memory_size)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._activations({name: three[2] for name, three in self._about["profiles"][profile_index].items()})

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(self.num_optimization_profiles)))

    @property
    def streamable_weights_size(self) -> int:
        return sum(self._about["weights"].values()) if "WEIGHT_STREAMING" in self._about["flags"] else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """As the bindings do it: what goes wrong is only logged."""
        if not self.streamable_weights_size or self._contexts or budget < 0:
            error("ICudaEngine::setWeightStreamingBudgetV2", f"budget {budget}: a plan without WEIGHT_STREAMING, an "
                  "active context, or a negative number")  # fmt: skip
            return
        self._budget = min(int(budget), self.streamable_weights_size)
        self._weights = Memory(max(self._budget, 1))

    def get_weight_streaming_automatic_budget(self) -> int:
        return min(self.streamable_weights_size, max(0, free_memory() - self.device_memory_size_v2))

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        streaming = self._budget < self.streamable_weights_size
        return (self.streamable_weights_size // 8 // 256 + 1) * 256 if streaming else 0

    # ----------------------------------------------------------------------------------------------------- contexts

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        needs(strategy, ExecutionContextAllocationStrategy, "create_execution_context")
        if not has_context():
            error("ICudaEngine::createExecutionContext", "stand-in: no CUDA context is current")
            return None
        try:
            made = IExecutionContext(self, strategy)
        except MemoryError as failure:
            error("ICudaEngine::createExecutionContext", f"OutOfMemory: {failure}")
            return None
        self._contexts.add(made)
        return made

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    __slots__ = ("_engine", "execution_context")

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self.execution_context = engine, None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        needs(format, LayerInformationFormat, "get_engine_information")
        about = self._engine._about
        layers = about["layers"] if about["verbosity"] != "NONE" else []
        if format is LayerInformationFormat.ONELINE:
            return "\n".join(layers)
        return json.dumps({"Layers": layers, "I/O Tensors": [*self._engine._tensors]})


class Refitter:
    __slots__ = ("_engine", "_given", "logger")

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self.logger = use(logger)
        self._engine = needs(engine, ICudaEngine, "Refitter")
        self._given: weakref.ref[OnnxParserRefitter] | None = None
        if not engine.refittable:
            error("createInferRefitter", "the engine is not refittable")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_all_weights(self) -> list[str]:
        return [*self._engine._about["weights"]]

    def get_missing_weights(self) -> list[str]:
        return [] if self._engine._session is not None or self._given else self.get_all_weights()

    def refit_cuda_engine(self) -> bool:
        given = self._parser()
        if given is not None:
            self._engine._session = given._session
        return given is not None

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        """The parser's weights have to be there until the stream has come to it."""
        given = self._parser()
        if given is None or capturing(stream_handle) is not False:
            return False
        there, done = weakref.ref(given), [False]
        self._engine._session = given._session
        self._engine._refits.append((stream_handle, done))

        def refit() -> None:
            if there() is None:
                raise RuntimeError("the weights of a refit went before the refit was done")
            done[0] = True

        return enqueue(stream_handle, refit, again=False)

    def _parser(self) -> OnnxParserRefitter | None:
        """Which has the weights."""
        given = self._given() if self._given else None
        if given is None or not has_context():
            error("IRefitter::refitCudaEngine", "no new weights, or they went, or no CUDA context is current")
            return None
        return given


class OnnxParserRefitter:
    __slots__ = ("__weakref__", "_errors", "_refitter", "_session")

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        use(logger)
        self._refitter, self._errors = needs(refitter, Refitter, "OnnxParserRefitter"), list[ParserError]()
        self._session: Any = None

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def refit_from_file(self, model: str) -> bool:
        """Where the plan was built for identical weights, others are refused: TensorRT would not notice."""
        about, path = self._refitter._engine._about, Path(needs(model, str, "refit_from_file"))
        same = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == about["model"]
        same = same and all(
            hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == known
            for name, known in about["files"].items()
        )
        if not path.is_file() or not (same or "REFIT" in about["flags"]):
            self._errors.append(ParserError(f"{model} is not there, or does not have the weights the engine had"))
            say(Severity.ERROR, self._errors[-1].desc())
            return False
        self._session = load(path.read_bytes(), path.parent)
        self._refitter._given = weakref.ref(self)
        return True
