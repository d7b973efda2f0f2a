"""Distances of pictures against formulas written out by hand, and the tripwires."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mdm.tools.check.levels.pictures import BEST, picture_faults, psnr, ssim


def noise(shape: tuple[int, ...] = (32, 24, 3), low: int = 30, high: int = 226, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


def flat(value: int, shape: tuple[int, ...] = (32, 24, 3)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def test_psnr_by_hand() -> None:
    # All off by 16: 20 log10(255 / 16). 250 - 0 must not wrap around in 8 bits.
    assert psnr(flat(100), flat(116)) == pytest.approx(20 * math.log10(255 / 16), abs=1e-12)
    assert psnr(flat(0), flat(250)) == pytest.approx(20 * math.log10(255 / 250), abs=1e-12)


def test_psnr_of_equal_pictures_is_the_best_there_is() -> None:
    large, nearly = flat(7, (600, 600, 3)), flat(7, (600, 600, 3))
    nearly[0, 0, 0] += 1  # 108 dB
    assert psnr(large, large) == psnr(large, nearly) == BEST
    assert psnr(noise(), noise()) == BEST


def written_out(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-5, 6)] for j in range(-5, 6)])
    weights /= weights.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for c in range(x.shape[2]):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a, b = (v[top : top + 11, left : left + 11, c].astype(float) for v in (x, y))
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                both = (weights * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )  # fmt: skip
    return float(np.mean(values))


def test_ssim_is_what_the_paper_says() -> None:
    x, y = noise((13, 15, 3)), noise((13, 15, 3), seed=1)
    near = np.clip(x + np.random.default_rng(2).normal(0, 9, x.shape), 0, 255).astype(np.uint8)
    for other in (y, near, flat(90, x.shape)):
        assert ssim(other, x) == pytest.approx(written_out(other, x), abs=1e-12)


def test_ssim_of_flat_pictures_by_hand() -> None:
    # No variance: only the means count, (2 100 120 + C1) / (100^2 + 120^2 + C1).
    assert ssim(flat(100), flat(120)) == pytest.approx((24000 + 6.5025) / (24400 + 6.5025), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 3), (8, 8, 3), (5, 40, 1), (11, 11, 3), (64, 48, 3)])
def test_ssim_is_1_of_equal_pictures_and_symmetric(shape: tuple[int, ...]) -> None:
    x, y = noise(shape), noise(shape, seed=1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12)
    assert -1 <= ssim(x, y) < 0.99


def test_ssim_falls_as_noise_grows() -> None:
    x = noise((48, 48, 3))
    grown = [
        ssim(np.clip(x + np.random.default_rng(1).normal(0, s, x.shape), 0, 255).astype(np.uint8), x)
        for s in (1, 4, 16, 64)
    ]
    assert grown == sorted(grown, reverse=True)


def saturated(share: float) -> np.ndarray:
    made = noise((50, 40, 3))
    at = np.random.default_rng(5).random(made.shape) < share
    made[at] = np.random.default_rng(6).choice([0, 255], at.sum()).astype(np.uint8)
    return made


def nearly_black() -> np.ndarray:
    made = flat(0)
    made[3, 4] = 200  # one pixel of 768
    return made


FAULTY = {
    "it is black": [flat(0), flat(5), nearly_black()],
    "it is white": [flat(255), flat(250)],
    "it is one flat colour": [
        flat(130), np.tile(np.array([200, 40, 90], np.uint8), (32, 24, 1)), flat(130) + noise(high=90) // 30,
    ],
    "most of its values are at 0 or 255": [saturated(0.8)],
}  # fmt: skip


@pytest.mark.parametrize("said", FAULTY)
def test_what_is_plainly_wrong_is_said_once(said: str) -> None:
    for found in FAULTY[said]:
        assert picture_faults(found, noise(found.shape)) == [said]
        assert picture_faults(found, found) == []


def test_a_model_that_draws_so_on_purpose_does_not_trip() -> None:
    assert picture_faults(flat(0), flat(12)) == []
    assert picture_faults(flat(250), flat(255)) == []
    assert picture_faults(saturated(0.63), saturated(0.58)) == []  # on either side of the bound
    assert picture_faults(noise(), noise(seed=1)) == []
    assert picture_faults(flat(0), flat(255)) == ["it is black"]
    assert picture_faults(flat(130), flat(0)) == []  # both flat: the error itself says the rest
    assert picture_faults(saturated(0.4), noise((50, 40, 3))) == []


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        psnr(flat(1).astype(np.float32), flat(1))
    with pytest.raises(ValueError, match="shapes"):
        ssim(flat(1), flat(1, (8, 8, 3)))
