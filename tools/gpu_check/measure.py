"""Measures on a GPU: how long captured launches take with cold caches, and what the chip reaches at most.

A time is that between two events around one replay of a graph. Before each replay a buffer larger than the L2 cache is
written, which also gives the CPU time to have the replay ready. What an empty replay takes is measured too: it is in
every time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mdm.tools.gpu_check.verify import captured

SECONDS, RUNS = 0.5, (20, 200)  # of GPU time for each form; runs at least and at most
COPIED = 1 << 30  # bytes
MATRIX = 8192


@dataclass(frozen=True)
class Time:
    """Microseconds."""

    median: float
    low: float  # a tenth of the runs is faster
    high: float  # a tenth is slower
    runs: int


class Stopwatch:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(4 * max(cache, 1 << 24), dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], object]) -> Time:
        """Of a call that has run before."""
        graph = captured(call)
        graph.replay()
        least, most = RUNS
        first = self._run(graph, least)
        spent = sum(first) / 1e6
        more = self._run(graph, min(most, int(SECONDS / (spent / least))) - least) if spent < SECONDS else []
        return time_of(first + more)

    def _run(self, graph: torch.cuda.CUDAGraph, runs: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in events]


def time_of(microseconds: list[float]) -> Time:
    tenths = statistics.quantiles(microseconds, n=10, method="inclusive")
    return Time(statistics.median(microseconds), tenths[0], tenths[-1], len(microseconds))


@dataclass(frozen=True)
class Ceilings:
    """What this chip reached."""

    bandwidth: float  # bytes a second, read and written, of a large copy within its memory
    products: float  # multiply-adds a second of a large bfloat16 product
    empty: Time  # a replay of next to nothing


def ceilings(watch: Stopwatch) -> Ceilings:
    one = torch.zeros(1, device="cuda")
    return Ceilings(_bandwidth(watch), _products(watch), _warm(watch, one.zero_))


def _bandwidth(watch: Stopwatch) -> float:
    source, copy = (torch.zeros(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPIED / _warm(watch, lambda: copy.copy_(source)).median * 1e6


def _products(watch: Stopwatch) -> float:
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return MATRIX**3 / _warm(watch, lambda: torch.mm(a, b, out=out)).median * 1e6


def _warm(watch: Stopwatch, call: Callable[[], object]) -> Time:
    for _ in range(3):
        call()
    return watch.time(call)
