"""Measures calls: median times, forms that take turns, and the memory a call takes on top of what was there before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mdm.plugins.library import multiply_adds

Form = Callable[[], Sequence[float]]  # a way to do something -> the seconds it took, once or several times


def median_time(call: Callable[[], object], seconds: float) -> float:
    """Median time of as many calls as fit in `seconds`, at least one."""
    return statistics.median(take_turns({"call": timed(call)}, seconds)["call"])


def timed(call: Callable[[], object]) -> Form:
    def form() -> list[float]:
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]

    return form


def take_turns(forms: Mapping[str, Form], seconds: float) -> dict[str, list[float]]:
    """Times of each form. They run one after the other, round by round, so that what disturbs the machine hits all.

    It ends when the first form has had its `seconds`. A slower one has left by then, after one turn or a few.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    first = next(iter(times.values()))
    while not first or sum(first) < seconds:
        for name, form in forms.items():
            if not times[name] or sum(times[name]) < seconds:
                times[name] += form()
    return times


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    at = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else [times[0]] * 99
    return {f"p{percent}": at[percent - 1] for percent in (50, 90, 99)}


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
