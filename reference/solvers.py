"""Samplers: each walks a latent z from noise to data along falling times, in the k-diffusion style.

Every one is a function `(model, z, schedule, times, *, ..., callback=None) -> z`, where `model(z, t)` returns
the noise estimate eps at the continuous time t in [0, 1], a float64 scalar, and `times` is what
`schedule.time_grid` makes. They solve the probability-flow ODE dz/dt = -1/2 beta (z - eps / sigma); those
that take `noise` (`solvers_sde.py`) the reverse SDE. A grid that ends at 0 ends at sigma 0, and its last step
has order 1.

Letters: s and t are the times a step starts and ends at; alpha, sigma, lam, beta as in `schedule.py`;
x0 = (z - sigma eps) / alpha; m is what a DPM-Solver integrates: eps (Lu et al. 2022, arXiv 2206.00927) or
x0 (DPM-Solver++, arXiv 2211.01095).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.config import nearest
from mdm.reference.schedule import NoiseSchedule, time_grid
from mdm.reference.solver_steps import (
    Callback,
    Evaluator,
    Model,
    check_times,
    ddim_step,
    dpm_step,
    mix,
    multistep_orders,
    ode_slope,
)
from mdm.reference.solvers_sde import dpmpp_2m_sde, euler_maruyama

SOLVER_TYPES = ("midpoint", "heun")

# ------------------------------------------------------------------------------------------------ first order


def ddim(
    model: Model, z: Tensor, schedule: NoiseSchedule, times: Tensor, *, callback: Callback | None = None
) -> Tensor:
    """DDIM without noise (Song et al. 2021, Eq. 12). Also k-diffusion's Euler, z/alpha in sigma/alpha."""
    check_times(times)
    evaluate = Evaluator(model, schedule, callback)
    for s, t in pairwise(times.unbind()):
        eps, x0 = evaluate(z, s)
        z = ddim_step(schedule, t, eps, x0)
    return z


def euler(
    model: Model, z: Tensor, schedule: NoiseSchedule, times: Tensor, *, callback: Callback | None = None
) -> Tensor:
    """Euler in t (k-diffusion's Euler is `ddim`)."""
    check_times(times)
    evaluate = Evaluator(model, schedule, callback)
    for s, t in pairwise(times.unbind()):
        eps, _ = evaluate(z, s)
        z = z + (t - s) * ode_slope(schedule, s, z, eps)
    return z


# -------------------------------------------------------------------------------------------------- trapezoid


def _trapezoid(evaluate: Evaluator, z: Tensor, times: Tensor, euler_last: bool) -> Tensor:
    """Two evaluations a step: Euler predicts z at t, the mean of both slopes corrects it."""
    for s, t in pairwise(times.unbind()):
        eps, _ = evaluate(z, s)
        slope = ode_slope(evaluate.schedule, s, z, eps)
        ahead = z + (t - s) * slope
        if euler_last and t == times[-1]:
            return ahead
        eps, _ = evaluate(ahead, t)
        z = z + 0.5 * (t - s) * (slope + ode_slope(evaluate.schedule, t, ahead, eps))
    return z


def heun(
    model: Model, z: Tensor, schedule: NoiseSchedule, times: Tensor, *, callback: Callback | None = None
) -> Tensor:
    """Heun in t; a last step to time 0 is Euler's, for the slope has no value there."""
    check_times(times)
    return _trapezoid(Evaluator(model, schedule, callback), z, times, euler_last=bool(times[-1] == 0))


def mdm_paper(
    model: Model, z: Tensor, schedule: NoiseSchedule, times: Tensor, *, callback: Callback | None = None
) -> Tensor:
    """MDM's Algorithm 2 (Eq. 9 and 62): the trapezoid in t, two evaluations a step, and an Euler step to the
    last time, 1/1000.

    The rule is implicit (f at t - Delta needs z there), so an Euler step predicts that z. The slope is not
    the printed one: Eq. 55 is the forward SDE written as an ODE, Eq. 58-61 drop its -1/2 beta z, and Eq. 9
    and 62 differ in the sign of the step. Used here is the probability-flow ODE that the forward process has,
    dz/dt = -1/2 beta (z - eps / sigma).
    """
    check_times(times)
    return _trapezoid(Evaluator(model, schedule, callback), z, times, euler_last=True)


# ------------------------------------------------------------------------------------------------- DPM-Solver


def multistep(
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    order: int,
    predict_x0: bool = True,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver (++ with predict_x0) of order 1 to 3: one evaluation a step, derivatives from earlier ones.

    `solver_type` ("midpoint" or "heun") is how order 2 weighs its difference. Order 3 is the one in use
    everywhere (diffusers), whose `bend` is h^2 m'' / 2 where the Taylor term wants h^2 m'': its error falls
    with h^2, as order 2's does.
    """
    check_times(times)
    if solver_type not in SOLVER_TYPES:
        raise InputError(f"solver_type is {solver_type!r}, expected one of: {', '.join(SOLVER_TYPES)}")
    evaluate = Evaluator(model, schedule, callback)
    lam = [schedule.lam(t) for t in times]
    ms: list[Tensor] = []  # newest first
    for i, k in enumerate(multistep_orders(order, times, lower_order_final)):
        s, t = times[i], times[i + 1]
        eps, x0 = evaluate(z, s)
        ms = [x0 if predict_x0 else eps, *ms[:2]]
        if k == 1:
            z = ddim_step(schedule, t, eps, x0)
            continue
        h = lam[i + 1] - lam[i]
        d1 = mix((h / (lam[i] - lam[i - 1]), ms[0] - ms[1]))  # h m' between the last two points
        m: tuple[Tensor, ...]
        if k == 2:
            m = (ms[0] + 0.5 * d1,) if solver_type == "midpoint" else (ms[0], d1)
        else:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            bend = mix((1 / (r0 + r1), d1 - mix((1 / r1, ms[1] - ms[2]))))
            m = (ms[0], mix((torch.ones_like(r0), d1), (r0, bend)), bend)
        z = dpm_step(schedule, s, t, z, m, predict_x0)
    return z


def singlestep(
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    order: int,
    predict_x0: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver (++ with predict_x0) of order 1 to 3 in the "fast" form DiM uses: a step of order k spans k
    intervals of the grid and evaluates the model at its first k points, so evaluations = len(times) - 1.
    """
    check_times(times)
    evaluate = Evaluator(model, schedule, callback)
    step = partial(dpm_step, schedule, predict_x0=predict_x0)
    i = 0
    for k in singlestep_orders(order, times):
        s = times[i]
        lam = [schedule.lam(t) - schedule.lam(s) for t in times[i : i + k + 1]]  # counted from s
        eps, x0 = evaluate(z, s)
        m0 = x0 if predict_x0 else eps
        ahead = ddim_step(schedule, times[i + 1], eps, x0)
        if k >= 2:
            m1 = evaluate(ahead, times[i + 1])[predict_x0]  # of (eps, x0)
            rise = mix((lam[2] / lam[1], m1 - m0))  # h m' for the step to the second grid point
        if k == 2:
            ahead = step(s, times[i + 2], z, (m0 + 0.5 * rise,))
        elif k == 3:
            m2 = evaluate(step(s, times[i + 2], z, (m0, rise)), times[i + 2])[predict_x0]
            ahead = step(s, times[i + 3], z, (m0, mix((lam[3] / lam[2], m2 - m0))))
        z = ahead
        i += k
    return z


def singlestep_orders(order: int, times: Tensor) -> list[int]:
    """Whole steps of `order` and one for what is left: 50 evaluations at order 3 are 16 threes and a two.

    With 3n evaluations order 3 ends in a two and a one, as DiM's code does. A step to sigma 0 has order 1.
    """
    evaluations = len(times) - 1
    if order == 3 and evaluations % 3 == 0:
        orders = [3] * (evaluations // 3 - 1) + [2, 1]
    else:
        orders = [order] * (evaluations // order) + [evaluations % order] * (evaluations % order > 0)
    if times[-1] == 0 and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


# ---------------------------------------------------------------------------------------------------- by name

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "dim": partial(singlestep, order=3),  # with sample's default grid: DiM's exact setting
    "mdm-paper": mdm_paper,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm_1": partial(multistep, order=1, predict_x0=False),
    "dpm_2m": partial(multistep, order=2, predict_x0=False),
    "dpm_3m": partial(multistep, order=3, predict_x0=False),
    "dpm_2s": partial(singlestep, order=2, predict_x0=False),
    "dpm_3s": partial(singlestep, order=3, predict_x0=False),
    "dpmpp_1": partial(multistep, order=1),
    "dpmpp_2m": partial(multistep, order=2),
    "dpmpp_3m": partial(multistep, order=3),
    "dpmpp_2s": partial(singlestep, order=2),
    "dpmpp_3s": partial(singlestep, order=3),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "euler-maruyama": euler_maruyama,
}
STOCHASTIC = ("dpmpp_2m_sde", "euler-maruyama")  # these need the option `noise`


def sample(
    name: str,
    model: Model,
    z: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: str = "time_uniform",
    t_start: float = 1.0,
    t_end: float = 1e-3,
    final_zero: bool | None = None,
    **options: object,
) -> Tensor:
    """Build the time grid and run the solver of that name on it; `options` are the solver's own.

    final_zero None is as published: euler-maruyama ends at time 0, every other solver at t_end.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver '{name}'{nearest(name, SOLVERS)}\nsolvers: {', '.join(SOLVERS)}")
    if name in STOCHASTIC and "noise" not in options:
        raise InputError(
            f"solver '{name}' is stochastic: give it noise, a torch.Generator or a tensor [steps, *z.shape]"
        )
    zero = name == "euler-maruyama" if final_zero is None else final_zero
    times = time_grid(schedule, steps, spacing, t_start, t_end, zero)
    known = [p.name for p in inspect.signature(SOLVERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise InputError(
                f"solver '{name}' has no option '{option}'{nearest(option, known)}\noptions: {', '.join(known)}"
            )
    return SOLVERS[name](model, z, schedule, times, callback=options.pop("callback", None), **options)
