"""TensorRT as a backend: engines that `mdm build` made here, on one GPU.

It needs TensorRT's Python bindings and the CUDA driver, nothing else: tensors lie in memory of `gpu.py`, and the
operators are the plugins of `plugins/tensorrt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime.backend import Buffer, Graph, Spec, specs_of
from mdm.runtime.bundle import Bundle
from mdm.runtime.json_schema import told
from mdm.runtime.shelf import Shelf
from mdm.runtime.tensorrt.engine import MOST_CAPTURED, Engine
from mdm.runtime.tensorrt.engines import build_command, engines_for, open_engine
from mdm.runtime.tensorrt.gpu import GpuBuffer
from mdm.runtime.tensorrt.graph import TensorRtGraph
from mdm.runtime.tensorrt.library import Library
from mdm.runtime.tensorrt.profiles import profile_name
from mdm.runtime.tensorrt.records import Record, manifests


class TensorRtBackend:
    """Engines are loaded when first asked for."""

    name = "tensorrt"
    chain = MOST_CAPTURED  # a longer loop is several runs

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
        self.bundle, self.memory, self.captures = bundle, memory, captures
        self.profile = None if profile is None else profile_name(profile)
        self.library = Library(device)
        self.gpu = self.library.gpu
        self.shelf: Shelf[TensorRtGraph] = Shelf(memory)

    def graph(self, name: str) -> Graph:
        # The file is read before this thread has the GPU: its hash takes a second for each GB.
        there = name in self.shelf.loaded
        opened = None if there else open_engine(self.bundle, name, self.library.place, self.profile)
        with self.gpu.mine():  # an engine that has to go is not to go in the middle of a capture
            return self.shelf.get(name, partial(self.load, opened), self.size_of)

    def buffer(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        return GpuBuffer(self.gpu, shape, dtype)

    def lacks(self, name: str) -> str:
        if self.bundle.graph(name)["role"] == "denoise" and not any(manifests(self.bundle, name)):
            return f"no engine was built of it, and no task needs it: {build_command(self.bundle)} --graph {name}"
        return ""

    def size_of(self, name: str) -> int:
        """Bytes on the GPU, about, of a graph that is loaded or would be."""
        loaded = self.shelf.loaded.get(name)
        if loaded is not None:
            return loaded.size
        _, record = engines_for(self.bundle, name, self.library.place, self.profile)[0]
        return self.size_in(record, name)

    def size_in(self, record: Record, name: str) -> int:
        weights = sum(self.bundle.manifest["files"][file]["size"] for file in self.bundle.graph(name)["weights"])
        # What streams its weights takes what it is given.
        return 0 if record.streams else record.bytes + weights * record.stripped

    def load(self, opened: tuple[Path, Record, mmap] | None, name: str) -> TensorRtGraph:
        # None: it was there a moment ago, and had to go.
        path, record, plan = opened or open_engine(self.bundle, name, self.library.place, self.profile)
        again = f"{build_command(self.bundle, self.profile)} --graph {name} --force"
        try:
            with plan:
                made = self.library.deserialize(plan, record.operators, record.carries_code)
        except EngineError as error:
            raise EngineError(f"engine '{path}': {error}\nbuild it again: {again}") from error
        if record.stripped:
            self.refit(made, name)
        if record.streams:
            budget = made.get_weight_streaming_automatic_budget()
            made.weight_streaming_budget_v2 = budget if self.memory is None else min(self.memory, budget)
        engine = Engine(name, self.library, made, self.captures)
        described = self.bundle.graph(name)
        inputs, outputs = specs_of(described["inputs"]), specs_of(described["outputs"])
        check_tensors(engine, {**inputs, **outputs}, f"engine '{path}'", f"build it again: {again}")
        return TensorRtGraph(engine, inputs, outputs, self.size_in(record, name))

    def refit(self, made: Any, name: str) -> None:
        """Give an engine that was built without its weights those of the bundle: TensorRT takes any for the right
        ones."""
        trt, log, described = self.library.trt, self.library.log, self.bundle.graph(name)
        if not hasattr(trt, "OnnxParserRefitter"):
            raise EnvironmentLackError(
                f"the engine of graph '{name}' has no weights, and {trt.__name__} cannot give it any\n"
                'pip install "mdm-deploy[tensorrt]", or build it without --strip'
            )
        for file in (described["file"], *described["weights"]):
            self.bundle.check(file)
        log.take()
        refitter = trt.Refitter(made, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        what = f"the bundle's weights do not go into the engine of graph '{name}'"
        if not parser.refit_from_file(str(self.bundle.file(described["file"]).resolve())):
            said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise EngineError(f"{what}: {said}") if said else self.library.failed(what)
        if not refitter.refit_cuda_engine_async(self.gpu.stream):
            raise self.library.failed(what)
        self.gpu.wait(self.gpu.mark())


def check_tensors(engine: Engine, specs: dict[str, Spec], what: str, remedy: str) -> None:
    """The engine has the inputs and outputs that the manifest says."""
    said = {
        name: (spec.dtype.name, tuple(size if isinstance(size, int) else -1 for size in spec.shape))
        for name, spec in specs.items()
    }
    found = {name: (engine.dtype_of(name), tuple(engine.made.get_tensor_shape(name))) for name in engine.tensors}
    if found != said:
        name = next(n for n in (*said, *found) if said.get(n) != found.get(n))
        raise InputError(
            f"{what} is not what the bundle's manifest says\n"
            f"{told(name)} is {told(found.get(name))}, the manifest has {told(said.get(name))}\n"
            f"{remedy}"
        )
