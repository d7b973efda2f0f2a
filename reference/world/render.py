"""Draws a scene as a 32x32 RGB picture: flat colours on a light background, edges anti-aliased.

Coordinates are in pixels, (0, 0) the picture's top left corner, y downwards. The objects of a group stand in a
column at the left and right, else in a row. Across that line the whole group is shifted by two pixels to
either side, so a scene has two pictures. All centres are even: with 4 x 4 patches an object then meets the
patch grid in few ways. When each group could move by one pixel in any direction, 75 minutes of training
left 43% of the drawn shapes wrong or malformed. No object touches another or the border.
Shapes: K = 256 points of the supersampling, H = W = 32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .scene import Scene, all_scenes

SIDE = 32
SUPERSAMPLING = 8  # per axis: 64 samples in a pixel
OFFSETS = {1: (0,), 2: (-6, 6), 3: (-10, 0, 10)}  # of a group's objects along its line
SHIFTS = (-2, 2)  # of a group across its line, in the order of `picture_table`
BACKGROUND = 0.93
RGB = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "yellow": (0.96, 0.80, 0.08),
    "purple": (0.60, 0.20, 0.72),
    "black": (0.08, 0.08, 0.08),
}
CENTRES = {"top": (16, 8), "bottom": (16, 24), "left": (8, 16), "right": (24, 16), "middle": (16, 16)}  # x, y
COLUMNS = ("left", "right")


def inside(shape: str, size: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points (relative to the object's centre) lie in the object."""
    half = 4 if size == "big" else 3
    if shape == "circle":
        return x**2 + y**2 < half**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < half
    if shape == "triangle":  # upright: from the tip at -half to the base at +half
        return (abs(y) < half) & (abs(x) < (y + half) / 2)
    arm = 1.25 if size == "big" else 1
    return (np.maximum(abs(x), abs(y)) < half) & (np.minimum(abs(x), abs(y)) < arm)


def centres(scene: Scene, shift: int) -> list[tuple[int, int]]:
    """Centres (x, y) of the objects."""
    x, y = CENTRES[scene.place]
    along = OFFSETS[scene.count]
    return [(x + shift, y + o) if scene.place in COLUMNS else (x + o, y + shift) for o in along]


@cache
def _coverage(scene: Scene, shift: int) -> NDArray[np.float64]:
    """Fraction of each pixel that the objects cover."""
    at = (np.arange(SIDE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING  # [K]
    x, y = at[None, :], at[:, None]
    covered = np.zeros((len(at), len(at)), bool)  # [K,K]
    for cx, cy in centres(scene, shift):
        covered |= inside(scene.shape, scene.size, x - cx, y - cy)
    fraction: NDArray[np.float64] = covered.reshape(SIDE, SUPERSAMPLING, SIDE, SUPERSAMPLING).mean((1, 3))
    return fraction  # [H,W]


def render(scene: Scene, shift: int = SHIFTS[0]) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [32,32,3]."""
    coverage = _coverage(scene, shift)[..., None]  # [H,W,1]
    picture: NDArray[np.float64] = coverage * np.array(RGB[scene.colour]) + (1 - coverage) * BACKGROUND
    return np.round(255 * picture).astype(np.uint8)


def picture_table() -> NDArray[np.uint8]:
    """Every scene at both shifts, uint8 [720,2,32,32,3] (4 MB), indexed as `all_scenes()` and `SHIFTS`."""
    return np.stack([[render(scene, shift) for shift in SHIFTS] for scene in all_scenes()])
