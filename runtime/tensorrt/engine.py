"""An engine in the GPU's memory: an execution context for each set of shapes, and runs on them, captured when they come
again.

A run is a chain of evaluations, each with addresses of its own: the whole denoising loop of a sample, or one step of
it. The first time it is put on the stream call by call, which TensorRT wants before any capture; the second time it is
captured, and from then on it is one call of the driver.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.tensorrt.gpu import ALIGNED, Gpu
from mdm.runtime.tensorrt.library import Library

Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]  # of all inputs
Addresses = Mapping[str, int]  # of all inputs and outputs

MOST_FITTED = 16  # contexts of an engine: each takes some MB of this side's memory
MOST_CAPTURES = 8  # of a context: a loop of 20 steps of a large model has 30,000 launches, some 30 MB


class Run:
    """A chain of evaluations at one set of shapes. To call it is to run it, and to wait."""

    def __init__(self, engine: Engine, shapes: Shapes, chain: Sequence[Addresses]) -> None:
        self.engine, self.shapes, self.chain = engine, shapes, chain
        self.times = 0

    def __call__(self) -> None:
        gpu = self.engine.gpu
        try:
            with gpu.mine():
                self.engine.launch(self)
            gpu.wait()
        except EngineError as error:
            raise EngineError(f"graph '{self.engine.name}' failed in TensorRT: {error}") from error


class Capture:
    """A run as the driver knows it, which goes with this object."""

    def __init__(self, gpu: Gpu, handle: int) -> None:
        self.handle = handle
        gpu.drop_with(self, gpu.driver.free_graph, handle)


class Engine:
    """`made` is TensorRT's; `captures`: whether runs are captured."""

    def __init__(self, name: str, library: Library, made: Any, captures: bool = True) -> None:
        self.name, self.library, self.gpu, self.made, self.captures = name, library, library.gpu, made, captures
        self.why_not = ""  # captured, where that fails
        trt = library.trt
        self.tensors = [made.get_tensor_name(index) for index in range(made.num_io_tensors)]
        self.inputs = [name for name in self.tensors if made.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.profiles = [
            {name: _three(made.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(made.num_optimization_profiles)
        ]
        self._fitted: OrderedDict[Shapes, Fitted] = OrderedDict()  # the one used last at the end

    def dtype_of(self, name: str) -> str:
        """In numpy's words, where it has any."""
        types = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool", "INT64": "int64", "INT32": "int32"}
        kind = str(self.made.get_tensor_dtype(name).name)
        return types.get(kind, kind)

    def profile_for(self, shapes: Shapes) -> int:
        """Of those that take the shapes, the one built for the nearest."""
        far = {
            index: sum(_distance(shape, profile[name]) for name, shape in shapes)
            for index, profile in enumerate(self.profiles)
        }
        best = min(far, key=far.__getitem__)
        if far[best] < math.inf:
            return best
        refused = (one for one in shapes if all(_distance(one[1], p[one[0]]) == math.inf for p in self.profiles))
        name, shape = next(refused, shapes[0])  # each may fit a profile, and all together none
        takes = "; or ".join(f"{[*p[name][0]]} to {[*p[name][2]]}" for p in self.profiles)
        raise InputError(
            f"the engine of graph '{self.name}' takes no {name} of shape {[*shape]}\nit takes {takes}\n"
            "build one for more: mdm build BUNDLE --profile FILE"
        )

    def launch(self, run: Run) -> None:
        """Put a run on the stream."""
        fitted = self.fit(run.shapes)
        fitted.place()
        capture = fitted.captures.get(run)
        if capture is None and run.times and self.captures:
            try:
                capture = fitted.capture(run)
            except EngineError as error:  # TensorRT or a plugin does what cannot be captured
                self.captures, self.why_not = False, str(error)
        if capture is not None:
            self.gpu.driver.replay(capture.handle, self.gpu.stream)
        else:
            fitted.enqueue(run)
        run.times += 1

    def fit(self, shapes: Shapes) -> Fitted:
        if shapes not in self._fitted:
            if len(self._fitted) == MOST_FITTED:
                self.gpu.wait()
                self._fitted.popitem(last=False)
            self._fitted[shapes] = Fitted(self.library, self.made, self.profile_for(shapes), shapes)
        self._fitted.move_to_end(shapes)
        return self._fitted[shapes]


class Fitted:
    """An execution context for one set of shapes: what was captured holds for the context it was captured with.

    It does not know its Engine, which is to be gone as soon as nobody has it.
    """

    def __init__(self, library: Library, made: Any, profile: int, shapes: Shapes) -> None:
        self.library, self.gpu = library, library.gpu
        strategy = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = made.create_execution_context(strategy)
        if self.context is None:
            raise library.failed("it makes no execution context")
        if not self.context.set_optimization_profile_async(profile, self.gpu.stream):
            raise library.failed(f"it refuses profile {profile}")
        for name, shape in shapes:
            if not self.context.set_input_shape(name, shape):
                raise library.failed(f"it refuses {name} of shape {[*shape]}")
        if missing := self.context.infer_shapes():
            raise library.failed(f"it does not know the shape of {', '.join(missing)}")
        self.size = made.get_device_memory_size_for_profile_v2(profile)
        self.scratch = 0, 0  # where, and how much
        self.captures: WeakKeyDictionary[Run, Capture] = WeakKeyDictionary()

    def place(self) -> None:
        """Give the context its memory, where that has moved: what was captured then points to what is gone."""
        scratch = self.gpu.scratch(self.size), self.gpu.scratch_size
        if scratch != self.scratch:
            self.captures.clear()
            self.context.set_device_memory(*scratch)
            self.scratch = scratch

    def enqueue(self, run: Run) -> None:
        for addresses in run.chain:
            for name, address in addresses.items():
                if not self.context.set_tensor_address(name, address):
                    raise self.library.failed(f"it refuses the memory of {name}")
            if not self.context.execute_async_v3(self.gpu.stream):
                raise self.library.failed("it does not run")

    def capture(self, run: Run) -> Capture:
        while len(self.captures) >= MOST_CAPTURES:
            del self.captures[next(iter(self.captures))]
        self.captures[run] = made = Capture(self.gpu, self.gpu.capture(lambda: self.enqueue(run)))
        return made


def check_aligned(graph: str, addresses: Addresses) -> None:
    for name, address in addresses.items():
        if address % ALIGNED:
            raise EngineError(f"graph '{graph}': {name} lies at {address:#x}, TensorRT wants a multiple of {ALIGNED}")


def _three(dims: Sequence[Any]) -> tuple[Shape, Shape, Shape]:
    least, usual, most = (tuple(shape) for shape in dims)
    return least, usual, most


def _distance(shape: Shape, profile: tuple[Shape, Shape, Shape]) -> float:
    """0 for the usual shape, infinite outside the profile."""
    least, usual, most = profile
    if len(shape) != len(least) or not all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True)):
        return math.inf
    return sum(abs(math.log(size / expected)) for size, expected in zip(shape, usual, strict=True))
