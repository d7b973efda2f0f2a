"""What a check finds: how far an output is from the truth, how far it may be, and what follows.

An error is relative: `rms` to the root mean square of the true tensor, `worst` to its largest value. The noise floor is
the same two numbers for the model's own arithmetic in the deployed types; an error passes within a stated multiple of
it. RMS is steady from case to case and catches what is slightly wrong everywhere; the worst value catches what is
wrong in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEVELS = ("files", "operators", "blocks", "steps", "trajectories", "decoded")  # in the order they run
OF_RUNS = LEVELS[-2:]  # those that go through whole runs of a task


class Verdict(StrEnum):
    PASS = "PASS"
    AMBIGUOUS = "AMBIGUOUS"  # a near tie fell the other way: rounding alone explains it
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"  # with its reason


SEVERITY = [Verdict.SKIPPED, Verdict.PASS, Verdict.AMBIGUOUS, Verdict.FAIL]


def worst_of(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=SEVERITY.index, default=Verdict.SKIPPED)


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the true one."""

    rms: float  # NaN where a value is not finite that should be
    worst: float
    p99: float  # of the absolute error, over the largest true value
    cosine: float
    at: tuple[int, ...]  # where it is worst
    found: float  # there
    truth: float
    bad: int = 0  # values that are not finite


@dataclass(frozen=True)
class Limits:
    """What an error may be at most, and where that comes from."""

    rms: float
    worst: float
    source: str  # "4 x floor", "table for fp32"

    def used(self, error: Difference) -> float:
        """Which share of the limit an error takes: above 1 it fails. Infinite for what is not finite."""
        if error.bad:
            return float("inf")
        return max(error.rms / self.rms, error.worst / self.worst)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    subject: str  # a graph, task, operator or file
    part: str  # which output of it, which block
    case: str  # "seed 0", "batch 2, text 5"
    verdict: Verdict
    said: str = ""  # one line: what is wrong, or why it was skipped
    shape: tuple[int, ...] = ()
    error: Difference | None = None
    floor: Difference | None = None
    limits: Limits | None = None
    figures: tuple[tuple[str, float], ...] = ()  # others, such as ("psnr", 61.2)
    reproduce: str = ""  # a command, of what did not pass

    @property
    def used(self) -> float | None:
        return None if self.error is None or self.limits is None else self.limits.used(self.error)


def difference(found: Array, truth: Array) -> Difference:
    """`truth` is finite."""
    if found.shape != truth.shape:
        raise ValueError(f"shapes {found.shape} and {truth.shape}")
    if not truth.size:
        return Difference(0.0, 0.0, 0.0, 1.0, (), 0.0, 0.0)
    x, y = found.astype(np.float64), truth.astype(np.float64)
    finite = np.isfinite(x)
    if not finite.all():
        at = np.unravel_index(int(np.argmin(finite)), x.shape)
        nan = float("nan")
        return Difference(
            nan, nan, nan, nan, tuple(map(int, at)), float(x[at]), float(y[at]), int(x.size - finite.sum())
        )
    off = np.abs(x - y)
    at = np.unravel_index(int(off.argmax()), x.shape)
    largest, length, found_length = (
        float(np.abs(y).max()),
        float(np.sqrt(np.square(y).mean())),
        float(np.sqrt(np.square(x).mean())),
    )
    tiny = 1e-30
    cosine = float((x * y).mean() / max(length * found_length, tiny)) if length or found_length else 1.0
    return Difference(
        float(np.sqrt(np.square(off).mean())) / max(length, tiny), float(off[at]) / max(largest, tiny),
        float(np.quantile(off, 0.99)) / max(largest, tiny), cosine, tuple(map(int, at)), float(x[at]), float(y[at]),
    )  # fmt: skip
