"""Samplers that add noise: they solve the reverse SDE whose marginals are those of the ODE in `solvers.py`.

Both take `noise`: a tensor [steps, *z.shape], or the torch.Generator to draw it from. Letters and signature
as in `solvers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.schedule import NoiseSchedule
from mdm.reference.solver_steps import Callback, Evaluator, Model, check_times, mix, multistep_orders

Noise = Tensor | torch.Generator


def dpmpp_2m_sde(
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    noise: Noise,
    order: int = 2,
    lower_order_final: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (order 1: no history) on the reverse SDE: each step forgets twice as fast and adds
    fresh noise.
    """
    check_times(times)
    evaluate = Evaluator(model, schedule, callback)
    previous = torch.zeros_like(z)
    for i, k in enumerate(multistep_orders(order, times, lower_order_final)):
        s, t = times[i], times[i + 1]
        _, x0 = evaluate(z, s)
        h = schedule.lam(t) - schedule.lam(s)
        m = x0
        if k == 2:
            m = x0 + mix((0.5 * h / (schedule.lam(s) - schedule.lam(times[i - 1])), x0 - previous))
        forget = -torch.expm1(-2 * h)
        z = mix(
            (schedule.sigma(t) / schedule.sigma(s) * torch.exp(-h), z),
            (schedule.alpha(t) * forget, m),
            (schedule.sigma(t) * forget.sqrt(), _draw(noise, i, z, len(times) - 1)),
        )
        previous = x0
    return z


def euler_maruyama(
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    noise: Noise,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama on the reverse SDE dz = (-1/2 beta z + beta eps / sigma) dt + sqrt(beta) dw, no noise in
    the last step.

    DiM-Small's published sampler, with times linspace(1, 0.001, 1000) and then 0: `time_grid(...,
    final_zero=True)`.
    """
    check_times(times)
    evaluate = Evaluator(model, schedule, callback)
    steps = len(times) - 1
    for i in range(steps):
        s, t = times[i], times[i + 1]
        eps, _ = evaluate(z, s)
        beta = schedule.beta(s)
        drift = mix((-0.5 * beta, z), (beta / schedule.sigma(s), eps))
        z = z + (t - s) * drift
        if i < steps - 1:
            z = z + mix(((beta * (s - t)).sqrt(), _draw(noise, i, z, steps)))
    return z


def _draw(noise: Noise, i: int, z: Tensor, steps: int) -> Tensor:
    """The noise of step i, in z's shape and precision."""
    if isinstance(noise, torch.Generator):
        return torch.randn(z.shape, generator=noise, dtype=z.dtype, device=noise.device).to(z.device)
    if noise.shape != (steps, *z.shape):
        raise InputError(
            f"sampler: noise has shape {tuple(noise.shape)}, expected {(steps, *z.shape)} ([steps, *z.shape])"
        )
    return noise[i].to(z)
