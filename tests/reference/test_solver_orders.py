"""How fast each sampler's error falls with the number of steps, on data for which the exact answer is known.

ODE: data is a mixture of two Gaussians on a line, so eps is a closed, non-linear function of (z, t). The flow
keeps every point's quantile, so the exact end point is the one with the starting point's quantile.
SDE: data is one Gaussian. The sampler is then linear in the start and in each step's noise, so running it on
unit vectors gives its mean and variance exactly, without sampling.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdm.reference.schedule import NoiseSchedule, make_schedule, time_grid
from mdm.reference.solver_steps import Model, dpm_step
from mdm.reference.solvers import SOLVERS, STOCHASTIC

# Third-order multistep is of order 2 as diffusers has it: `test_published_third_order_multistep` says why.
NOMINAL = dict.fromkeys(SOLVERS, 2)
NOMINAL |= {"ddim": 1, "euler": 1, "dpm_1": 1, "dpmpp_1": 1, "dpm_3s": 3, "dpmpp_3s": 3, "dim": 3}
KINDS = ["vp-linear", "cosine"]
T_START, T_END = (torch.tensor(t, dtype=torch.float64) for t in (0.8, 0.1))


class Mixture:
    """Data 0.3 N(-1, 0.5^2) + 0.7 N(0.8, 0.3^2), noised to time t."""

    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mean = torch.tensor([-1.0, 0.8], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.3], dtype=torch.float64)

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def standardised(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z - mean) / spread of each component at time t, and that spread."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        spread = (alpha**2 * self.spread**2 + sigma**2).sqrt()
        return (z[..., None] - alpha * self.mean) / spread, spread

    def eps(self, z: Tensor, t: Tensor) -> Tensor:
        """-sigma times the score."""
        u, spread = self.standardised(z, t)
        share = (self.weight.log() - spread.log() - 0.5 * u**2).softmax(-1)
        return self.schedule.sigma(t) * (share * u / spread).sum(-1)

    def quantile(self, z: Tensor, t: Tensor) -> Tensor:
        u, _ = self.standardised(z, t)
        return (0.5 * self.weight * torch.erfc(-u / math.sqrt(2))).sum(-1)

    def flow(self, z: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The probability-flow ODE's exact end point, by bisection."""
        wanted = self.quantile(z, start)
        low, high = torch.full_like(z, -9), torch.full_like(z, 9)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle, end) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def slope(errors: list[float]) -> float:
    """The order between the last two of runs that each double the steps."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in STOCHASTIC])
def test_order_on_the_ode(name: str, kind: str) -> None:
    """Step counts are even and 2 above a multiple of 3, or a "fast" run would end in a first-order step."""
    data = Mixture(make_schedule(kind))
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = data.flow(z, T_START, T_END)
    errors = []
    for steps in (98, 194, 386):
        times = time_grid(data.schedule, steps, t_start=float(T_START), t_end=float(T_END))
        errors.append(float((SOLVERS[name](data.eps, z, data.schedule, times) - exact).abs().max()))
    order = slope(errors)
    print(f"{name} {kind}: order {order:.2f}, nominal {NOMINAL[name]}, error at 386 steps {errors[-1]:.1e}")
    assert order > NOMINAL[name] - 0.25


@pytest.mark.parametrize("predict_x0", [False, True])
def test_published_third_order_multistep(predict_x0: bool) -> None:
    """From exact history, one step's error falls with h^3, so a run's with h^2. With D2 doubled: h^4.

    That is how diffusers has it, and the sampler must match: D2 is a divided difference, h^2 m'' / 2, where
    the Taylor formula it enters takes h^2 m''. A run starts with a step of order 1 besides, whose h^2 alone
    would hold it to order 2.
    """
    data = Mixture(make_schedule("vp-linear"))
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start = torch.tensor(0.5, dtype=torch.float64)
    orders = {}
    for weight in (1.0, 2.0):
        errors = []
        for h in (0.1, 0.05, 0.025):
            lam = data.schedule.lam(start) + h * torch.tensor([0.0, -1.0, -2.0, 1.0], dtype=torch.float64)
            times = data.schedule.time_of_lam(lam)
            points = [data.flow(z, start, t) for t in times]
            eps = [data.eps(point, t) for point, t in zip(points, times, strict=True)]
            x0 = [
                (point - data.schedule.sigma(t) * e) / data.schedule.alpha(t)
                for point, t, e in zip(points, times, eps, strict=True)
            ]
            m0, m1, m2, _ = x0 if predict_x0 else eps
            bend = ((m0 - m1) - (m1 - m2)) / 2
            m = (m0, (m0 - m1) + bend, weight * bend)
            errors.append(
                float((dpm_step(data.schedule, times[0], times[3], z, m, predict_x0) - points[3]).abs().max())
            )
        orders[weight] = slope(errors)
    print(f"predict_x0={predict_x0}: local order {orders[1.0]:.2f} published, {orders[2.0]:.2f} with doubled D2")
    assert orders[1.0] == pytest.approx(3, abs=0.25)
    assert orders[2.0] > 4 - 0.25


def gaussian(schedule: NoiseSchedule, variance: float) -> tuple[Model, Model]:
    """eps for data N(0, variance), and the variance at time t."""

    def noised(_: Tensor, t: Tensor) -> Tensor:
        return schedule.alpha(t) ** 2 * variance + schedule.sigma(t) ** 2

    return lambda z, t: schedule.sigma(t) * z / noised(z, t), noised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order_on_the_sde(name: str, kind: str) -> None:
    """The mean given the start, and the variance of the whole, against the time-reversed process.

    The ++ form's mean is exact at any step count: x0 is a martingale of the reversed process, so holding or
    extrapolating it errs by zero on average. Its order shows in the variance.
    """
    schedule = make_schedule(kind)
    eps, noised = gaussian(schedule, 0.3)
    v_start, v_end = noised(T_START, T_START), noised(T_END, T_END)
    exact_mean = schedule.alpha(T_START) / schedule.alpha(T_END) * v_end / v_start
    mean_errors, variance_errors = [], []
    for steps in (100, 200, 400):
        times = time_grid(schedule, steps, t_start=float(T_START), t_end=float(T_END))
        start = torch.zeros(steps + 1, dtype=torch.float64)
        start[0] = 1
        noise = torch.eye(steps, steps + 1, dtype=torch.float64).roll(1, dims=1)  # step i's noise in place i + 1
        response = SOLVERS[name](eps, start, schedule, times, noise=noise)
        mean_errors.append(float((response[0] - exact_mean).abs()))
        variance_errors.append(float((response[0] ** 2 * v_start + (response[1:] ** 2).sum() - v_end).abs()))
    print(f"{name} {kind}: error of the mean {mean_errors}, order of the variance {slope(variance_errors):.2f}")
    if name == "dpmpp_2m_sde":
        assert max(mean_errors) < 1e-12
        assert slope(variance_errors) > 2 - 0.25
    else:
        assert slope(mean_errors) > 1 - 0.25
        assert slope(variance_errors) > 1 - 0.25
