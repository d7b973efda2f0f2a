"""Models that are no graph of a bundle on its backend: an operator alone, a part of a graph, a graph with probes.

ONNX Runtime opens them as they are; for TensorRT an engine is built, and built again for other shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from mdm.plugins.library import REGISTERED
from mdm.runtime.backend import Array, Backend
from mdm.runtime.ort import OrtBackend, engine_errors, session_options

if TYPE_CHECKING:
    from mdm.runtime.tensorrt.engine import Engine, Shapes
    from mdm.runtime.tensorrt.library import Library

LIBRARY, PLUGIN, BODY = "native library", "plugin", "function body"  # forms of an operator


class Session(Protocol):
    def run(self, wanted: Sequence[str] | None, feeds: Mapping[str, Array]) -> Sequence[Any]:
        """The outputs wanted, or all of them."""


def session_on(
    backend: Backend, content: bytes, name: str, operators: Collection[str], by_body: bool = False
) -> Session:
    """A model whose weights lie in the backend's bundle. `by_body`: our operators by their bodies in the file."""
    if not isinstance(backend, OrtBackend):
        from mdm.runtime.tensorrt.backend import TensorRtBackend

        assert isinstance(backend, TensorRtBackend)
        return BuiltSession(backend.library, content, name, backend.bundle.path, by_body)
    if not by_body or backend.plugin:  # TensorRT-RTX takes the bodies alone
        return backend.session(content, name, operators)
    from onnxruntime import InferenceSession

    options = session_options(backend.bundle.path, backend.threads, native=False)
    with engine_errors(f"the function body of {name}"):
        return InferenceSession(content, options, providers=[backend.provider_options()])


def forms_on(backend: Backend, operators: Collection[str], has_body: bool) -> list[str]:
    """The forms of an operator to judge: first what the backend takes, then, where that is ours, the body behind it."""
    own = PLUGIN
    if isinstance(backend, OrtBackend):
        own = LIBRARY
        try:
            backend.options(operators).get_session_config_entry(REGISTERED)
        except RuntimeError:  # no such entry: the library was not built, or is not for this backend
            return [BODY]
    return [own, BODY] if has_body else [own]


class BuiltSession:
    """A model that TensorRT builds when it is first run on some shapes."""

    def __init__(self, library: Library, content: bytes, name: str, folder: Path, by_body: bool = False) -> None:
        """`folder`: where its weights are."""
        self.library, self.content, self.name, self.folder, self.by_body = library, content, name, folder, by_body
        self.engines: dict[Any, Engine] = {}

    def run(self, wanted: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        from mdm.runtime.tensorrt.engine import Run
        from mdm.runtime.tensorrt.gpu import GpuBuffer

        # They may be sizes, which TensorRT takes from this side's memory and wants to know ranges of: built in.
        sizes = {name: array for name, array in feeds.items() if array.dtype.kind == "i" and array.ndim < 2}
        feeds = {name: array for name, array in feeds.items() if name not in sizes}
        shapes = tuple((name, array.shape) for name, array in feeds.items())
        key = shapes, tuple((name, array.shape, *array.ravel()) for name, array in sizes.items())
        if key not in self.engines:
            self.engines = {key: self.build(shapes, sizes)}  # the one before would only take memory
        engine, gpu = self.engines[key], self.library.gpu
        with gpu.mine():
            context = engine.fit(shapes).context
        buffers = {
            name: GpuBuffer(gpu, context.get_tensor_shape(name), engine.dtype_of(name)) for name in engine.tensors
        }
        for name, array in feeds.items():
            buffers[name].host[...] = array
            buffers[name].push()
        Run(engine, shapes, [{name: buffer.pointer for name, buffer in buffers.items()}])()
        outputs = [name for name in engine.tensors if name not in engine.inputs] if wanted is None else wanted
        for name in outputs:
            buffers[name].pull()
        return [buffers[name].host.copy() for name in outputs]

    def build(self, shapes: Shapes, sizes: Mapping[str, Array]) -> Engine:
        from mdm.runtime.tensorrt.engine import Engine
        from mdm.tools.engines.run import build_for_shapes

        with TemporaryDirectory(prefix="mdm_model") as made:
            model = Path(made) / "model.onnx"
            model.write_bytes(with_constants(self.content, sizes) if sizes else self.content)
            plan, plugins = build_for_shapes(model, self.folder, dict(shapes), self.library.place, self.by_body)
        return Engine(self.name, self.library, self.library.deserialize(plan, plugins))


def with_constants(content: bytes, values: Mapping[str, Array]) -> bytes:
    """A model with these inputs as constants."""
    from onnx import load_model_from_string, numpy_helper

    model = load_model_from_string(content)
    for place, one in reversed([*enumerate(model.graph.input)]):
        if one.name in values:
            del model.graph.input[place]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.items())
    made: bytes = model.SerializeToString()
    return made
