"""TensorRT's library on one GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.plugins.tensorrt.node import take_error
from mdm.runtime.tensorrt.engines import place_of
from mdm.runtime.tensorrt.gpu import Gpu
from mdm.runtime.tensorrt.versions import Kind, tensorrt_module

SAID = 300  # characters of its words


class Library:
    """`trt` is its Python module, `place` what engines that run here were built for."""

    def __init__(self, device: int = 0) -> None:
        self.trt = tensorrt_module(lean=True)
        self.gpu = Gpu(device)
        # A lean runtime runs what is version-compatible alone: it is no builder's version.
        version, name = self.trt.__version__, self.trt.__name__
        self.place = place_of(version if name == "tensorrt" else f"{version} ({name})", self.gpu.device)
        self.log = make_log(self.trt)
        with self.gpu.mine():
            try:
                self.runtime = self.trt.Runtime(self.log)
            except TypeError as error:  # the bindings' way to say that TensorRT gives none
                raise EnvironmentLackError(
                    f"TensorRT {self.trt.__version__} does not start: {self.log.take() or 'it does not say why'}\n"
                    f"found a driver for CUDA {self.gpu.driver.version()}: it may want a newer one"
                ) from error

    def deserialize(self, plan: Any, plugins: Sequence[Kind], carries_code: bool = False) -> Any:
        """TensorRT's engine from a plan's bytes, which TensorRT believes whatever they are. `plugins`: what it runs;
        `carries_code`: it brings those, and a runtime."""
        if plugins and not carries_code:
            self.require(plugins)
        with self.gpu.mine():
            self.log.take()  # what went wrong before was told then
            self.runtime.engine_host_code_allowed = carries_code
            made = self.runtime.deserialize_cuda_engine(plan)
        if made is None:
            raise self.failed(f"TensorRT {self.trt.__version__} does not load the engine")
        return made

    def require(self, plugins: Sequence[Kind]) -> None:
        """Our plugins, registered; then what an engine was built with has to be among them."""
        if self.trt.__name__ != "tensorrt":
            raise EnvironmentLackError(
                f"the engine wants our plugins, which {self.trt.__name__} cannot have from Python\n"
                'pip install "mdm-deploy[tensorrt]", or build it with --version-compatible --library FILE'
            )
        from mdm.plugins.tensorrt.python_plugin import register

        register()
        for name, version, namespace in plugins:
            if self.trt.get_plugin_registry().get_creator(name, version, namespace) is None:
                raise EnvironmentLackError(
                    f"the engine wants the plugin {name} version {version} of '{namespace}', which is not here\n"
                    "it was built by another mdm-deploy: mdm build BUNDLE --force"
                )

    def failed(self, what: str) -> EngineError:
        """With what our plugins raised meanwhile, else with TensorRT's last words."""
        raised = take_error()
        if raised is not None and not isinstance(raised, Exception):
            raise raised  # Ctrl-C, which the bindings keep to themselves
        said = " ".join(str(raised).split()) if raised is not None else self.log.take()
        return EngineError(f"{what}{': ' if said else ''}{said}")


@cache
def make_log(trt: Any) -> Any:
    """A logger that keeps the last error, for a message of ours: TensorRT takes one for the whole process."""

    class Log(trt.ILogger):  # of a module that is not always there
        def __init__(self) -> None:
            super().__init__()
            self.said = ""

        def log(self, severity: Any, text: str) -> None:
            worse, said = severity <= trt.ILogger.Severity.ERROR, " ".join(text.split())[:SAID]
            # That CUDA does not start is but a warning to it; later ones are not to hide an error.
            if worse or (severity <= trt.ILogger.Severity.WARNING and not self.said):
                self.said = said

        def take(self) -> str:
            said, self.said = self.said, ""
            return said

    return Log()
