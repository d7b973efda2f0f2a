"""What the samplers are made of: evaluating the model, and single steps from time s to time t.

Letters as in `solvers.py`: x0 = (z - sigma eps) / alpha; m is what a DPM-Solver integrates, eps or x0.
Coefficients are float64, and scalars or, under a joint schedule, [L,1]: nothing here asks one for its value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]
FEW_STEPS = 15  # below it multistep solvers lower their order at the end, as diffusers does


class Evaluation(TypedDict):
    """What a callback is told after each evaluation of the model."""

    step: int  # evaluations so far
    t: Tensor
    z: Tensor
    eps: Tensor
    x0: Tensor


Callback = Callable[[Evaluation], None]


@dataclass
class Evaluator:
    """The model, which tells the callback about each of its evaluations."""

    model: Model
    schedule: NoiseSchedule
    callback: Callback | None
    count: int = 0

    def __call__(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """eps and x0 at (z, t)."""
        eps = self.model(z, t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = mix((1 / alpha, z), (-sigma / alpha, eps))
        if self.callback:
            self.callback({"step": self.count, "t": t, "z": z, "eps": eps, "x0": x0})
        self.count += 1
        return eps, x0


def mix(first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of coefficient * tensor. A coefficient takes the tensor's precision only here."""
    total = first[0].to(first[1]) * first[1]
    for coefficient, tensor in others:
        total = total + coefficient.to(tensor) * tensor
    return total


def ddim_step(schedule: NoiseSchedule, t: Tensor, eps: Tensor, x0: Tensor) -> Tensor:
    """Noise x0 again to time t: both DPM-Solvers' first-order step, in a form that is finite at sigma 0."""
    return mix((schedule.alpha(t), x0), (schedule.sigma(t), eps))


def dpm_step(
    schedule: NoiseSchedule, s: Tensor, t: Tensor, z: Tensor, m: tuple[Tensor, ...], predict_x0: bool
) -> Tensor:
    """Integrate a Taylor polynomial of m about s exactly; `m` holds m, h m', h^2 m'' at s, or fewer.

    With h = lam_t - lam_s:
    eps-form: z_t = alpha_t/alpha_s z_s - sigma_t sum phi_k(h) m_k     (arXiv 2206.00927)
    x0-form:  z_t = sigma_t/sigma_s z_s - alpha_t sum phi_k(-h) m_k    (arXiv 2211.01095)
    """
    h = schedule.lam(t) - schedule.lam(s)
    if predict_x0:
        keep, scale, h = schedule.sigma(t) / schedule.sigma(s), schedule.alpha(t), -h
    else:
        keep, scale = schedule.alpha(t) / schedule.alpha(s), schedule.sigma(t)
    phi_1 = torch.expm1(h)
    phi_2 = phi_1 / h - 1
    phi_3 = phi_2 / h - 0.5
    return mix((keep, z), *((-scale * phi, d) for phi, d in zip((phi_1, phi_2, phi_3), m, strict=False)))


def ode_slope(schedule: NoiseSchedule, t: Tensor, z: Tensor, eps: Tensor) -> Tensor:
    """dz/dt = -1/2 beta (z - eps / sigma)."""
    half = 0.5 * schedule.beta(t)
    return mix((-half, z), (half / schedule.sigma(t), eps))


def check_times(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise InputError(f"sampler: times have shape {tuple(times.shape)}, expected two or more in one falling row")


def multistep_orders(order: int, times: Tensor, lower_order_final: bool = True) -> list[int]:
    """The order of each step: it rises as history fills, falls at the end of a short run, is 1 to sigma 0."""
    steps = len(times) - 1
    orders = [min(order, i + 1) for i in range(steps)]
    short = lower_order_final and steps < FEW_STEPS
    if short and steps > 1:
        orders[-2] = min(orders[-2], 2)
    if short or times[-1] == 0:
        orders[-1] = 1
    return orders
