"""Noise schedules: how much signal and how much noise a latent holds at time t in [0, 1].

Forward process, variance preserving: z_t = alpha z_0 + sigma eps, alpha^2 + sigma^2 = 1, alpha_bar = alpha^2.
    lam = log(alpha / sigma), half the log of the signal-to-noise ratio; +inf at time 0, which is data
    beta = -2 d log(alpha) / dt, the rate of the SDE dz = -1/2 beta z dt + sqrt(beta) dw (MDM Eq. 55)
A schedule is continuous in t; `model_time(t)` is the number its network is given. Everything is
computed in the precision of t: give it float64. Kinds: "sd" (DiM's latent models), "vp-linear" (DiM-Small),
"cosine" (MDM), and "joint", one latent with a schedule for its text tokens and one for its image tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.config import nearest

Time = TypeVar("Time", float, Tensor)

SPACINGS = ("time_uniform", "time_quadratic", "logsnr", "karras")
KARRAS_RHO = 7.0


@dataclass(frozen=True)
class NoiseSchedule:
    """What all kinds share. A kind defines log_alpha, beta and time_of_lam; the rest follows."""

    kind: ClassVar[str]
    steps_per_unit: ClassVar[float]  # the network is given t times this

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def beta(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time_of_lam(self, lam: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t: Tensor) -> Tensor:
        return self.log_alpha(t) - self.sigma(t).log()

    def model_time(self, t: Time) -> Time:
        return t * self.steps_per_unit

    def spec(self) -> dict[str, Any]:
        """The plain dict that `make_schedule` turns back into this schedule."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


# ------------------------------------------------------------------------------------------------------ kinds


@functools.cache
def _sd_betas() -> Tensor:
    """The 1000 betas of Stable Diffusion, in float64. [1000]"""
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.0120), 1000, dtype=torch.float64) ** 2


@functools.cache
def sd_alpha_bar() -> Tensor:
    """alpha_bar after k = 0..1000 discrete steps: the table that upsample guidance indexes. [1001]"""
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - _sd_betas()).cumprod(0)])


@functools.cache
def _sd_log_alpha() -> Tensor:
    """log alpha at t = 1/1000, 2/1000, ..., 1. [1000]

    DiM computes 1 - beta in float32. That rounding moves lam by 4e-5 at t = 1/1000, so it is kept; what
    follows is float64.
    """
    return 0.5 * (1 - _sd_betas().float()).double().log().cumsum(0)


@dataclass(frozen=True)
class SdSchedule(NoiseSchedule):
    """DiM's latent models: Stable Diffusion's 1000 betas, log alpha piecewise linear between them."""

    kind: ClassVar[str] = "sd"
    steps_per_unit: ClassVar[float] = 1000.0  # 1..1000, not 0..999

    def log_alpha(self, t: Tensor) -> Tensor:
        table = _sd_log_alpha().to(t)
        k = self._segment(t)
        value = table[k] + (t * 1000 - 1 - k) * (table[k + 1] - table[k])
        return value.clamp(max=0)  # the extrapolation would give 2e-6 at t = 0

    def beta(self, t: Tensor) -> Tensor:
        """Piecewise constant; at a kink the segment on the noisier side counts."""
        table = _sd_log_alpha().to(t)
        k = self._segment(t)
        return -2000 * (table[k + 1] - table[k])

    def time_of_lam(self, lam: Tensor) -> Tensor:
        table = _sd_log_alpha().to(lam)
        log_alpha = _log_alpha_of_lam(lam)
        k = (torch.searchsorted(-table, -log_alpha) - 1).clamp(0, 998)
        return (1 + k + (log_alpha - table[k]) / (table[k + 1] - table[k])) / 1000

    @staticmethod
    def _segment(t: Tensor) -> Tensor:
        """Index of the table entry at or below t; the first and last segments extend outwards.

        A time that rounding has put just below an entry counts as that entry: beta jumps there.
        """
        return (t * 1000 - 1 + 1e-9).floor().clamp(0, 998).long()


@dataclass(frozen=True)
class VpLinearSchedule(NoiseSchedule):
    """DiM-Small (CIFAR): beta rises linearly from 0.1 to 20 over continuous time."""

    kind: ClassVar[str] = "vp-linear"
    steps_per_unit: ClassVar[float] = 999.0
    first: ClassVar[float] = 0.1
    rise: ClassVar[float] = 19.9

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * self.rise * t**2 - 0.5 * self.first * t

    def beta(self, t: Tensor) -> Tensor:
        return self.first + self.rise * t

    def time_of_lam(self, lam: Tensor) -> Tensor:
        x = -2 * _log_alpha_of_lam(lam)  # = rise t^2 / 2 + first t; its root in the form that cancels nothing
        return 2 * x / (self.first + (self.first**2 + 2 * self.rise * x).sqrt())


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """MDM: alpha / sigma = shift * cot(pi t / 2). A shift below 1 is more noise; alpha is 0 at t = 1."""

    kind: ClassVar[str] = "cosine"
    steps_per_unit: ClassVar[float] = 1000.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.shift, int | float) or not 0 < self.shift < math.inf:
            raise InputError(f"cosine schedule: 'shift' is {self.shift!r}, expected a number above 0")

    def log_alpha(self, t: Tensor) -> Tensor:
        value = -0.5 * torch.log1p((torch.tan(math.pi / 2 * t) / self.shift) ** 2)
        return torch.where(t >= 1, -math.inf, value)  # tan of the rounded pi/2 is large, not infinite

    def beta(self, t: Tensor) -> Tensor:
        angle = math.pi / 2 * t
        return math.pi * torch.tan(angle) / ((self.shift * torch.cos(angle)) ** 2 + torch.sin(angle) ** 2)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(self.shift * torch.exp(-lam))


def _log_alpha_of_lam(lam: Tensor) -> Tensor:
    """alpha^2 = sigmoid(2 lam)."""
    return -0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam)


@dataclass(frozen=True)
class JointSchedule(NoiseSchedule):
    """One latent z[B,L,d], two schedules (alpha_bar^g, MDM Eq. 1): its first tokens are text, the rest image.

    Takes a scalar t; alpha, sigma, lam and beta come as [L,1] and broadcast with z.
    """

    kind: ClassVar[str] = "joint"
    text: NoiseSchedule
    image: NoiseSchedule
    text_tokens: int
    image_tokens: int

    def __post_init__(self) -> None:
        for name in ("text_tokens", "image_tokens"):
            count = getattr(self, name)
            if type(count) is not int or count < 0:
                raise InputError(f"joint schedule: '{name}' is {count!r}, expected a whole number, 0 or more")
        if self.text.model_time(1.0) != self.image.model_time(1.0):
            raise InputError(
                f"joint schedule: text ({self.text.kind}) counts the network's time to "
                f"{self.text.model_time(1.0):g}, image ({self.image.kind}) {self.image.model_time(1.0):g}\n"
                "one network is given one time: choose kinds that agree"
            )

    def log_alpha(self, t: Tensor) -> Tensor:
        return self._tokens(self.text.log_alpha(t), self.image.log_alpha(t))

    def beta(self, t: Tensor) -> Tensor:
        return self._tokens(self.text.beta(t), self.image.beta(t))

    def model_time(self, t: Time) -> Time:
        return self.image.model_time(t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        raise InputError("joint schedule: text and image reach one lam at different times\nask its .text or .image")

    def spec(self) -> dict[str, Any]:
        counts = {"text_tokens": self.text_tokens, "image_tokens": self.image_tokens}
        return {"kind": self.kind, "text": self.text.spec(), "image": self.image.spec(), **counts}

    def _tokens(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text.expand(self.text_tokens, 1), image.expand(self.image_tokens, 1)])  # [L,1]


# ---------------------------------------------------------------------------------------------------- by name

KINDS: dict[str, Callable[..., NoiseSchedule]] = {
    kind.kind: kind for kind in (SdSchedule, VpLinearSchedule, CosineSchedule, JointSchedule)
}


def make_schedule(spec: Mapping[str, Any] | str) -> NoiseSchedule:
    """A schedule from its name, or from a dict of its name ("kind") and fields."""
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("kind", None)
    if name not in KINDS:
        raise InputError(f"unknown schedule kind {name!r}{nearest(str(name), KINDS)}\nkinds: {', '.join(KINDS)}")
    kind = KINDS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(f"schedule '{name}' has no field '{key}'{nearest(key, fields)}\nfields: {known}")
    for key, field in fields.items():
        if key not in given and field.default is dataclasses.MISSING:
            raise InputError(f"schedule '{name}': field '{key}' is missing")
    if name == JointSchedule.kind:
        given |= {"text": make_schedule(given["text"]), "image": make_schedule(given["image"])}
    return kind(**given)


# ------------------------------------------------------------------------------------------------- time grids


def time_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "time_uniform",
    t_start: float = 1.0,
    t_end: float = 1e-3,
    final_zero: bool = False,
) -> Tensor:
    """The times a solver walks, falling from t_start to t_end. float64 [steps+1]

    `final_zero` makes the last of the steps a jump from t_end to time 0, as Karras et al. and DiM-Small do.
    A joint schedule's grid follows its image schedule.
    """
    if spacing not in SPACINGS:
        raise InputError(f"unknown spacing '{spacing}'{nearest(spacing, SPACINGS)}\nspacings: {', '.join(SPACINGS)}")
    if steps < 1 or not 0 <= t_end < t_start <= 1:
        raise InputError(
            f"time grid: {steps} steps from t = {t_start:g} to {t_end:g}\n"
            "expected at least 1 step and 0 <= t_end < t_start <= 1"
        )
    ends = torch.tensor([t_start, t_end], dtype=torch.float64)
    first, last = (float(schedule.lam(t).min()) for t in ends)
    if not math.isfinite(first):
        raise InputError(
            f"time grid: at t_start = {t_start:g} the '{schedule.kind}' schedule is all noise (lambda -inf)\n"
            "start a little later, for example t_start = 0.997"
        )
    if not math.isfinite(last) and (final_zero or spacing in ("logsnr", "karras")):
        raise InputError(
            f"time grid: at t_end = {t_end:g} the '{schedule.kind}' schedule has no noise (lambda inf)\n"
            "give a t_end above 0, and final_zero for a last step to 0"
        )

    clock = schedule.image if isinstance(schedule, JointSchedule) else schedule
    part = torch.linspace(0, 1, steps if final_zero else steps + 1, dtype=torch.float64)  # 0 at t_start
    times = _spaced(clock, spacing, ends, part)
    times[-1] = t_end
    times[0] = t_start  # second: a single step with final_zero never sees t_end
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)]) if final_zero else times


def _spaced(clock: NoiseSchedule, spacing: str, ends: Tensor, part: Tensor) -> Tensor:
    """Equal steps in t, in sqrt(t), in lam, or in (sigma/alpha)^(1/7)."""

    def between(values: Tensor) -> Tensor:
        return values[0] + part * (values[1] - values[0])

    if spacing == "time_uniform":
        return between(ends)
    if spacing == "time_quadratic":
        return between(ends.sqrt()) ** 2
    if spacing == "logsnr":
        return clock.time_of_lam(between(clock.lam(ends)))
    ratio = between(torch.exp(-clock.lam(ends) / KARRAS_RHO)) ** KARRAS_RHO  # sigma / alpha
    return clock.time_of_lam(-ratio.log())
