"""Loaded graphs under a limit of memory: where one does not fit in beside the others, those used longest ago go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from mdm.plugins.errors import EnvironmentLackError

Loaded = TypeVar("Loaded")


class Shelf(Generic[Loaded]):
    """For any thread: a server encodes and decodes beside the thread that steps. It does not know its owner, who is to
    be gone, with all graphs, as soon as nobody has him."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit  # bytes
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # the one used last at the end
        self.lock = Lock()

    def get(self, name: str, load: Callable[[str], Loaded], size_of: Callable[[str], int]) -> Loaded:
        """Load a graph, or find it loaded."""
        with self.lock:
            if name not in self.loaded:
                self.make_room(name, size_of)
                self.loaded[name] = load(name)
            self.loaded.move_to_end(name)
            return self.loaded[name]

    def make_room(self, name: str, size_of: Callable[[str], int]) -> None:
        if self.limit is None:
            return
        need = size_of(name)
        if need > self.limit:
            raise EnvironmentLackError(
                f"graph '{name}' takes about {need / 1e6:.0f} MB of memory, the limit is {self.limit / 1e6:.0f} MB\n"
                "allow it more (--memory), or leave the limit out"
            )
        while self.loaded and need + sum(map(size_of, self.loaded)) > self.limit:
            self.loaded.popitem(last=False)
