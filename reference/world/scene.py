"""The small captioned picture world: what a scene is, which scenes exist, which are kept out of training.

A scene is ONE group of one to three identical objects. With one group there is no question of which colour
belongs to which shape: in a first trial a network of 1M parameters did not learn that binding in half an hour
on two cores, while it learnt everything about a single kind of object.

3 counts x 2 sizes x 6 colours x 4 shapes x 5 places = 720 scenes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import product

COUNTS = (1, 2, 3)
SIZES = ("small", "big")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top", "bottom", "left", "right", "middle")


@dataclass(frozen=True, order=True)
class Scene:
    """A group of `count` identical objects."""

    count: int
    size: str
    colour: str
    shape: str
    place: str


def all_scenes() -> list[Scene]:
    """All 720 scenes, in a fixed order (the order of `picture_table`)."""
    return [Scene(*values) for values in product(COUNTS, SIZES, COLOURS, SHAPES, PLACES)]


def held_out(scene: Scene) -> bool:
    """True for the scenes that training never sees, neither as a picture nor as a caption.

    Decided by the (colour, shape, place) triple, so a held-out scene is new in more than its count or size.
    Remainder 4 holds out 12 of the 120 triples (72 scenes), every colour, shape and place among them; every
    pair of values still occurs in training.
    """
    triple = f"{scene.colour} {scene.shape} {scene.place}"
    return zlib.crc32(triple.encode()) % 10 == 4
