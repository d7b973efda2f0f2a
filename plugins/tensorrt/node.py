"""One operator node as TensorRT sees it: the types and layouts it takes, its workspace, its launches.

Nothing here needs TensorRT. `python_plugin.py` wraps it in TensorRT's classes; a test calls it as TensorRT would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from mdm.plugins.contract import ACTIVATIONS, Operator
from mdm.plugins.errors import InputError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.pack import SHIPPED, Pack
from mdm.plugins.gpu.scan import Scans
from mdm.plugins.gpu.variants import Plan, choose, workspace_limit

MOST_PLANS = 64  # of a node; making one anew takes microseconds


_raised: list[BaseException] = []  # the last that TensorRT's bindings swallowed


@contextmanager
def keeps_error() -> Iterator[None]:
    """What is raised, Ctrl-C too, is kept for whoever asked TensorRT: its bindings swallow it."""
    try:
        yield
    except BaseException as error:
        _raised[:] = [error]
        raise


def take_error() -> BaseException | None:
    return _raised.pop() if _raised else None


@dataclass(frozen=True)
class Described:
    """What TensorRT says of an input or output."""

    dims: tuple[int, ...]
    dtype: str  # as in the contract; "" for types that no operator has
    linear: bool = True  # plain row-major memory


@cache
def scans_on(device: int) -> Scans:
    return Scans(Kernels(Pack.open(SHIPPED), Device(driver(), device)))


@cache
def driver() -> Driver:
    return Driver()


def scans_here() -> Scans:
    """Of the GPU whose context this thread has."""
    return scans_on(driver().number("cuCtxGetDevice"))


class Node:
    """A node of this operator with these optional inputs, on one GPU. Plans are kept: a shape that comes again costs
    nothing."""

    def __init__(self, operator: Operator, has: int, scans: Callable[[], Scans] = scans_here) -> None:
        try:
            self.inputs = operator.present(has)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.operator, self.has, self._scans = operator, has, scans
        self._plans: dict[tuple[Described, ...], Plan] = {}

    def clone(self) -> Node:
        """Another of this kind without its plans: it may serve another GPU."""
        return Node(self.operator, self.has, self._scans)

    def expect(self, inputs: int) -> None:
        """An error where TensorRT has another number of them."""
        if inputs != len(self.inputs):
            raise InputError(
                f"{self.operator.name}: attribute 'has' is {self.has}, which stands for {len(self.inputs)} inputs\n"
                f"found {inputs}, expected {', '.join(spec.name for spec in self.inputs)}"
            )

    def takes(self, place: int, tensors: Sequence[Described]) -> bool:
        """Whether tensor number `place`, inputs first, may be so, where those before it are so."""
        if len(tensors) != len(self.inputs) + 1 or not tensors[place].linear:
            return False
        is_parameter = place < len(self.inputs) and not self.inputs[place].activation
        if is_parameter:
            return tensors[place].dtype == "float32"
        return tensors[place].dtype in (ACTIVATIONS if place == 0 else (tensors[0].dtype,))

    def sizes(self, inputs: Sequence[Described]) -> dict[str, int]:
        """By the contract's letters; an error where the shapes do not fit together."""
        self.expect(len(inputs))
        try:
            self.operator.check({spec.name: one.dims for spec, one in zip(self.inputs, inputs, strict=True)})
        except ValueError as error:
            raise InputError(str(error)) from error
        return {
            letter: size
            for spec, one in zip(self.inputs, inputs, strict=True)
            for letter, size in zip(spec.dims, one.dims, strict=True)
        }

    def check(self, inputs: Sequence[Described]) -> None:
        """An error where no kernel serves these shapes: better when an engine is built than when it runs."""
        choose(self.operator, inputs[0].dtype, self.sizes(inputs), self.has, 1, (9, 0))

    def workspace(self, inputs: Sequence[Described]) -> int:
        """Bytes for any shape up to these, on any GPU: an engine's workspace is fixed before either is known."""
        return workspace_limit(self.operator, inputs[0].dtype, self.sizes(inputs))

    def prepare(self, inputs: Sequence[Described]) -> Plan:
        """The plan for these shapes, its kernels loaded: what is not to happen while a stream is captured."""
        key = tuple(inputs)
        if key not in self._plans:
            sizes = self.sizes(inputs)
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._scans().plan(self.operator, inputs[0].dtype, sizes, self.has)
        return self._plans[key]

    def run(self, inputs: Sequence[Described], pointers: Sequence[int], y: int, workspace: int, stream: int) -> None:
        """Only launches, once the shapes were prepared."""
        plan = self.prepare(inputs)
        named: Mapping[str, int] = dict(zip((spec.name for spec in self.inputs), pointers, strict=True))
        scratch = {name: workspace + at for name, at in plan.places.items() if name}
        self._scans().run(plan, {**named, **scratch, "y": y}, stream)
