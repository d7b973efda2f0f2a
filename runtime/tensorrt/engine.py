"""An engine in the GPU's memory, and runs of it, captured when they come again.

A run is a chain of evaluations, each with addresses of its own: the whole denoising loop of a sample, or one step of
it. The first time it is put on the stream call by call, in an execution context that all runs of these shapes share.
The second time it is captured, in a context of its own, which is never touched again: NVIDIA advises one for each
graph. From then on it is one call of the driver.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.tensorrt.gpu import ALIGNED
from mdm.runtime.tensorrt.library import Library

Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]  # of all inputs
Addresses = Mapping[str, int]  # of all inputs and outputs

MOST_CONTEXTS = 32  # that are shared, and of captures: each takes some MB of this side's memory
MOST_CAPTURED = 256  # evaluations in captures of an engine: one of a large model has 1500 launches, some 1.5 MB
MOST_FAILURES = 3  # captures in a row that fail, before none is tried any more


class Run:
    """A chain of evaluations at one set of shapes. To call it is to run it, and to wait."""

    def __init__(self, engine: Engine, shapes: Shapes, chain: Sequence[Addresses]) -> None:
        self.engine, self.shapes, self.chain = engine, shapes, chain
        self.ran = False  # call by call; not any more when its capture had to make room

    def __call__(self) -> None:
        gpu = self.engine.gpu
        try:
            with gpu.mine():
                self.engine.launch(self)
                done = gpu.mark()
            gpu.wait(done)
        except EngineError as error:
            raise EngineError(f"graph '{self.engine.name}' failed in TensorRT: {error}") from error


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
        self.captured: WeakKeyDictionary[Run, Capture] = WeakKeyDictionary()  # likewise
        self._failures = 0
        if made.streamable_weights_size > made.weight_streaming_budget_v2:
            self.captures, self.why_not = False, "TensorRT does not let an engine that streams its weights be captured"

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
        capture = self.captured.pop(run, None)
        if capture is not None and not capture.holds():  # what it works in has moved
            capture = None
        if capture is None and run.ran and self.captures:
            capture = self._capture(run)
        if capture is None:
            self.fit(run.shapes).enqueue(run.chain)
            run.ran = True
        else:
            self.captured[run] = capture
            self.gpu.driver.replay(capture.handle, self.gpu.stream)

    def fit(self, shapes: Shapes) -> Fitted:
        """A context for these shapes."""
        if shapes not in self._fitted:
            if len(self._fitted) == MOST_CONTEXTS:
                self.gpu.wait(self.gpu.mark())
                self._fitted.popitem(last=False)
            self._fitted[shapes] = Fitted(self.library, self.made, self.profile_for(shapes), shapes)
        self._fitted.move_to_end(shapes)
        return self._fitted[shapes]

    def _capture(self, run: Run) -> Capture | None:
        """None where TensorRT or a plugin does what cannot be captured."""
        while self.captured and (
            len(run.chain) + self._steps_captured() > MOST_CAPTURED or len(self.captured) >= MOST_CONTEXTS
        ):
            oldest = next(iter(self.captured))
            del self.captured[oldest]
            oldest.ran = False  # it is to come twice again
        try:
            made = Capture(Fitted(self.library, self.made, self.profile_for(run.shapes), run.shapes), run.chain)
        except EngineError as error:
            self._failures += 1
            self.captures, self.why_not = self._failures < MOST_FAILURES, str(error)
            return None
        self._failures, self.why_not = 0, ""
        return made

    def _steps_captured(self) -> int:
        return sum(len(run.chain) for run in self.captured)


class Fitted:
    """An execution context for one set of shapes. It does not know its Engine, which is to be gone as soon as nobody
    has it."""

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
        try:
            missing = self.context.infer_shapes()
        except RuntimeError as error:
            raise library.failed(f"it refuses the shapes {dict(shapes)}") from error
        if missing:
            raise library.failed(f"it does not know the shape of {', '.join(missing)}")
        self.size = made.get_device_memory_size_for_profile_v2(profile)
        self.scratch = 0, 0  # where, and how much

    def enqueue(self, chain: Sequence[Addresses]) -> None:
        scratch = self.gpu.scratch(self.size), self.gpu.scratch_size
        if scratch != self.scratch:
            self.context.set_device_memory(*scratch)
            self.scratch = scratch
        for addresses in chain:
            for name, address in addresses.items():
                if not self.context.set_tensor_address(name, address):
                    raise self.library.failed(f"it refuses the memory of {name}")
            if not self.context.execute_async_v3(self.gpu.stream):
                raise self.library.failed("it does not run")


class Capture:
    """A chain of evaluations as one launch, with the context that it was captured in."""

    def __init__(self, fitted: Fitted, chain: Sequence[Addresses]) -> None:
        self.fitted, gpu = fitted, fitted.gpu
        # TensorRT wants to have run once before. A step leaves what it starts from as it is, so it can be repeated. The
        # context must not go before that is done, should the capture fail.
        fitted.enqueue(chain[:1])
        gpu.wait(gpu.mark())
        self.handle = gpu.capture(lambda: fitted.enqueue(chain))
        gpu.drop_with(self, gpu.driver.free_graph, self.handle)

    def holds(self) -> bool:
        """Whether the memory it works in is where it was."""
        return self.fitted.scratch == (self.fitted.gpu.scratch(0), self.fitted.gpu.scratch_size)


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
