"""A stand-in for TensorRT's Python bindings, for tests on a machine without a GPU: put its folder on PYTHONPATH.

Its builder takes the ONNX model into the plan; its engines compute with ONNX Runtime on the memory of a fake driver
(tests/plugins/gpu/fake_cuda.c, as libcuda.so.1). It has only names that TensorRT 11.4 has, and refuses, aloud, what
TensorRT forbids or leaves undefined: a program that runs here uses the API as it may be used. It proves nothing of
TensorRT's own behaviour, numbers or speed.

    STAND_IN_TENSORRT   the version it says it is: 11.4.0.106
    STAND_IN_FAILS      what fails, and which time, of build, deserialize, execute and run: "execute:3", "run:1"
"""
# ruff: noqa: F401

from __future__ import annotations

from .building import (
    Builder,
    IBuilderConfig,
    IHostMemory,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
)
from .context import IExecutionContext
from .engine import (
    EngineInspector,
    ICudaEngine,
    OnnxParserRefitter,
    Refitter,
    Runtime,
)
from .enums import (
    BuilderFlag,
    DataType,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    PluginCapabilityType,
    PluginFieldType,
    ProfilingVerbosity,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
    TensorRTPhase,
)
from .network import (
    ILayer,
    INetworkDefinition,
    IPluginV3Layer,
    ITensor,
    OnnxParser,
    ParserError,
)
from .plan import VERSION as __version__
from .plan import Dims
from .plugins import (
    DimsExprs,
    IPluginCreatorV3One,
    IPluginRegistry,
    IPluginV3,
    IPluginV3OneBuild,
    IPluginV3OneCore,
    IPluginV3OneRuntime,
    PluginField,
    PluginFieldCollection,
    get_plugin_registry,
    init_libnvinfer_plugins,
)
from .words import ILogger, Logger
