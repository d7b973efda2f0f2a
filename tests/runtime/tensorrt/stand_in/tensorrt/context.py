"""An execution context: everything is looked at when a run is asked for; the stream computes it later."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from .computing import NUMPY, view
from .cuda import GRANULE, Memory, block, capturing, driver, enqueue, has_context
from .enums import DataType, ExecutionContextAllocationStrategy
from .plan import Dims
from .words import error, needs, planted

if TYPE_CHECKING:
    from .engine import ICudaEngine

STATIC, ON_PROFILE_CHANGE, USER_MANAGED = ExecutionContextAllocationStrategy.__members__.values()


def sizes_of(shape: Iterable[int | str], sizes: Mapping[str, int]) -> Dims:
    """A shape with its open dimensions set, or -1 for those not known."""
    return Dims(size if isinstance(size, int) else sizes.get(size, -1) for size in shape)


def volume(shape: Sequence[int]) -> int:
    return prod(shape)


@dataclass(frozen=True)
class Range:
    start: int
    size: int

    def meets(self, other: Range) -> bool:
        return self.start < other.start + other.size and other.start < self.start + self.size


# Activation memory of runs that are not done: two runs on two streams must not share any.
_busy: list[tuple[Range, int, object]] = []


class Run:
    """One launch, with everything as it was when it was asked for."""

    def __init__(self, context: IExecutionContext, stream: int, captured: bool, need: int) -> None:
        engine = context.engine
        self.session, self.context = engine._session, weakref.ref(context)
        self.changes = context._changes if captured else None
        self.tensors = [
            (name, tensor["mode"], tensor["dtype"], context.get_tensor_shape(name), context._addresses[name])
            for name, tensor in engine._tensors.items()
        ]
        self.activations, weights = Range(context._start, need), engine._weights
        self.lasting = [(where, block(where.start, where.size)) for where in
                        (self.activations, Range(weights.start, weights.size))]  # fmt: skip
        # What TensorRT itself exchanges stays until a run is done; a graph has only its address.
        self.kept = None if captured else context._memory
        if not captured:
            _busy.append((self.activations, stream, self))

    def __call__(self) -> None:
        _busy[:] = [entry for entry in _busy if entry[2] is not self]
        if planted("run"):
            raise RuntimeError("as planted")
        context = self.context()
        if context is None:
            raise RuntimeError("a run's execution context went before it was done")
        if self.changes not in (None, context._changes):  # the developer guide: undefined behaviour
            raise RuntimeError(
                "a graph runs whose context has other shapes, profile or memory than when it was captured"
            )
        for where, serial in self.lasting:
            if block(where.start, where.size) != serial:
                raise RuntimeError("the memory of a run's activations or weights went before it was done")
        feeds, results = {}, []
        for name, mode, dtype, shape, address in self.tensors:
            if not block(address, volume(shape) * DataType.__members__[dtype].itemsize):
                raise RuntimeError(f"the memory of {name} went before a run was done")
            if mode == "INPUT":
                feeds[name] = view(address, dtype, shape)
            else:
                results.append((name, view(address, dtype, shape)))
        ctypes.memset(self.activations.start, 0xA5, self.activations.size)
        made = self.session.run([name for name, _ in results], feeds)
        for (name, place), value in zip(results, made, strict=True):
            if place.shape != value.shape:
                raise RuntimeError(f"{name} has shape {value.shape}, and was told to have {place.shape}")
            place[...] = value


class IExecutionContext:
    __slots__ = (
        "__weakref__", "_addresses", "_changes", "_found", "_memory", "_need", "_plugins", "_shapes", "_size", "_stale",
        "_start", "_strategy", "_switch", "active_optimization_profile", "engine", "name",
    )  # fmt: skip

    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine, self._strategy, self.name = engine, strategy, ""
        self.active_optimization_profile = 0
        self._shapes: dict[str, Dims] = {}
        self._found: dict[str, Dims] = {}  # outputs whose shapes the file does not say
        self._addresses: dict[str, int] = {}
        self._changes = 0  # of shapes, profile and device memory: what a graph captured is of this state
        self._stale = True  # the next run updates what depends on shapes, which no capture may hold
        self._switch: tuple[int, list[bool]] = (0, [True])  # the last change of profile: its stream, and if it is done
        self._memory: Memory | None = None
        self._start = self._size = 0
        self._need: int | None = None  # of these shapes, where somebody asked
        if strategy is not USER_MANAGED:
            self._allocate(engine.device_memory_size_v2 if strategy is STATIC else self._of_profile())
        self._plugins = [plugin.attach_to_context(None) for plugin in engine._plugins]

    def _allocate(self, size: int) -> None:
        self._memory = Memory(size)
        self._start, self._size = self._memory.start, size

    def _change(self) -> None:
        self._stale, self._need = True, None
        self._changes += 1

    def _of_profile(self) -> int:
        return self.engine.get_device_memory_size_for_profile_v2(self.active_optimization_profile)

    def _refuse(self, what: str, why: str) -> bool:
        error(f"IExecutionContext::{what}", why)
        return False

    # --------------------------------------------------------------------------------------------- profile and shapes

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Shapes are to be set again after it."""
        where, stream = "setOptimizationProfileAsync", index(stream_handle)
        if not 0 <= index(profile_index) < self.engine.num_optimization_profiles:
            return self._refuse(where, f"there is no profile {profile_index}")
        if capturing(stream) is not False or not has_context():
            return self._refuse(where, f"stream {stream:#x} is none or is captured, or no CUDA context is current")
        if profile_index != self.active_optimization_profile:
            self.active_optimization_profile = index(profile_index)
            self._shapes.clear()
            self._change()
            if self._strategy is ON_PROFILE_CHANGE:
                self._allocate(self._of_profile())
            done = [False]
            self._switch = stream, done
            return enqueue(stream, lambda: done.__setitem__(0, True), again=False)
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if name not in self.engine._tensors or self.engine._tensors[name]["mode"] != "INPUT":
            return self._refuse("setInputShape", f"there is no input {name}")
        given = Dims(needs(shape, (tuple, list), "set_input_shape"))
        least, _, most = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if len(given) != len(least) or not all(a <= b <= c for a, b, c in zip(least, given, most, strict=True)):
            return self._refuse("setInputShape", f"{name}: {given} does not satisfy profile "
                                f"{self.active_optimization_profile}: {least} to {most}")  # fmt: skip
        if self._shapes.get(name) != given:
            self._shapes[name] = given
            self._found.clear()
            self._change()
        return True

    def _sizes(self) -> dict[str, int]:
        return {
            letter: size
            for name, shape in self._shapes.items()
            for letter, size in zip(self.engine._tensors[name]["shape"], shape, strict=True)
            if isinstance(letter, str)
        }

    def get_tensor_shape(self, name: str) -> Dims:
        described = self.engine._tensors[name]
        if described["mode"] == "INPUT":
            return self._shapes.get(name, self.engine.get_tensor_shape(name))
        if described["shape"] is None:
            return self._seen(name)
        return sizes_of(described["shape"], {} if self.infer_shapes() else self._sizes())

    def _seen(self, name: str) -> Dims:
        """Of an output that the file says no shape of: what a run on zeros gives."""
        if name not in self._found:
            tensors = self.engine._tensors.items()
            inputs = [(one, tensor["dtype"]) for one, tensor in tensors if tensor["mode"] == "INPUT"]
            feeds = {one: np.zeros(self.get_tensor_shape(one), NUMPY[dtype]) for one, dtype in inputs}
            open_ = [one for one, tensor in tensors if tensor["shape"] is None]
            made = self.engine._session.run(open_, feeds)
            self._found |= {one: Dims(value.shape) for one, value in zip(open_, made, strict=True)}
        return self._found[name]

    def infer_shapes(self) -> list[str]:
        """Raises where inputs that share a dimension disagree."""
        sizes = self._sizes()
        for name, shape in self._shapes.items():
            if sizes_of(self.engine._tensors[name]["shape"], sizes) != shape:
                raise RuntimeError(f"the shapes of the inputs contradict each other: {self._shapes}")
        inputs = [name for name, tensor in self.engine._tensors.items() if tensor["mode"] == "INPUT"]
        return [n for n in inputs if n not in self._shapes and -1 in self.engine.get_tensor_shape(n)]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    # --------------------------------------------------------------------------------------------------------- memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._tensors:
            return self._refuse("setTensorAddress", f"there is no input or output {name}")
        self._addresses[name] = index(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        """As the bindings do it: what goes wrong is only logged."""
        if self._strategy is not USER_MANAGED:
            self._refuse("setDeviceMemoryV2", "the context has its own memory")
            return
        if (self._start, self._size) != (index(memory), index(size)):
            self._start, self._size = index(memory), index(size)
            self._changes += 1

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            self._refuse("updateDeviceMemorySizeForShapes", "not all shapes are set")
            return 0
        self._need = self.engine._activations(self._shapes)
        if self._strategy is USER_MANAGED:
            return self._need
        self._refuse("updateDeviceMemorySizeForShapes", "the context has its own memory")
        return 0

    # ------------------------------------------------------------------------------------------------------------ run

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = index(stream_handle)
        captured = capturing(stream)
        need = self._of_profile() if self._need is None else self._need
        refusal = self._refusal(stream, captured, need)
        if refusal:
            return self._refuse("enqueueV3", refusal)
        self._stale = False
        return enqueue(stream, Run(self, stream, bool(captured), need), again=bool(captured))

    def _refusal(self, stream: int, captured: bool | None, need: int) -> str:
        """Why this run may not be; else ""."""
        engine = self.engine
        if planted("execute"):
            return "as planted"
        if not has_context() or captured is None or not stream:
            return f"no CUDA context is current, or stream {stream:#x} is the default one or none"
        if engine._session is None:
            return "the plan was stripped of its weights, and not refitted"
        if missing := self.infer_shapes():
            return f"no shapes set for {missing}"
        for what, (where, done) in [*(("refit", one) for one in engine._refits), ("change of profile", self._switch)]:
            if not done[0] and where != stream:
                return f"the {what} was on another stream, which nobody has synchronized since"
        if captured and self._stale:
            driver().cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), GRANULE)  # as TensorRT would: it ends the capture
            return "shapes or profile are new: deferred updates cannot be captured, run it once before"
        if captured and engine.weight_streaming_scratch_memory_size:
            return "an engine that streams its weights cannot be captured"
        return self._refused_memory(need) or self._refused_sharing(stream, need)

    def _refused_memory(self, need: int) -> str:
        ranges: list[tuple[str, Range]] = []
        for name, tensor in self.engine._tensors.items():
            size = volume(self.get_tensor_shape(name)) * DataType.__members__[tensor["dtype"]].itemsize
            where = Range(self._addresses.get(name, 0), size)
            if not where.start or where.start % GRANULE or not block(where.start, size):
                return f"{name}: {size} bytes at {where.start:#x} are not aligned to {GRANULE} and in one allocation"
            ranges.append((name, where))
        if self._size < need or self._start % GRANULE or not block(self._start, need):
            return f"{need} bytes of device memory needed, {self._size} at {self._start:#x} given"
        ranges.append(("device memory", Range(self._start, need)))
        inputs = {name for name, tensor in self.engine._tensors.items() if tensor["mode"] == "INPUT"}
        for i, (name, where) in enumerate(ranges):
            for other, there in ranges[i + 1 :]:
                if where.meets(there) and not {name, other} <= inputs:
                    return f"{name} and {other} overlap"
        return ""

    def _refused_sharing(self, stream: int, need: int) -> str:
        mine = Range(self._start, need)
        if any(theirs.meets(mine) and where != stream for theirs, where, _ in _busy):
            return "another run that may not be done has this device memory, on another stream"
        return ""
