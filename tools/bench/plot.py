"""Lines on two logarithmic axes, as a picture: a power law is a straight line there, and its slope the exponent.

Pillow's lines have no smooth edges, so everything is drawn three times as large and made smaller in the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

FINE = 3  # drawn pixels a pixel
WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 84, 200, 92, 64  # around the field; lines are named to its right
INK, PAPER, FAINT, GRID = (30, 30, 34), (255, 255, 255), (110, 110, 118), (228, 228, 232)
COLOURS = ((0, 107, 164), (217, 95, 2), (44, 130, 60), (135, 85, 175), (150, 110, 20), (190, 45, 75))
MOST_TICKS = 9


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]  # x rising; both above 0


@dataclass(frozen=True)
class Mark:
    """An x worth a line across the field and a few words."""

    x: float
    text: str


class Axis:
    """One direction of the field: numbers from `low` to `high` onto pixels from `start` to `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, ticks: Sequence[float] | None) -> None:
        low, high = min(values), max(values)
        self.ticks = log_ticks(low, high) if ticks is None else list(ticks)
        self.low, self.high = math.log(min(low, *self.ticks)), math.log(max(high, *self.ticks))
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (math.log(value) - self.low) / (self.high - self.low)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers around the range: 1, 2, 5 of each decade if they are few, else whole decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        every = [step * 10.0**decade for decade in decades for step in steps]
        first = max((tick for tick in every if tick <= low * (1 + 1e-9)), default=every[0])
        last = min((tick for tick in every if tick >= high * (1 - 1e-9) and tick > first), default=every[-1])
        ticks = [tick for tick in every if first <= tick <= last]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks


def draw_lines(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    x_ticks: Sequence[float] | None = None,
) -> Image.Image:
    """`x_ticks`: where the x axis has numbers, by default at round ones."""
    sheet = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    pen = Pen(sheet)
    places = [point for line in lines for point in line.points]
    x = Axis([place[0] for place in places], LEFT, WIDTH - RIGHT, x_ticks)
    y = Axis([place[1] for place in places], HEIGHT - BOTTOM, TOP, None)

    pen.text(LEFT, 30, title, 20, INK, "lm")
    pen.text(LEFT, 66, y_label, 14, FAINT, "lm")
    pen.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 20, x_label, 14, FAINT, "mm")
    for tick in y.ticks:
        pen.line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], GRID, 1)
        pen.text(LEFT - 10, y(tick), f"{tick:,.10g}", 14, INK, "rm")
    for tick in x.ticks:
        pen.line([(x(tick), TOP), (x(tick), HEIGHT - BOTTOM)], GRID, 1)
        pen.text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:,.10g}", 14, INK, "mm")
    pen.line([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], FAINT, 1.5)
    for mark in marks:
        pen.line([(x(mark.x), TOP), (x(mark.x), HEIGHT - BOTTOM)], FAINT, 1)
        pen.text(x(mark.x) + 8, HEIGHT - BOTTOM - 14, mark.text, 14, FAINT, "lm")

    names = apart([y(line.points[-1][1]) for line in lines], 20)
    for line, height, colour in zip(lines, names, itertools.cycle(COLOURS), strict=False):
        path = [(x(at), y(value)) for at, value in line.points]
        pen.line(path, colour, 2.5)
        for place in path:
            pen.dot(place, 4, colour)
        pen.text(WIDTH - RIGHT + 14, height, line.name, 15, colour, "lm")
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def apart(heights: Sequence[float], least: float) -> list[float]:
    """The same heights, in the same order, moved down where two names would touch."""
    placed: dict[int, float] = {}
    lowest = -math.inf
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        lowest = placed[index] = max(heights[index], lowest + least)
    return [placed[index] for index in range(len(heights))]


class Pen:
    """Draws in the picture's pixels on the sheet that is `FINE` times as large."""

    def __init__(self, sheet: Image.Image) -> None:
        self.draw = ImageDraw.Draw(sheet)

    def line(self, path: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in path], colour, round(width * FINE), "curve")

    def dot(self, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> None:
        self.draw.ellipse([(v + side * radius) * FINE for side in (-1, 1) for v in centre], colour)

    def text(self, x: float, y: float, words: str, size: int, colour: tuple[int, int, int], anchor: str) -> None:
        font = ImageFont.load_default(size * FINE)
        self.draw.text((x * FINE, y * FINE), words, colour, font, anchor)
