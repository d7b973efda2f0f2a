"""Limits from floors, and the table for where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from mdm.tools.check.finding import Difference, difference
from mdm.tools.check.limits import ROUNDING, TABLE, Multiples, steadied, table_limits


def floor(rms: float, worst: float, bad: int = 0) -> Difference:
    return Difference(rms, worst, worst, 1.0, (), 0.0, 0.0, bad)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_is_that_of_storing(dtype: str) -> None:
    """Random numbers that are only stored are off by no more, and by nearly as much."""
    values = np.random.default_rng(0).uniform(1, 2, 100_000)
    worst = np.abs(values.astype(dtype).astype(np.float64) / values - 1).max()
    assert 0.9 * ROUNDING[dtype] < worst <= ROUNDING[dtype]


def test_limits_are_multiples_of_the_floor_and_no_less_than_rounding() -> None:
    limits = Multiples(3, 10).limits(floor(1e-5, 1e-4), "float32")
    assert (limits.rms, limits.worst) == pytest.approx((3e-5, 1e-3))
    assert limits.source == "3 x floor in the mean, 10 x at worst"
    exact = Multiples().limits(floor(0, 0), "float32")
    assert (exact.rms, exact.worst) == (4 * 2**-24, 16 * 2**-24)
    assert Multiples().limits(floor(0, 0), "float16").rms == 4 * 2**-11


def test_a_floor_that_is_not_finite_is_none() -> None:
    table, nan = table_limits("fp16"), floor(float("nan"), float("nan"), bad=3)
    assert Multiples().limits_or(table, nan, "float32") is table
    assert Multiples().limits_or(table, None, "float32") is table
    assert Multiples().limits_or(table, floor(1e-5, 1e-4), "float32").rms == pytest.approx(4e-5)


def test_the_table_grows_with_coarser_types_and_with_whole_runs() -> None:
    for precision in TABLE:
        assert table_limits(precision).source == f"table for {precision}"
        assert table_limits(precision, run=True).rms > table_limits(precision).rms
    single = [table_limits(precision).rms for precision in ("fp32", "fp16", "bf16")]
    assert single == sorted(single)
    made = difference(np.full(10, 1 + 2**-11), np.ones(10))  # values stored in half precision pass
    assert table_limits("fp16").used(made) < 1 < table_limits("fp32").used(made)


def test_no_floor_lets_zeros_pass() -> None:
    """An output of zeros has an error of 1, in the mean and at worst."""
    truth = np.linspace(-1, 1, 50)
    coarse = difference(truth * 1.4, truth)
    limits = Multiples().limits(coarse, "float16")
    assert limits.used(difference(np.zeros(50), truth)) > 1


def test_floors_are_steadied() -> None:
    floors = [floor(rms, 10 * rms) for rms in (1.0, 9.0, 1.0, 8.0, 7.0, 0.5)]
    assert [one.rms for one in steadied(floors)] == [1, 9, 7, 8, 7, 7]
    assert [one.worst for one in steadied(floors)] == [10, 90, 70, 80, 70, 70]
    bad = [*floors[:2], floor(np.nan, np.nan, 3)]
    with np.errstate(all="ignore"):
        assert [one.bad for one in steadied(bad)] == [0, 0, 3]
