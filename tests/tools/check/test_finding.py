"""Statistics of an error, by hand and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mdm.tools.check.finding import Difference, Finding, Limits, Verdict, difference, worst_of


def test_difference_by_hand() -> None:
    error = difference(np.array([[3.0, 4.0], [0.0, -11.0]]), np.array([[3.0, 4.0], [0.0, -12.0]]))
    assert error.rms == pytest.approx(1 / 13)  # one error of 1, lengths 3-4-12 make 13
    assert error.worst == pytest.approx(1 / 12)
    assert (error.at, error.found, error.truth, error.bad) == ((1, 1), -11.0, -12.0, 0)
    assert error.cosine == pytest.approx((9 + 16 + 132) / (13 * math.sqrt(9 + 16 + 121)))


def test_difference_against_numpy() -> None:
    draw = np.random.default_rng(0)
    truth = draw.standard_normal((2, 3, 40)).astype(np.float32)
    found = truth + 1e-3 * draw.standard_normal(truth.shape).astype(np.float32)
    error, off = difference(found, truth), np.abs(found.astype(np.float64) - truth).ravel()
    x, y = found.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    assert error.rms == pytest.approx(np.linalg.norm(off) / np.linalg.norm(y))
    assert error.worst == pytest.approx(off.max() / np.abs(y).max())
    assert error.p99 == pytest.approx(np.percentile(off, 99) / np.abs(y).max())
    assert error.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-15)
    assert off.reshape(truth.shape)[error.at] == off.max()


def test_whole_numbers_and_halves() -> None:
    """Differences of unsigned or half-precision values must not wrap or overflow."""
    assert difference(np.array([1], np.uint8), np.array([2], np.uint8)).rms == 0.5
    assert difference(np.array([-6e4], np.float16), np.array([6e4], np.float16)).worst == 2
    assert difference(np.array([True, False]), np.array([True, True])).worst == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_any_limit(bad: float) -> None:
    found, truth = np.ones((2, 3)), np.ones((2, 3))
    found[1, 1:] = bad
    error = difference(found, truth)
    assert (error.bad, error.at, error.truth) == (2, (1, 1), 1.0)
    assert math.isnan(error.rms)
    assert Limits(1e30, 1e30, "").used(error) == math.inf


def test_zeros_and_nothing() -> None:
    assert difference(np.zeros(3), np.zeros(3)) == Difference(0.0, 0.0, 0.0, 1.0, (0,), 0.0, 0.0)
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))).rms == 0
    assert difference(np.full(3, 1e-3), np.zeros(3)).rms > 1e20  # no truth to measure by, and no division by zero
    assert difference(np.zeros(2), np.ones(2)).cosine == 0
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1, 2\)"):
        difference(np.zeros(2), np.zeros((1, 2)))


def test_used_is_the_worse_of_the_two() -> None:
    error = Difference(0.1, 0.2, 0.0, 1.0, (), 0.0, 0.0)
    assert Limits(0.2, 0.2, "").used(error) == 1
    assert Limits(0.05, 1.0, "").used(error) == 2
    assert Finding("steps", "a", "b", "c", Verdict.PASS).used is None
    assert Finding("steps", "a", "b", "c", Verdict.PASS, error=error, limits=Limits(0.2, 0.4, "")).used == 0.5


def test_the_worst_verdict_counts_and_none_is_no_success() -> None:
    assert worst_of([]) is Verdict.SKIPPED
    assert worst_of([Verdict.PASS, Verdict.SKIPPED]) is Verdict.PASS
    assert worst_of([Verdict.PASS, Verdict.AMBIGUOUS, Verdict.SKIPPED]) is Verdict.AMBIGUOUS
    assert worst_of([Verdict.FAIL, Verdict.AMBIGUOUS]) is Verdict.FAIL
