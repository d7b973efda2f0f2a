"""Charts as SVG that stands in the page itself: lines on a logarithmic axis, and a bar of how much of a limit is used.

Colours and dashes are classes of report.css, so charts follow the page's light and dark colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mdm.tools.check.forms.markup import Markup, tag
from mdm.tools.check.forms.wording import number, share

LEFT, RIGHT, TOP, BOTTOM = 58, 20, 12, 40  # pixels around a chart's field
LETTER, LONGEST = 6.2, 24  # pixels of a letter and letters of a name below the axis; of a longer one the end counts
MOST_DECADES = 14  # float64 has 16 digits: what is lower is drawn on the axis
FEW = 60  # points, up to which each is marked
LEAST_USED, MOST_USED = 1e-3, 10.0  # ends of a headroom bar
NEAR = 0.8  # of the limit: a bar changes its colour
BAR, BAR_HEIGHT = 120, 14


@dataclass(frozen=True)
class Line:
    name: str
    values: Sequence[float]
    style: str  # classes: "first", "second", "third"; "floor" is dashed, "limit" dotted


class Field:
    """Where index and value of a chart's lines lie."""

    def __init__(self, lines: Sequence[Line], width: float, height: float, slope: float, at_one: bool) -> None:
        """`slope`: what slanted names take below the field and to the left of it."""
        self.count = max((len(line.values) for line in lines), default=0)
        self.left, self.right = max(LEFT, slope), width - RIGHT
        self.top, self.bottom = TOP, height - BOTTOM - slope
        seen = [value for line in lines for value in line.values if math.isfinite(value) and value > 0]
        seen += [1.0] if at_one or not seen else []
        self.high = math.floor(math.log10(max(seen))) + 1
        self.low = max(min(math.ceil(math.log10(min(seen))) - 1, self.high - 1), self.high - MOST_DECADES)

    def x(self, index: float) -> float:
        if self.count < 2:
            return (self.left + self.right) / 2
        return self.left + (self.right - self.left) * index / (self.count - 1)

    def y(self, value: float) -> float:
        """What is not finite is on top, what is not positive on the axis."""
        return self.decade(self.high if not math.isfinite(value) else math.log10(value) if value > 0 else self.low)

    def decade(self, power: float) -> float:
        part = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * part


def log_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, names: Sequence[str], width: int = 320,
    height: int = 230, at_one: bool = False,
) -> Markup:  # fmt: skip
    """Lines over the indices that `names` names; `at_one` draws the limit of what is a share of it."""
    labels = [name if len(name) <= LONGEST else "…" + name[1 - LONGEST :] for name in names]
    longest = max(map(len, labels), default=1)
    slope = round(0.75 * LETTER * longest) if longest > 5 else 0
    height += slope
    field = Field(lines, width, height, slope, at_one)
    drawn = [*grid(field), *x_axis(field, labels, 15 if slope else LETTER * longest + 16, slope > 0)]
    if at_one:
        drawn.append(stroke(field.left, field.y(1), field.right, field.y(1), "limit"))
    for line in lines:
        drawn += draw(field, line, names)
    middle = (field.top + field.bottom) / 2
    drawn += [
        tag("text", x_label, x=(field.left + field.right) / 2, y=height - 5, class_="label", text_anchor="middle"),
        tag("text", y_label, transform=f"translate(11 {middle:.1f}) rotate(-90)", class_="label", text_anchor="middle"),
    ]
    svg = tag("svg", drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title, class_="chart",
              style=f"max-width:{round(width * 1.25)}px")  # fmt: skip
    legend = [(line.name + not_finite(line), line.style) for line in lines] + [("limit", "limit")] * at_one
    entries = [tag("li", tag("svg", stroke(0, 6, 26, 6, style), width=26, height=12), name) for name, style in legend]
    return tag("figure", tag("figcaption", title), svg, tag("ul", entries, class_="legend"))


def grid(field: Field) -> list[Markup]:
    every = -(-(field.high - field.low) // 8)
    drawn = []
    for power in range(field.low, field.high + 1):
        y = field.decade(power)
        drawn.append(stroke(field.left, y, field.right, y, "grid"))
        if (power - field.high) % every == 0:
            text = number(10.0**power) if -2 <= power <= 3 else f"1e{power}"
            drawn.append(tag("text", text, x=f"{field.left - 6}", y=f"{y + 3.5:.1f}", text_anchor="end"))
    return drawn


def x_axis(field: Field, names: Sequence[str], room: float, slanted: bool) -> list[Markup]:
    """As many of the names as have room, each `room` pixels."""
    least = field.count * room / (field.right - field.left)
    every = next((step for step in (1, 2, 5, 10, 20, 25, 50, 100) if step >= least), field.count)
    drawn = [stroke(field.left, field.bottom, field.right, field.bottom, "axis")]
    numbered = bool(names) and names[0].isdigit()  # multiples are shown; of other names the last one always
    for index in range(every - 1 if numbered else (len(names) - 1) % every, len(names), every):
        x, y = field.x(index), field.bottom
        drawn.append(stroke(x, y, x, y + 4, "axis"))
        if slanted:
            where = f"translate({x + 3:.1f} {y + 13:.1f}) rotate(-45)"
            drawn.append(tag("text", names[index], transform=where, text_anchor="end"))
        else:
            drawn.append(tag("text", names[index], x=f"{x:.1f}", y=f"{y + 16:.1f}", text_anchor="middle"))
    return drawn


def draw(field: Field, line: Line, names: Sequence[str]) -> list[Markup]:
    """The line in the pieces that are finite, and a mark on top where each piece that is not begins."""
    drawn, piece = [], list[str]()
    for index, value in enumerate([*line.values, math.nan]):
        if math.isfinite(value):
            piece.append(f"{field.x(index):.1f},{field.y(value):.1f}")
            continue
        if len(piece) == 1:  # alone it would be no line: a dash
            x, y = field.x(index - 1), field.y(line.values[index - 1])
            drawn.append(stroke(x - 6, y, x + 6, y, line.style))
        elif piece:
            drawn.append(tag("polyline", points=" ".join(piece), class_=f"line {line.style}"))
        if index < len(line.values) and (piece or index == 0):
            x, y = field.x(index), field.y(value)
            points = f"{x:.1f},{y - 5:.1f} {x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f}"
            drawn.append(tag("polygon", tag("title", f"{line.name}: not finite"), points=points, class_="bad"))
        piece = []
    if len(line.values) <= FEW and "floor" not in line.style and "limit" not in line.style:
        drawn += [
            tag("circle", tag("title", f"{names[index]}, {line.name}: {number(value)}"), cx=f"{field.x(index):.1f}",
                cy=f"{field.y(value):.1f}", r=2.6, class_=f"dot {line.style}")
            for index, value in enumerate(line.values) if math.isfinite(value)
        ]  # fmt: skip
    return drawn


def not_finite(line: Line) -> str:
    count = sum(not math.isfinite(value) for value in line.values)
    return f" (▲ {count} not finite)" if count else ""


def headroom(used: float) -> Markup:
    """A bar from 1/1000 of the limit to 10 times it, logarithmic, with a line at the limit."""

    def x(share_of_limit: float) -> float:
        inside = MOST_USED if math.isnan(share_of_limit) else min(max(share_of_limit, LEAST_USED), MOST_USED)
        return BAR * math.log(inside / LEAST_USED) / math.log(MOST_USED / LEAST_USED)

    style = "over" if not used <= 1 else "near" if used > NEAR else "within"
    ticks = [stroke(x(tick), 3, x(tick), BAR_HEIGHT - 3, "grid") for tick in (1e-2, 1e-1)]
    return tag(
        "svg", tag("title", f"{share(used)} of the limit"),
        tag("rect", x=0, y=3, width=BAR, height=BAR_HEIGHT - 6, class_="track"), ticks,
        tag("rect", x=0, y=3, width=f"{max(x(used), 2):.1f}", height=BAR_HEIGHT - 6, class_=style),
        stroke(x(1), 0, x(1), BAR_HEIGHT, "mark"),
        viewBox=f"0 0 {BAR} {BAR_HEIGHT}", class_="headroom", role="img", aria_label=f"{share(used)} of the limit",
    )  # fmt: skip


def stroke(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=f"line {style}")
