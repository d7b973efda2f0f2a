"""TensorRT as a backend: engines that `mdm build` made here, on one GPU.

It needs TensorRT's Python bindings and the CUDA driver, nothing else: tensors lie in memory of `gpu.py`, and the
operators are the plugins of `plugins/tensorrt`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime.backend import Buffer, Graph, Spec, specs_of
from mdm.runtime.bundle import Bundle
from mdm.runtime.json_schema import told
from mdm.runtime.shelf import Shelf
from mdm.runtime.tensorrt.engine import Engine
from mdm.runtime.tensorrt.engines import find_engine
from mdm.runtime.tensorrt.gpu import GpuBuffer
from mdm.runtime.tensorrt.graph import TensorRtGraph
from mdm.runtime.tensorrt.library import Library
from mdm.runtime.tensorrt.records import Record, manifests

LONGEST = 1024  # steps of a loop: more than any sampler has


class TensorRtBackend:
    """Engines are loaded when first asked for."""

    name = "tensorrt"
    chain = LONGEST

    def __init__(
        self,
        bundle: Bundle,
        memory: int | None = None,
        device: int = 0,
        profile: str | None = None,
        captures: bool = True,
    ) -> None:
        """`memory`: bytes of engines together, and of the weights of one that streams them; `profile`: engines that
        were built with it, else the newest; `captures`: runs that come again become CUDA graphs."""
        self.bundle, self.memory, self.profile, self.captures = bundle, memory, profile, captures
        self.library = Library(device)
        self.gpu = self.library.gpu
        self.found: dict[str, tuple[Path, Record]] = {}
        self.shelf: Shelf[TensorRtGraph] = Shelf(self.load, self.size_of, memory)

    def graph(self, name: str) -> Graph:
        with self.gpu.mine():  # an engine that has to go is not to go in the middle of a capture
            return self.shelf(name)

    def buffer(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        return GpuBuffer(self.gpu, shape, dtype)

    def lacks(self, name: str) -> str:
        if self.bundle.graph(name)["role"] == "denoise" and not any(manifests(self.bundle, name)):
            return f"no engine was built of it, and no task needs it: mdm build --graph {name}"
        return ""

    def find(self, name: str) -> tuple[Path, Record]:
        if name not in self.found:  # its hash takes a second for each GB
            self.found[name] = find_engine(self.bundle, name, self.library.place, self.profile)
        return self.found[name]

    def size_of(self, name: str) -> int:
        """Bytes on the GPU, about. What streams its weights takes what it is given."""
        _, record = self.find(name)
        if record.streams:
            return 0
        weights = sum(self.bundle.manifest["files"][file]["size"] for file in self.bundle.graph(name)["weights"])
        return record.bytes + weights * record.stripped

    def load(self, name: str) -> TensorRtGraph:
        path, record = self.find(name)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                made = self.library.deserialize(plan, record.operators, record.carries_code)
            if record.stripped:
                self.refit(made, name)
        except EngineError as error:
            raise EngineError(f"engine '{path}': {error}\nbuild it again: mdm build --force") from error
        if record.streams:
            budget = made.get_weight_streaming_automatic_budget()
            made.weight_streaming_budget_v2 = budget if self.memory is None else min(self.memory, budget)
        engine = Engine(name, self.library, made, self.captures)
        described = self.bundle.graph(name)
        inputs, outputs = specs_of(described["inputs"]), specs_of(described["outputs"])
        check_tensors(engine, {**inputs, **outputs}, path)
        return TensorRtGraph(engine, inputs, outputs)

    def refit(self, made: Any, name: str) -> None:
        """Give an engine that was built without its weights those of the bundle."""
        trt, log = self.library.trt, self.library.log
        if not hasattr(trt, "OnnxParserRefitter"):
            raise EnvironmentLackError(
                f"the engine of graph '{name}' has no weights, and {trt.__name__} cannot give it any\n"
                'pip install "mdm-deploy[tensorrt]", or build it without --strip'
            )
        self.bundle.graph_bytes(name)  # the file is the signed one
        refitter = trt.Refitter(made, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_file(str(self.bundle.file(self.bundle.graph(name)["file"]).resolve())):
            said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise EngineError(f"the bundle's weights do not go into it: {said or log.take()}")
        if not refitter.refit_cuda_engine_async(self.gpu.stream):
            raise self.library.failed("the bundle's weights do not go into it")
        self.gpu.wait()


def check_tensors(engine: Engine, specs: dict[str, Spec], path: Path) -> None:
    """The engine has the inputs and outputs that the manifest says."""
    said = {
        name: (spec.dtype.name, tuple(size if isinstance(size, int) else -1 for size in spec.shape))
        for name, spec in specs.items()
    }
    found = {name: (engine.dtype_of(name), tuple(engine.made.get_tensor_shape(name))) for name in engine.tensors}
    if found != said:
        name = next(n for n in (*said, *found) if said.get(n) != found.get(n))
        raise InputError(
            f"engine '{path}' is not what the bundle's manifest says\n"
            f"{told(name)} is {told(found.get(name))}, the manifest has {told(said.get(name))}\n"
            "build it again: mdm build --force"
        )
