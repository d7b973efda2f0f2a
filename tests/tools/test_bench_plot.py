"""The line plot: lines and words are where they should be, ticks are round and few, names do not touch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mdm.tools.bench.plot import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    MOST_TICKS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Mark,
    apart,
    draw_lines,
    log_ticks,
)

SQUARE = Line("square", [(n, n * n) for n in (1.0, 10.0, 100.0)])
FLAT = Line("flat", [(n, 1.0) for n in (1.0, 10.0, 100.0)])


def near(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Edges are smooth, so a thin line's colour is rarely met exactly."""
    return np.abs(pixels.astype(int) - colour).max(-1) < 80


def test_a_power_law_is_a_straight_line_from_corner_to_corner() -> None:
    pixels = np.asarray(draw_lines("title", "x", "y", [SQUARE, FLAT]))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    field = (slice(TOP, HEIGHT - BOTTOM), slice(LEFT, WIDTH - RIGHT))
    rows, columns = np.nonzero(near(pixels[field], COLOURS[0]))
    assert columns.min() < 6
    assert columns.max() > WIDTH - RIGHT - LEFT - 6
    expected = (HEIGHT - BOTTOM - TOP) * (1 - columns / (WIDTH - RIGHT - LEFT))
    assert np.abs(rows - expected).max() < 6
    assert near(pixels[:, WIDTH - RIGHT + 10 :], COLOURS[1]).any()  # the second line's name


def test_title_labels_ticks_and_marks_are_drawn() -> None:
    plain = np.asarray(draw_lines("", "", "", [SQUARE]))
    for changed in (
        draw_lines("title", "", "", [SQUARE]),
        draw_lines("", "x", "", [SQUARE]),
        draw_lines("", "", "y", [SQUARE]),
        draw_lines("", "", "", [SQUARE], [Mark(50.0, "here")]),
        draw_lines("", "", "", [SQUARE], x_ticks=[1, 7, 100]),
    ):
        assert (np.asarray(changed) != plain).any()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3, 40, [2, 5, 10, 20, 50]),
        (1, 10, [1, 2, 5, 10]),
        (70, 70, [50, 100]),
        (0.2, 0.9, [0.2, 0.5, 1]),
        (8, 60000, [1, 10, 100, 1000, 10000, 100000]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)
    assert len(ticks) <= MOST_TICKS


def test_any_range_is_drawn() -> None:
    for low, high in ((1.0, 1.0), (1e-9, 1e9), (0.999, 1.001)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low * (1 + 1e-6)
        assert ticks[-1] >= high * (1 - 1e-6)
        assert len(ticks) > 1
        draw_lines("", "", "", [Line("", [(low, high), (2 * high, low)])])


def test_names_that_would_touch_move_apart_in_their_order() -> None:
    assert apart([100, 50], 20) == [100, 50]
    assert apart([100, 95, 101], 20) == [115, 95, 135]
    assert math.isclose(min(np.diff(sorted(apart([5.0] * 6, 20)))), 20)
