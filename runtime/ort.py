"""ONNX Runtime as a backend: on the CPU, on an NVIDIA GPU, or on one by TensorRT-RTX (see `rtx.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from mdm.plugins import register
from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN
from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError, MdmError
from mdm.plugins.machine import cores
from mdm.runtime.backend import Array, Buffer, Graph, Spec, Tensors, specs_of
from mdm.runtime.bundle import Bundle
from mdm.runtime.json_schema import told
from mdm.runtime.rtx import PROFILE, rtx_device, use_rtx
from mdm.runtime.rtx import PROVIDER as RTX_PROVIDER
from mdm.runtime.shelf import Shelf
from mdm.runtime.tensorrt.profiles import Shapes, shapes_of
from mdm.runtime.words import nearest

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, SessionOptions

RTX = "tensorrt-rtx"
# backend -> ONNX Runtime's provider and the device its buffers lie on
PROVIDERS = {
    "ort-cpu": ("CPUExecutionProvider", "cpu"),
    "ort-cuda": ("CUDAExecutionProvider", "cuda"),
    RTX: (RTX_PROVIDER, "cuda"),
}
# ONNX Runtime's names of the types that a graph takes and gives
TYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool",
}  # fmt: skip
# Memory of a loaded graph over the size of its weights (measured, ONNX Runtime 1.31): weights are copied once to be
# packed, and the CPU computes half precision from a float32 copy beside the half one.
GROWTH = {"fp32": 1.3, "fp16": 3.3, "bf16": 3.3}


def require_engine() -> None:
    """Raise, naming the extra to install, where no onnxruntime can be imported."""
    if find_spec("onnxruntime") is None:
        raise EnvironmentLackError(
            "No inference engine: the Python module onnxruntime is not installed.\n"
            "The engine is an extra, and an environment takes one of two.\n"
            'Install it: pip install "mdm-deploy[cpu]", or "mdm-deploy[gpu]" for an NVIDIA GPU.'
        )


@dataclass(frozen=True)
class HostBuffer:
    """Ordinary memory: engine and host see the same."""

    host: Array

    def push(self) -> None: ...

    def pull(self) -> None: ...

    def address(self, row: int) -> int:
        return self.host.ctypes.data + row * self.host.strides[0]


class DeviceBuffer:
    """Memory of a device, with a copy of it on this side."""

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, device: str, number: int) -> None:
        from onnxruntime import OrtValue

        self.host = np.zeros(shape, dtype)
        with engine_errors("allocating on the device"):
            self.value = OrtValue.ortvalue_from_numpy(self.host, device, number)

    def push(self) -> None:
        with engine_errors("copying to the device"):
            self.value.update_inplace(self.host)

    def pull(self) -> None:
        with engine_errors("copying from the device"):
            self.host[...] = self.value.numpy()

    def address(self, row: int) -> int:
        return int(self.value.data_ptr()) + row * self.host.strides[0]


class OrtGraph:
    """A graph in ONNX Runtime."""

    def __init__(
        self, name: str, session: InferenceSession, described: Mapping[str, Any], device: str, number: int,
        batches: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.name, self.session, self.device, self.number, self.sizes = name, session, device, number, batches
        self.bound: WeakKeyDictionary[Any, dict[Any, Callable[[], None]]] = WeakKeyDictionary()
        self.inputs: Mapping[str, Spec] = specs_of(described["inputs"])
        self.outputs: Mapping[str, Spec] = specs_of(described["outputs"])
        self.metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map

    def batches(self, tokens: int) -> Sequence[int]:
        return self.sizes

    def bind(self, runs: Sequence[tuple[Tensors, Tensors]], first: int, count: int) -> Callable[[], None]:
        session, graph = self.session, self.name  # not self: a graph that is closed should be gone at once
        bindings = [self.tie(inputs, outputs, first, count) for inputs, outputs in runs]

        def run() -> None:
            with engine_errors(f"graph '{graph}'"):
                for binding in bindings:
                    binding.synchronize_inputs()
                    session.run_with_iobinding(binding)
                    binding.synchronize_outputs()

        return run

    def tie(self, inputs: Tensors, outputs: Tensors, first: int, count: int) -> IOBinding:
        binding = self.session.io_binding()
        for tie, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                host = buffer.host
                if first + count > len(host):  # ONNX Runtime would go on behind the buffer
                    raise EngineError(
                        f"graph '{self.name}': rows {first} to {first + count} of {name}, which has {len(host)}"
                    )
                with engine_errors(f"graph '{self.name}'"):
                    shape = (count, *host.shape[1:])
                    tie(name, self.device, self.number, host.dtype.type, shape, buffer.address(first))
        return binding

    def run(self, wanted: Sequence[str], **inputs: Array) -> list[Array]:
        with engine_errors(f"graph '{self.name}'"):
            found: list[Array] = self.session.run(list(wanted), inputs)
        return found


def session_options(weights: Path, threads: int | None = None, native: bool = True) -> SessionOptions:
    """For a graph whose weights lie in that folder; `native`: with our library, where it was built."""
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    # Left alone, ONNX Runtime starts a thread for each core of the machine, also where a process may use but few.
    options.intra_op_num_threads = threads or cores().threads
    # Threads that wait actively after a run would take the cores from the next graph's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    if native:
        with suppress(EnvironmentLackError):  # slower without, as `mdm doctor` says
            register(options)
    return options


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises into one of our errors."""
    try:
        yield
    except MdmError:
        raise
    except Exception as error:  # ONNX Runtime's own classes, one for each status code
        said = " ".join(str(error).split())[:300]
        raise EngineError(f"{what} failed in ONNX Runtime: {said}") from error


class OrtBackend:
    """ONNX Runtime by one of its providers. Graphs are loaded when first asked for."""

    chain = 1

    def __init__(
        self,
        bundle: Bundle,
        name: str = "ort-cpu",
        threads: int | None = None,
        memory: int | None = None,
        device: int = 0,
    ) -> None:
        """`threads` of the CPU, default all it may use; `memory`: bytes of loaded graphs together, on a GPU of each."""
        self.bundle, self.name, self.threads, self.memory, self.number = bundle, name, threads, memory, device
        if name not in PROVIDERS:
            raise InputError(f"unknown backend '{name}'{nearest(name, PROVIDERS)}\nbackends: {', '.join(PROVIDERS)}")
        self.provider, self.device = PROVIDERS[name]
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}, expected at least 1")
        self.plugin = name == RTX
        if self.plugin and memory is not None:
            raise InputError(f"backend '{name}' cannot hold to a limit of memory\nleave it out, or use ort-cuda")
        require_engine()
        if self.plugin:
            rtx_device(device)
        else:
            self.require_provider()
        if bundle.manifest["precision"] == "bf16" and name == "ort-cpu":
            raise EnvironmentLackError(
                f"bundle '{bundle.path}' is in bfloat16, which ONNX Runtime's CPU cannot compute\n"
                "export the checkpoint with --precision fp32, or run it on a GPU"
            )
        self.shelf: Shelf[OrtGraph] = Shelf(memory if self.device == "cpu" else None)
        self.loaded = self.shelf.loaded

    def require_provider(self) -> None:
        import onnxruntime

        found = onnxruntime.get_available_providers()
        if self.provider not in found:
            raise EnvironmentLackError(
                f"backend '{self.name}' needs ONNX Runtime's {self.provider}, found {', '.join(found)}\n"
                'Install it in an environment without onnxruntime: pip install "mdm-deploy[gpu]"'
            )
        if self.device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them, where ONNX Runtime would not look

    def graph(self, name: str) -> Graph:
        return self.shelf.get(name, self.load, self.size_of)

    def lacks(self, name: str) -> str:
        return ""

    def load(self, name: str) -> OrtGraph:
        described = self.bundle.graph(name)
        built = {"shapes": shapes_of(self.bundle.manifest, name, PROFILE)} if self.plugin else {}
        session = self.session(self.bundle.graph_bytes(name), name, described["operators"], **built)
        for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            there = {one.name: (TYPES.get(one.type), one.shape) for one in found}
            said = {one["name"]: (one["dtype"], one["shape"]) for one in described[kind]}
            if there != said:
                name_ = next(n for n in (*said, *there) if said.get(n) != there.get(n))
                raise InputError(
                    f"graph '{name}' of bundle '{self.bundle.path}' is not what its manifest says\n"
                    f"{kind}: {told(name_)} is {told(there.get(name_))}, the manifest has {told(said.get(name_))}"
                )
        batches = range(PROFILE.batch.least, PROFILE.batch.most + 1) if self.plugin else ()
        return OrtGraph(name, session, described, self.device, self.number, batches)

    def session(
        self, content: bytes, name: str, operators: Collection[str], shapes: Shapes | None = None
    ) -> InferenceSession:
        """Any graph on this engine; its weights lie in the bundle. `operators`: what it is made of; `shapes`: of its
        inputs, where TensorRT-RTX builds an engine."""
        import onnxruntime

        options = self.options(operators)
        if self.plugin:
            use_rtx(options, self.number, shapes)
        try:
            # Without its fallback, which prints that it now runs on the CPU.
            session = onnxruntime.InferenceSession(
                content, options, None if self.plugin else [self.provider_options()], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's own classes, one for each status code
            raise EnvironmentLackError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load graph '{name}' of bundle '{self.bundle.path}':\n"
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        if self.provider not in session.get_providers():  # it fell back to the CPU
            raise EnvironmentLackError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load its {self.provider}: CUDA or cuDNN is missing\n"
                "mdm doctor says which"
            )
        return session

    def options(self, operators: Collection[str]) -> SessionOptions:
        # The library computes on the CPU. On a GPU that pays for Mamba-1 alone, whose body is a loop over tokens; the
        # convolutions of such a graph come along. TensorRT-RTX has the loops within its engine, if it has all nodes.
        looped = f"{DOMAIN}.{SELECTIVE_SCAN.name}" in operators
        native = self.device == "cpu" or (looped and not self.plugin)
        return session_options(self.bundle.path, self.threads, native)

    def provider_options(self) -> Any:
        assert not self.plugin  # ONNX Runtime would warn that it knows no such name, and go on with the CPU
        if self.device == "cpu":
            return self.provider
        limit = {} if self.memory is None else {"gpu_mem_limit": str(self.memory)}
        return self.provider, {"device_id": str(self.number), **limit}

    def buffer(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        if self.device == "cpu":
            return HostBuffer(np.zeros(shape, dtype))
        return DeviceBuffer(shape, dtype, self.device, self.number)

    def size_of(self, name: str) -> int:
        """Bytes a loaded graph takes, about: its weights' files count whole, though it may not use all of them."""
        manifest = self.bundle.manifest
        weights = sum(manifest["files"][file]["size"] for file in self.bundle.graph(name)["weights"])
        return int(weights * GROWTH[manifest["precision"]])
