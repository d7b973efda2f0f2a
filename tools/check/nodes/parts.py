"""Where a graph is cut into some sqrt(N) parts: its blocks, and pieces of what lies before and behind them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mdm.tools.check.nodes.wiring import DECIDE

BLOCK = re.compile(r"(?:low\.)?backbone\.blocks\.\d+(?=\.)")
# A part begins before a node that turns numbers into decisions: what it decides on is then the same for all.
CUT_BEFORE = (*DECIDE, "Floor")


@dataclass(frozen=True)
class Part:
    """Pairs start .. end."""

    name: str
    start: int
    end: int


def parts_of(names: Sequence[str], operators: Sequence[str]) -> list[Part]:
    """By node names; what stands between two blocks, such as the next one's order, belongs to the following one."""
    size = max(1, math.ceil(math.sqrt(len(names))))
    labels = [found.group() if (found := BLOCK.match(name)) else "" for name in names]
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    place = 0
    for number, (label, count) in enumerate(runs):
        between = 0 < number < len(runs) - 1
        if not label and between and (count <= size or runs[number - 1][0] == runs[number + 1][0]):
            labels[place : place + count] = [runs[number + 1][0]] * count
        place += count
    cuts = [0]
    for place in range(1, len(names)):
        pieces = not labels[place] and (place - cuts[-1] >= size or operators[place] in CUT_BEFORE)
        if labels[place] != labels[place - 1] or pieces:
            cuts.append(place)
    ends = [*cuts[1:], len(names)]
    return [
        Part(labels[start] or (f"{names[start]} to {names[end - 1]}" if end - start > 1 else names[start]), start, end)
        for start, end in zip(cuts, ends, strict=True)
    ]
