"""Draws a scene as a 32x32 RGB picture: flat colours on a light background, edges anti-aliased.

Coordinates are in pixels, (0, 0) the picture's top left corner, y downwards. Objects of a group stand 10
pixels apart, in a column at the left and right, else in a row; every centre is a whole number, so that
straight edges fall on pixel borders. The jitter moves the whole group by at most one pixel per axis, and no
object touches another or the picture's border at any jitter (the largest group reaches from 1 to 31).
Shapes: K = 256 points of the supersampling, H = W = 32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .scene import Scene, all_scenes

SIDE = 32
SUPERSAMPLING = 8  # per axis: 64 samples in a pixel
PITCH = 10  # between neighbours of a group
BACKGROUND = 0.93
RGB = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "yellow": (0.96, 0.80, 0.08),
    "purple": (0.60, 0.20, 0.72),
    "black": (0.08, 0.08, 0.08),
}
CENTRES = {"top": (16, 7), "bottom": (16, 25), "left": (7, 16), "right": (25, 16), "middle": (16, 16)}  # x, y
COLUMNS = ("left", "right")
# Every jitter of the group, in the order of `picture_table`.
JITTERS = tuple((dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


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


def centres(scene: Scene) -> list[tuple[int, int]]:
    """Centres (x, y) of the objects without jitter."""
    x, y = CENTRES[scene.place]
    offsets = [PITCH * i - PITCH * (scene.count - 1) // 2 for i in range(scene.count)]
    return [(x, y + o) if scene.place in COLUMNS else (x + o, y) for o in offsets]


@cache
def _coverage(scene: Scene) -> NDArray[np.float64]:
    """Fraction of each pixel that the objects cover, without jitter."""
    at = (np.arange(SIDE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING  # [K]
    x, y = at[None, :], at[:, None]
    covered = np.zeros((len(at), len(at)), bool)  # [K,K]
    for cx, cy in centres(scene):
        covered |= inside(scene.shape, scene.size, x - cx, y - cy)
    fraction: NDArray[np.float64] = covered.reshape(SIDE, SUPERSAMPLING, SIDE, SUPERSAMPLING).mean((1, 3))
    return fraction  # [H,W]


def render(scene: Scene, jitter: tuple[int, int] = (0, 0)) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [32,32,3]; `jitter` (dx, dy), each -1, 0 or 1 pixels, moves the group."""
    coverage = np.roll(_coverage(scene), (jitter[1], jitter[0]), (0, 1))[..., None]  # [H,W,1]
    picture: NDArray[np.float64] = coverage * np.array(RGB[scene.colour]) + (1 - coverage) * BACKGROUND
    return np.round(255 * picture).astype(np.uint8)


def picture_table() -> NDArray[np.uint8]:
    """Every scene at every jitter, uint8 [720,9,32,32,3] (20 MB), indexed as `all_scenes()` and `JITTERS`."""
    return np.stack([[render(scene, jitter) for jitter in JITTERS] for scene in all_scenes()])
