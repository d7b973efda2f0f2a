"""What an inference engine is to the rest of the runtime: it loads a bundle's graphs and runs them on its buffers.

A `Buffer` holds one tensor for many samples, a row each. `Graph.bind` ties buffers to a graph for some of their rows
and gives back what runs it: nothing is copied or allocated by a run. `ort.py` has ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

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


class Graph(Protocol):
    """A loaded graph."""

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    bound: WeakKeyDictionary[Any, dict[Any, Callable[[], None]]]  # what users bound; goes when graph or user goes

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], first: int, count: int
    ) -> Callable[[], None]:
        """What runs the graph on rows first .. first + count of these buffers."""

    def run(self, wanted: Sequence[str], **inputs: Array) -> list[Array]:
        """One run on arrays of this side."""


class Backend(Protocol):
    """An engine with a bundle."""

    name: str
    batches: Sequence[int]  # the batch sizes it was built for, 1 and up; none where it takes any

    def graph(self, name: str) -> Graph:
        """Load a graph, or find it loaded."""

    def buffer(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        """Zeros in the engine's memory."""
