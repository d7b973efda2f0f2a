"""TensorRT's enumerations, as far as anyone here asks for them, by its names and numbers."""

from __future__ import annotations

from enum import Enum, EnumMeta
from typing import Any, NoReturn


class Kind(EnumMeta):
    """What Python's enumerations can and pybind11's cannot is refused."""

    def __getitem__(cls, name: str) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"type {cls.__name__} is not subscriptable")

    def __iter__(cls) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"type {cls.__name__} is not iterable")


class Choice(Enum, metaclass=Kind):
    """As pybind11 makes them: no integers, but int() and operator.index() take them."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class Severity(Choice):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __lt__(self, other: Any) -> bool:
        return self.value < other.value

    def __le__(self, other: Any) -> bool:
        return self.value <= other.value


class NetworkDefinitionCreationFlag(Choice):
    STRONGLY_TYPED, PREFER_JIT_PYTHON_PLUGINS, PREFER_AOT_PYTHON_PLUGINS = range(3)


class BuilderFlag(Choice):
    DEBUG, GPU_FALLBACK, REFIT, DISABLE_TIMING_CACHE, TF32, SPARSE_WEIGHTS = 2, 3, 4, 5, 6, 7
    VERSION_COMPATIBLE, EXCLUDE_LEAN_RUNTIME = 12, 13
    ERROR_ON_TIMING_CACHE_MISS, DISABLE_COMPILATION_CACHE, STRIP_PLAN = 15, 17, 18
    REFIT_IDENTICAL, WEIGHT_STREAMING, REFIT_INDIVIDUAL, STRICT_NANS, MONITOR_MEMORY = 19, 20, 22, 23, 24
    EDITABLE_TIMING_CACHE, DISTRIBUTIVE_INDEPENDENCE = 26, 27


class HardwareCompatibilityLevel(Choice):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class MemoryPoolType(Choice):
    WORKSPACE, DLA_MANAGED_SRAM, DLA_LOCAL_DRAM, DLA_GLOBAL_DRAM, TACTIC_DRAM, TACTIC_SHARED_MEMORY = range(6)


class ProfilingVerbosity(Choice):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class DataType(Choice):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4, FP4, E8M0 = range(12)

    @property
    def itemsize(self) -> int:
        return {"FLOAT": 4, "HALF": 2, "INT32": 4, "BF16": 2, "INT64": 8}.get(self.name, 1)


class TensorFormat(Choice):
    LINEAR, CHW2, HWC8, CHW4, CHW16, CHW32 = range(6)


class TensorIOMode(Choice):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(Choice):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Choice):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class LayerInformationFormat(Choice):
    ONELINE, JSON = range(2)


class OnnxParserFlag(Choice):
    NATIVE_INSTANCENORM, ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA = range(2)


class PluginFieldType(Choice):
    FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64, FP8, INT4, FP4 = range(14)


class PluginCapabilityType(Choice):
    CORE, BUILD, RUNTIME = range(3)


class TensorRTPhase(Choice):
    BUILD, RUNTIME = range(2)


class LayerType(Choice):
    CAST, MATRIX_MULTIPLY, CONSTANT, RECURRENCE, TRIP_LIMIT, LOOP_OUTPUT = 1, 17, 19, 27, 26, 29
    ELEMENTWISE, PLUGIN, PLUGIN_V2, PLUGIN_V3 = 9, 10, 21, 46
