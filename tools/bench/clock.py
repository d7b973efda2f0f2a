"""Measures a call: its median time over blocks of runs, and the memory it takes on top of what was there before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mdm.plugins.library import multiply_adds


def median_time(call: Callable[[], object], seconds: float) -> float:
    """Median time of as many calls as fit in `seconds`, at least one."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory_peak(call: Callable[[], object]) -> int | None:
    """Bytes that were resident at the worst moment of a call, less those before; None where Linux does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def multiply_add_peak(threads: int) -> float:
    """Float multiply-adds a second in registers, on that many threads at once: the best of three tries."""
    rounds, best = 4_000_000, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            done = sum(pool.map(multiply_adds, [rounds] * threads))
            best = max(best, done / (time.perf_counter() - start))
    return best
