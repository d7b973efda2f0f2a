"""What an inference engine is to the rest of the runtime: it loads a bundle's graphs and runs them on its buffers.

A `Buffer` holds one tensor for many samples, a row each. `Graph.bind` ties buffers to a graph for some of their rows
and gives back what runs it, several times in a row if that is asked: nothing is copied or allocated by a run. `ort.py`
has ONNX Runtime, `tensorrt/` TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from mdm.runtime.bundle import Bundle

Array = npt.NDArray[Any]


class Spec(NamedTuple):
    """An input or output of a graph; a dimension that stays open has a name."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def sized(self, **sizes: int) -> tuple[int, ...]:
        """The shape with its open dimensions set."""
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)


class Buffer(Protocol):
    """A tensor in an engine's memory. `host` is that memory, or its copy on this side."""

    @property
    def host(self) -> Array: ...

    def push(self) -> None:
        """Make the engine see what was written to `host`."""

    def pull(self) -> None:
        """Make `host` show what the engine wrote."""

    def address(self, row: int) -> int:
        """Where a row begins in the engine's memory."""


Tensors = Mapping[str, Buffer]


class Graph(Protocol):
    """A loaded graph."""

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    metadata: Mapping[str, str]  # what the exporter wrote into it, as far as it is still there
    bound: WeakKeyDictionary[Any, dict[Any, Callable[[], None]]]  # what users bound; goes when graph or user goes

    def batches(self, tokens: int) -> Sequence[int]:
        """The batch sizes it was built for, least first, where latents have this length; none where it takes any."""

    def bind(self, runs: Sequence[tuple[Tensors, Tensors]], first: int, count: int) -> Callable[[], None]:
        """What runs the graph once for each pair of inputs and outputs, on rows first .. first + count of them."""

    def run(self, wanted: Sequence[str], **inputs: Array) -> list[Array]:
        """One run on arrays of this side."""


class Backend(Protocol):
    """An engine with a bundle."""

    bundle: Bundle
    name: str
    # Steps that it does in one go, at most; 1 where that gains nothing. Where it is more, a failed run is everybody's.
    chain: int

    def graph(self, name: str) -> Graph:
        """Load a graph, or find it loaded."""

    def lacks(self, name: str) -> str:
        """Why a graph that no task needs cannot be loaded here; "" where it can, or has to be."""

    def buffer(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        """Zeros in the engine's memory."""


def specs_of(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Spec]:
    """The manifest's words for a graph's inputs or outputs."""
    return {tensor["name"]: Spec(np.dtype(tensor["dtype"]), tuple(tensor["shape"])) for tensor in tensors}
