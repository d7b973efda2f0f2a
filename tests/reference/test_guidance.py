"""Classifier-free guidance, and DiM's upsample guidance with the truncations its sampler makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.guidance import classifier_free, low_time, pooled_power, upsample_guidance
from mdm.reference.schedule import make_schedule
from mdm.reference.solvers import sample

SD = make_schedule("sd")


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_classifier_free_is_c_plus_s_times_the_difference() -> None:
    z, t = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), f64(0.5)
    guided = classifier_free(lambda z, t: 2 * z + t, lambda z, t: z, 0.7)
    torch.testing.assert_close(guided(z, t), 2 * z + t + 0.7 * (z + t))
    per_sample = classifier_free(lambda z, t: 2 * z, lambda z, t: z, torch.tensor([[0.0], [3.0]]))(z, t)
    torch.testing.assert_close(per_sample, torch.stack([2 * z[0], 5 * z[1]]))
    same = classifier_free(torch.mul, torch.mul, 4.0)
    torch.testing.assert_close(same(z, t), z * t)


def plain_alpha_bar() -> list[float]:
    """alpha_bar after 0..1000 steps, one product at a time."""
    first, last = math.sqrt(0.00085), math.sqrt(0.0120)
    table = [1.0]
    for i in range(1000):
        table.append(table[-1] * (1 - (first + i / 999 * (last - first)) ** 2))
    return table


def plain_low_time(t: float, factor: int) -> float:
    """low_time again in plain Python, with the five truncated indices written out instead of arrived at."""
    table = plain_alpha_bar()
    low_ones = {251, 253, 502, 506, 511}  # float32(k / 1000) * 1000 lies below k for these
    target = table[int(t * 1000)]
    best, best_j = math.inf, 0
    for j in range(999):  # the 1000th level, 1e-5, has no noise and an infinite ratio: never the nearest
        k = 999 - j
        ab = table[k - (k in low_ones)]
        gap = abs(ab / (1 - ab) - factor**2 * target / (1 - target))
        if gap < best:
            best, best_j = gap, j
    return min(1 - best_j / 999, t)


@pytest.mark.parametrize("factor", [2, 3])
def test_tau_on_dims_grid(factor: int) -> None:
    """DiM's search exactly, at each guided time of its 50 evaluations; it finds m^2 times the snr."""
    times = [float(t) for t in torch.linspace(1, 1e-3, 51, dtype=torch.float64) if t >= 0.7]
    for t in times:
        assert float(low_time(f64(t), factor)) == pytest.approx(plain_low_time(t, factor), abs=1e-12)
    tau = torch.stack([low_time(f64(t), factor) for t in times])
    ratio = torch.exp(2 * (SD.lam(tau) - SD.lam(torch.tensor(times, dtype=torch.float64)))) / factor**2
    print(f"snr(tau) / (m^2 snr(t)), m = {factor}: {float(ratio.min()):.4f} to {float(ratio.max()):.4f}")
    assert bool(((ratio - 1).abs() < 0.02).all())


def test_the_five_truncated_levels_show() -> None:
    """Without float32's truncation some time finds another tau, so the exactness above is not vacuous."""
    table = plain_alpha_bar()
    exact_snr = [table[k] / (1 - table[k]) for k in range(999, 0, -1)]
    moved = 0
    for k in range(300, 1001):
        target = 4 * table[k] / (1 - table[k])
        j = min(range(999), key=lambda j: abs(exact_snr[j] - target))
        moved += plain_low_time(k / 1000, 2) != min(1 - j / 999, k / 1000)
    print(f"times of 701 whose tau the truncation moves: {moved}")
    assert moved > 0


def test_pooled_power_is_the_variance_of_a_pooled_latent() -> None:
    """z = sqrt(ab) x + sqrt(1 - ab) noise with x constant over each pool: P is the variance after pooling."""
    draws = torch.Generator().manual_seed(0)
    t, factor = f64(0.8), 2
    low = torch.randn(1, 1, 400, 400, generator=draws, dtype=torch.float64)
    ab = SD.alpha(t) ** 2
    noise = torch.randn(1, 1, 800, 800, generator=draws, dtype=torch.float64)
    z = ab.sqrt() * low.repeat_interleave(2, -1).repeat_interleave(2, -2) + (1 - ab).sqrt() * noise
    pooled = torch.nn.functional.avg_pool2d(z, factor)
    assert float(pooled.var()) == pytest.approx(float(pooled_power(t, factor)), rel=0.01)


def test_upsample_guidance_replaces_the_low_frequencies() -> None:
    """With theta 1 the pooled guided estimate is exactly eps_lo / m; what pooling removes stays."""
    factor, t = 2, f64(0.9)
    z = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def low(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return torch.tanh(z)

    pool = torch.nn.functional.avg_pool2d
    guided = upsample_guidance(lambda z, t: torch.sin(3 * z), low, SD, factor=factor)(z, t)
    (z_low, tau) = seen[0]
    torch.testing.assert_close(z_low, pool(z, 2) / pooled_power(t, 2).sqrt())
    assert float(tau) == float(low_time(t, 2)) < float(t)
    torch.testing.assert_close(pool(guided, 2), torch.tanh(z_low) / factor)
    difference = guided - torch.sin(3 * z)
    torch.testing.assert_close(difference[..., ::2, ::2], difference[..., 1::2, 1::2])  # constant over each pool
    half = upsample_guidance(lambda z, t: torch.sin(3 * z), low, SD, factor=factor, theta=0.5)(z, t)
    torch.testing.assert_close(half - torch.sin(3 * z), 0.5 * difference)


def test_a_whole_run_asks_the_low_branch_for_its_first_part_only() -> None:
    """DiM's setting: eps-form, 50 evaluations, w = 0 once t < 0.7: 16 of the 50 times lie at 0.7 or above."""
    times: list[float] = []

    def low(z: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return 0.1 * z

    model = upsample_guidance(lambda z, t: 0.1 * z, low, SD, factor=2)
    z = sample("dpm_3s", model, torch.ones(1, 4, 4, 4), SD, 50)
    assert z.dtype == torch.float32
    assert len(times) == 16


def test_wrong_use_is_told_plainly() -> None:
    with pytest.raises(InputError, match="'cosine', expected 'sd'"):
        upsample_guidance(torch.mul, torch.mul, make_schedule("cosine"), factor=2)
    model = upsample_guidance(torch.mul, torch.mul, SD, factor=3)
    with pytest.raises(InputError, match=r"latent is \(1, 4, 8, 9\), expected .* multiples of 3"):
        model(torch.zeros(1, 4, 8, 9), f64(0.9))
