"""Loaded graphs under a limit: who goes when, what a load that fails leaves, and threads."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.runtime.shelf import Shelf


class Loader:
    """Graphs whose names end in their sizes; "bad" ones fail to load."""

    def __init__(self, limit: int | None) -> None:
        self.shelf: Shelf[object] = Shelf(limit)
        self.loads: list[str] = []

    def __call__(self, name: str) -> object:
        return self.shelf.get(name, self.load, self.size)

    def load(self, name: str) -> object:
        self.loads.append(name)
        if name.startswith("bad"):
            raise EngineError("it does not load")
        return object()

    @staticmethod
    def size(name: str) -> int:
        return int(name[-1])

    @property
    def there(self) -> list[str]:
        return [*self.shelf.loaded]


def test_without_a_limit_all_stay() -> None:
    shelf = Loader(None)
    first = [shelf(f"{letter}9") for letter in "abcdef"]
    assert [shelf(f"{letter}9") for letter in "abcdef"] == first
    assert len(shelf.loads) == 6


def test_those_used_longest_ago_go() -> None:
    shelf = Loader(10)
    a = shelf("a4")
    shelf("b3")
    shelf("c3")
    assert shelf("a4") is a  # used again: b is the oldest now
    shelf("d2")
    assert shelf.there == ["c3", "a4", "d2"]
    shelf("e7")  # takes as many as it needs, and no more
    assert shelf.there == ["d2", "e7"]
    assert shelf("a4") is not a
    assert shelf.loads == ["a4", "b3", "c3", "d2", "e7", "a4"]


def test_the_limit_itself_fits() -> None:
    shelf = Loader(9)
    shelf("a9")
    shelf("b5")
    shelf("c4")
    assert shelf.there == ["b5", "c4"]


def test_what_takes_nothing_stays_beside_all() -> None:
    """Engines that stream their weights."""
    shelf = Loader(5)
    for name in ("a0", "b5", "c0"):
        shelf(name)
    assert shelf.there == ["a0", "b5", "c0"]


def test_what_never_fits_is_refused_and_harms_nobody() -> None:
    shelf = Loader(8)
    shelf("a4")
    with pytest.raises(EnvironmentLackError, match=r"graph 'b9' takes about 0 MB of memory, the limit is 0 MB\nallow"):
        shelf("b9")
    assert (shelf.there, shelf.loads) == (["a4"], ["a4"])


def test_a_load_that_fails_leaves_nothing() -> None:
    """Those that made room for it are gone; it is not there, and is tried again when asked for again."""
    shelf = Loader(8)
    shelf("a4")
    shelf("b4")
    for _ in range(2):
        with pytest.raises(EngineError, match="does not load"):
            shelf("bad4")
    assert shelf.there == ["b4"]
    assert shelf.loads == ["a4", "b4", "bad4", "bad4"]
    shelf("c4")
    assert shelf.there == ["b4", "c4"]


def test_the_one_that_goes_is_gone_before_the_next_is_loaded() -> None:
    """Its memory is for that."""
    shelf, seen = Loader(4), list[list[str]]()
    shelf("a4")

    def load(name: str) -> object:
        seen.append(shelf.there)
        return object()

    shelf.shelf.get("b4", load, shelf.size)
    assert seen == [[]]


def test_one_of_many_threads_loads() -> None:
    shelf, start = Loader(None), threading.Barrier(8)

    def slow(name: str) -> object:
        time.sleep(0.02)
        return shelf.load(name)

    def ask(_: int) -> object:
        start.wait()
        return shelf.shelf.get("a1", slow, shelf.size)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(graph) for graph in pool.map(ask, range(8))}) == 1
    assert shelf.loads == ["a1"]


def test_threads_that_want_different_ones_keep_to_the_limit() -> None:
    shelf, over = Loader(12), list[int]()
    names = [f"{letter}{size}" for letter in "abc" for size in (2, 4, 6)]

    def load(name: str) -> object:
        over.append(sum(map(shelf.size, shelf.there)) + shelf.size(name))
        return object()

    def ask(seed: int) -> None:
        for name in random.Random(seed).choices(names, k=200):
            assert shelf.shelf.get(name, load, shelf.size)

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(ask, range(4))]
    assert max(over) <= 12
    assert len(over) > 50
