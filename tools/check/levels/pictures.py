"""How far a picture is from the true one, and what is plainly wrong with it.

PSNR and SSIM say something only of two runs from the same noise. They do not tell a broken picture from a merely
different one, and a black frame can score well: `picture_faults` looks for those. Pictures are uint8 [H,W,C].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # [H,W,C]
Plane = npt.NDArray[np.float64]  # [H,W,C]

BEST = 99.0  # dB, of equal pictures, and of those still closer: JSON knows no infinity
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

# What makes a picture black or white, constant, or saturated. The true picture counts as such a little earlier: a fault
# is what it clearly does not have.
FOUND = {"dark": 8, "spread": 2, "edge": 0, "share": 0.6}
TRUTH = {"dark": 24, "spread": 8, "edge": 4, "share": 0.5}
FAULTS = {
    "black": "it is black",
    "white": "it is white",
    "constant": "it is one flat colour",
    "saturated": "most of its values are at 0 or 255",
}


def psnr(found: Picture, truth: Picture) -> float:
    """Peak signal over noise, in dB: 20 log10(255 / rms of the difference), 99 at most."""
    _check(found, truth)
    off = float(np.square(found.astype(np.float64) - truth).mean())
    return BEST if off == 0 else min(BEST, float(10 * np.log10(255**2 / off)))


def ssim(found: Picture, truth: Picture) -> float:
    """Structural similarity (Wang et al. 2004, Eq. 13): the mean over all whole windows and channels; 1 for equal ones.

    Along a side shorter than the window of 11, the window is as long as that side.
    """
    _check(found, truth)
    x, y = found.astype(np.float64), truth.astype(np.float64)
    mx, my = blur(x), blur(y)
    vx, vy, both = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    at = (2 * mx * my + C1) * (2 * both + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return float(at.mean())


def blur(x: Plane) -> Plane:
    """The mean under a Gaussian window, wherever it fits in whole."""
    for axis in (0, 1):
        size = min(WINDOW, x.shape[axis])
        weights = np.exp(-0.5 * np.square((np.arange(size) - (size - 1) / 2) / SIGMA))
        x = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis) @ (weights / weights.sum())
    return x


def picture_faults(found: Picture, truth: Picture | None) -> list[str]:
    """What is wrong with a picture at first sight and is not so in the true one, if it is known; in plain words."""
    _check(found, found if truth is None else truth)
    names = kinds(found, **FOUND)
    if names & {"black", "white"}:
        names -= {"constant", "saturated"}  # which follow
    names -= set() if truth is None else kinds(truth, **TRUTH)
    return [said for name, said in FAULTS.items() if name in names]


def kinds(picture: Picture, dark: float, spread: float, edge: float, share: float) -> set[str]:
    """Black: nearly all values are at most `dark`; flat: within `spread`; saturated: more than `share` at an `edge`."""
    low, high = np.quantile(picture, 0.01, axis=(0, 1)), np.quantile(picture, 0.99, axis=(0, 1))  # [C]
    holds = {
        "black": high.max() <= dark,
        "white": low.min() >= 255 - dark,
        "constant": (high - low).max() <= spread,
        "saturated": ((picture <= edge) | (picture >= 255 - edge)).mean() > share,
    }
    return {name for name, does in holds.items() if does}


def _check(found: Picture, truth: Picture) -> None:
    for picture in (found, truth):
        if picture.dtype != np.uint8 or picture.ndim != 3 or not picture.size:
            raise ValueError(f"a picture is {picture.dtype} {picture.shape}, expected uint8 [H,W,C]")
    if found.shape != truth.shape:
        raise ValueError(f"pictures of shapes {found.shape} and {truth.shape}")
