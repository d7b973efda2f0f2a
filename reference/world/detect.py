"""Reads a picture of the world back into count, size, colour, shape and place by rules, without the renderer.

It shares no constant with `render`: a judge of generated pictures must not know how right ones are made.

    1. background = median colour; object pixels lie at least half as far from it as the objects' colour
    2. objects = connected pixels without specks; coverage alpha = a pixel's way from background to object
    3. colour = hue of the core pixels; shape = symmetry of the coverage; size = side length from its area
    4. count of objects; size, colour, shape of more than half of them; place of their mean

The k-fold symmetry moment of coverage a at z = x + iy from its centroid is m_k = sum(a z^k) / sum(a |z|^k). A
long shape has |m_2| > 0; a triangle has |m_3| = 0.64, the others 0; a square has m_4 = -0.45, a disc 0, a
cross 0.5 or more. After a [1 2 1] blur 0.35, -0.31 and 0.34 are left.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdm.plugins.errors import InputError

from .scene import Scene

SIDE = 32
FAINTEST = 0.3  # least colour distance of an object from the background; noise of 0.05 reaches 0.2
SPECK = 6  # pixels; the smallest object, a small triangle, has 18
# Hues in degrees that a person would call by the name; the gaps between them (orange, cyan, pink) have none.
HUES = {"red": (-20, 22), "yellow": (38, 70), "green": (85, 165), "blue": (200, 252), "purple": (262, 325)}
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 0.54}  # of the bounding square
SIDES = {"small": (4.5, 7.0), "big": (7.0, 10.0)}  # of the bounding square, in pixels

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """What is seen in a picture; None where the rules cannot tell."""

    count: int
    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None

    @property
    def scene(self) -> Scene | None:
        """The scene that was seen; None if the picture shows no scene of the world."""
        if None in (self.size, self.colour, self.shape, self.place) or not 1 <= self.count <= 3:
            return None
        return Scene(self.count, str(self.size), str(self.colour), str(self.shape), str(self.place))


def detect(picture: NDArray[Any]) -> Detection:
    """Reads a picture [32,32,3], uint8 or float in 0..1."""
    if picture.shape != (SIDE, SIDE, 3):
        raise InputError(f"picture: found shape {list(picture.shape)}, expected [{SIDE}, {SIDE}, 3]")
    scale = 255 if picture.dtype == np.uint8 else 1
    rgb = np.nan_to_num(np.clip(picture / scale, 0, 1))  # a diverged model's picture is wrong, not an error
    background = np.median(rgb.reshape(-1, 3), 0)  # [3]
    away = np.linalg.norm(rgb - background, axis=-1)  # [H,W]
    objects = components(object_pixels(away))
    if not objects:
        return Detection(count=0)
    colours, shapes, sizes, middles = [], [], [], []
    for mask in objects:
        core = np.median(rgb[mask & (away >= np.median(away[mask]))], 0)  # [3]
        alpha = coverage(rgb, mask, background, core)
        colours.append(colour_name(core))
        shapes.append(shape_name(alpha))
        sizes.append(size_name(alpha, shapes[-1]))
        middles.append(centroid(alpha))
    place = place_name(complex(np.mean(middles)))
    return Detection(len(objects), majority(sizes), majority(colours), majority(shapes), place)


def object_pixels(away: Floats) -> Mask:
    """Pixels that an object covers by half or more, from their colour distances to the background."""
    visible = away[away > FAINTEST]
    if visible.size == 0:
        return np.zeros_like(away, bool)
    return away > max(FAINTEST, 0.5 * float(np.percentile(visible, 90)))


def components(mask: Mask) -> list[Mask]:
    """Groups of pixels that share edges, each as a mask; without specks."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        group, front = [], [left.pop()]
        while front:
            y, x = front.pop()
            group.append((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            front.extend(near)
        if len(group) >= SPECK:
            one = np.zeros_like(mask)
            one[tuple(np.array(group).T)] = True
            found.append(one)
    return found


def coverage(rgb: Floats, mask: Mask, background: Floats, core: Floats) -> Floats:
    """How far each pixel near the object lies on the way from the background's colour to the core's, 0..1."""
    towards = core - background
    alpha = np.clip((rgb - background) @ towards / (towards @ towards), 0, 1)  # [H,W]
    return np.where(grow(mask), alpha, 0.0)


def grow(mask: Mask) -> Mask:
    """The mask and its eight neighbours: where the half-covered edge pixels are."""
    padded = np.pad(mask, 1)
    shifted = [padded[dy : dy + SIDE, dx : dx + SIDE] for dy in range(3) for dx in range(3)]
    grown: Mask = np.any(shifted, axis=0)
    return grown


def points(alpha: Floats) -> tuple[Floats, NDArray[np.complex128]]:
    """Coverages and places x + iy (from the picture's top left corner) of the covered pixels."""
    y, x = np.nonzero(alpha)
    return alpha[y, x], (x + 0.5) + 1j * (y + 0.5)  # [n], [n]


def centroid(alpha: Floats) -> complex:
    """Centre of mass x + iy of a coverage."""
    a, z = points(alpha)
    return complex((a * z).sum() / a.sum())


def colour_name(rgb: Floats) -> str | None:
    """Black if dark and without hue, else the name of the hue."""
    hue, _, value = colorsys.rgb_to_hsv(*rgb)
    if np.ptp(rgb) < 0.25:
        return "black" if value < 0.4 else None
    degrees = 360 * hue
    return next((name for name, (low, high) in HUES.items() if (degrees - low) % 360 <= high - low), None)


def symmetry(alpha: Floats, folds: int) -> complex:
    """The k-fold symmetry moment of a coverage (see the top of the file)."""
    a, z = points(alpha)
    z = z - centroid(alpha)
    return complex((a * z**folds).sum() / (a * np.abs(z) ** folds).sum())


def shape_name(alpha: Floats) -> str | None:
    """The shape whose symmetry the coverage has; None for what is long, or between a disc and a cross."""
    if abs(symmetry(alpha, 2)) > 0.3:
        return None
    if abs(symmetry(alpha, 3)) > 0.2:
        return "triangle"
    fourfold = symmetry(alpha, 4).real
    if fourfold < -0.22:
        return "square"
    if fourfold < 0.16:
        return "circle"
    return "cross" if fourfold > 0.25 else None


def size_name(alpha: Floats, shape: str | None) -> str | None:
    """Small or big, by the side of the square around a shape of this area."""
    if shape is None:
        return None
    side = float(np.sqrt(alpha.sum() / FILL[shape]))
    return next((name for name, (low, high) in SIDES.items() if low <= side < high), None)


def place_name(centre: complex) -> str | None:
    """The side of the picture where the group is; None in the corners."""
    right, down = centre.real - SIDE / 2, centre.imag - SIDE / 2
    if min(abs(right), abs(down)) > 4.5:
        return None
    if max(abs(right), abs(down)) <= 4.5:
        return "middle"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def majority(names: Iterable[str | None]) -> str | None:
    """The name of more than half of the objects."""
    listed = list(names)
    name, votes = Counter(listed).most_common(1)[0]
    return name if 2 * votes > len(listed) else None
