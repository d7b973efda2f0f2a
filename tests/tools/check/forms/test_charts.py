from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from mdm.tools.check.forms.charts import BAR, Field, Line, headroom, log_chart

NAN, INF = math.nan, math.inf


def numbers(text: str | None) -> list[float]:
    return [float(one) for one in re.findall(r"-?[\d.]+", text or "")]


def chart(values: list[float], style: str = "first") -> ElementTree.Element:
    names = [str(index) for index in range(len(values))]
    return ElementTree.fromstring(log_chart("a < b", [Line("c & d", values, style)], "x", "y", names))


@pytest.mark.parametrize(
    "values",
    [[], [1e-7], [0.0], [NAN], [INF, 1e-7], [0.0, -1.0], [1e-300, 1.7e308], [5e-324, 1.0], [1e-7] * 250, [NAN] * 250],
    ids=str,
)
def test_every_chart_is_sound_and_keeps_to_its_field(values: list[float]) -> None:
    svg = chart(values).find("svg")
    assert svg is not None
    _, _, width, height = numbers(svg.get("viewBox"))
    drawn = [*svg.iter("polyline"), *svg.iter("polygon")]
    points = [numbers(one.get("points")) for one in drawn]
    xs, ys = [x for one in points for x in one[::2]], [y for one in points for y in one[1::2]]
    xs += [float(line.get(name, "nan")) for line in svg.iter("line") for name in ("x1", "x2")]
    assert all(0 <= x <= width for x in xs)
    assert all(0 <= y <= height for y in ys)
    assert len(list(svg.iter("text"))) < 50


def test_a_decade_is_the_same_height_everywhere() -> None:
    field = Field([Line("", [1e-7, 3e-4], "")], 320, 230, 0, at_one=False)
    heights = [field.y(10.0**power) for power in range(field.low, field.high + 1)]
    steps = [one - other for one, other in pairwise(heights)]
    assert len(steps) >= 4
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert heights[0] == field.bottom
    assert heights[-1] == field.top


def test_points_lie_where_their_values_are() -> None:
    svg = chart([1e-6, 1e-5, 1e-4]).find("svg")
    assert svg is not None
    dots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in svg.iter("circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2  # the larger error is higher
    assert [dot.findtext("title") for dot in svg.iter("circle")][2] == "2, c & d: 1.0e-4"


def test_what_is_not_finite_breaks_the_line_and_is_marked() -> None:
    made = chart([1e-7, 1e-7, NAN, INF, 1e-7, 1e-7, NAN])
    assert len(list(made.iter("polyline"))) == 2
    assert len(list(made.iter("polygon"))) == 2
    assert "3 not finite" in "".join(made.itertext())


def test_an_empty_chart_and_a_flat_one_have_an_axis() -> None:
    for values in ([], [1.0, 1.0], [1e-7]):
        field = Field([Line("", values, "")], 320, 230, 0, at_one=False)
        assert field.low < field.high
    assert Field([Line("", [1e-9], "")], 320, 230, 0, at_one=True).high >= 0


@pytest.mark.parametrize(
    ("used", "part", "style"),
    [(0.0, 0, "within"), (1e-3, 0, "within"), (0.1, 0.5, "within"), (0.9, 0.739, "near"), (1.0, 0.75, "near"),
     (1.01, 0.751, "over"), (10, 1, "over"), (1e9, 1, "over"), (INF, 1, "over"), (NAN, 1, "over")],
)  # fmt: skip
def test_a_bar_shows_the_share_on_a_logarithmic_scale(used: float, part: float, style: str) -> None:
    made = ElementTree.fromstring(headroom(used))
    bar = made.findall("rect")[1]
    assert bar.get("class") == style
    assert float(bar.get("width", "nan")) == pytest.approx(max(part * BAR, 2), abs=0.1)
    mark = next(line for line in made.iter("line") if "mark" in line.get("class", ""))
    assert float(mark.get("x1", "nan")) == BAR * 0.75
