"""Guidance: each function takes noise estimators (z, t) -> eps and returns another one.

Classifier-free guidance mixes an estimate with and one without the condition. Upsample guidance (DiM Eq. 4;
Hwang et al., arXiv 2404.01709) lets a model trained at low resolution set the structure of a larger picture.

Letters: m factor of upscaling, ab alpha_bar, SNR = ab / (1 - ab), D average pooling, U nearest upsampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.schedule import NoiseSchedule, SdSchedule, sd_alpha_bar
from mdm.reference.solver_steps import Model


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """eps = c + s (c - u): scale 0 is no guidance. Papers that write u + w (c - u) mean w = 1 + s."""
    return conditional + scale * (conditional - unconditional)


def classifier_free(conditional: Model, unconditional: Model, scale: float | Tensor) -> Model:
    """The guided estimate of two estimators. `scale` is a number, or a tensor that broadcasts with z."""
    return lambda z, t: guide(conditional(z, t), unconditional(z, t), scale)


def upsample_guidance(
    model: Model,
    low_model: Model,
    schedule: NoiseSchedule,
    *,
    factor: int,
    theta: float = 1.0,
    eta: float = 0.3,
) -> Model:
    """DiM Eq. 4: eps = eps_hi + w U[eps_lo / m - D[eps_hi]], w = theta for t >= 1 - eta and 0 after it.

    `model` sees z[B,C,H,W], `low_model` sees it pooled, [B,C,H/m,W/m]; both with their classifier-free
    guidance inside. DiM samples this with the eps-form of the solver: `dpm_3s`, 50 evaluations.
    """
    if not isinstance(schedule, SdSchedule):
        raise InputError(f"upsample guidance: the schedule is '{schedule.kind}', expected 'sd': it reads that table")

    def guided(z: Tensor, t: Tensor) -> Tensor:
        eps_hi = model(z, t)
        if t < 1 - eta:
            return eps_hi
        if z.ndim != 4 or z.shape[-2] % factor or z.shape[-1] % factor:
            raise InputError(
                f"upsample guidance: latent is {tuple(z.shape)}, expected [B,C,H,W] in multiples of {factor}"
            )
        power = pooled_power(t, factor).to(z)
        eps_lo = low_model(F.avg_pool2d(z, factor) / power.sqrt(), low_time(t, factor))
        correction = eps_lo / factor - F.avg_pool2d(eps_hi, factor)  # [B,C,H/m,W/m]
        return eps_hi + theta * F.interpolate(correction, scale_factor=factor, mode="nearest")

    return guided


def pooled_power(t: Tensor, factor: int) -> Tensor:
    """P_t = ab + (1 - ab) / m^2: pooling keeps the signal's variance and divides the noise's by m^2."""
    ab = _alpha_bar(t)
    return ab + (1 - ab) / factor**2


def low_time(t: Tensor, factor: int) -> Tensor:
    """tau, the time whose SNR is m^2 times that of t, and never later than t. float64 scalar

    As DiM finds it: the nearest of 1000 levels s_j = 0.999, 0.998, ..., 0.001, 1e-5; then tau = 1 - j / 999.
    """
    levels = torch.cat([torch.arange(999, 0, -1, dtype=torch.float32) / 1000, torch.tensor([1e-5])])
    ab = _alpha_bar(levels)
    target = _alpha_bar(t)
    j = (ab / (1 - ab) - factor**2 * target / (1 - target)).abs().argmin()
    return torch.minimum(1 - j.double() / 999, t.double())


def _alpha_bar(t: Tensor) -> Tensor:
    """The table's entry at floor(1000 t). DiM multiplies in float32: five levels then land one low."""
    return sd_alpha_bar()[(t.float() * 1000).long()]
