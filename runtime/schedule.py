"""Noise schedules in numpy: how much signal and how much noise a latent holds at time t in [0, 1].

Written from the papers' formulas and apart from the reference's torch code, so that comparing the two means
something. z_t = alpha z_0 + sigma eps with alpha^2 + sigma^2 = 1.

    lam = log(alpha / sigma), +inf at time 0, which is data
    beta = -2 d log(alpha) / dt, the rate of the forward process

All functions take floats or arrays and compute in float64. Two latents under two schedules (text and picture)
are two schedules here: `solver.py` takes a list.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import InputError
from mdm.runtime.words import nearest

Array = npt.NDArray[np.float64]
Value = float | Array

SPACINGS = ("time_uniform", "time_quadratic", "logsnr", "karras")
KARRAS_RHO = 7.0
ROUNDING = 1e-9  # a time that should lie on a threshold misses it by less


@dataclass(frozen=True)
class Schedule:
    """What all kinds share. Each one defines log_alpha, beta and time_of_lam."""

    kind: ClassVar[str]
    steps_per_unit: ClassVar[float]  # the network is given t times this

    def log_alpha(self, t: Value) -> Array:
        raise NotImplementedError

    def beta(self, t: Value) -> Array:
        raise NotImplementedError

    def time_of_lam(self, lam: Value) -> Array:
        raise NotImplementedError

    def alpha(self, t: Value) -> Array:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: Value) -> Array:
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Value) -> Array:
        with np.errstate(divide="ignore"):  # inf at time 0
            return self.log_alpha(t) - np.log(self.sigma(t))

    def model_time(self, t: Value) -> Value:
        return t * self.steps_per_unit

    def spec(self) -> dict[str, Any]:
        """The plain dict that `make_schedule` turns back into this schedule."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


# ------------------------------------------------------------------------------------------------------ kinds


@functools.cache
def sd_betas() -> Array:
    """Stable Diffusion's betas of its steps 1..1000. [1000]"""
    return np.square(np.linspace(math.sqrt(0.00085), math.sqrt(0.0120), 1000))


@functools.cache
def _sd_knots() -> tuple[Array, Array]:
    """t = k / 1000 and log alpha there, k = 0..1000. [1001] each

    1 - beta is computed in float32, as DiM does. The first segment is the second one continued: DiM's table
    starts at k = 1, and its line to 0 ends at 2e-6.
    """
    log_alpha = np.cumsum(np.log((1 - sd_betas().astype(np.float32)).astype(np.float64))) / 2
    return np.arange(1001) / 1000, np.concatenate([[2 * log_alpha[0] - log_alpha[1]], log_alpha])


class SdSchedule(Schedule):
    """DiM's latent models: Stable Diffusion's 1000 steps, log alpha piecewise linear between them."""

    kind: ClassVar[str] = "sd"
    steps_per_unit: ClassVar[float] = 1000.0

    def log_alpha(self, t: Value) -> Array:
        return np.minimum(np.interp(t, *_sd_knots()), 0)

    def beta(self, t: Value) -> Array:
        """Piecewise constant; at a knot the segment on the noisier side counts, whichever way t was rounded."""
        segment = np.floor(np.asarray(t) * 1000 + ROUNDING).astype(int)
        rates: Array = -2000 * np.diff(_sd_knots()[1])
        return rates[np.clip(segment, 0, 999)]

    def time_of_lam(self, lam: Value) -> Array:
        times, log_alpha = _sd_knots()
        return np.interp(-_log_alpha_of_lam(lam), -log_alpha, times)


class VpLinearSchedule(Schedule):
    """DiM-Small: beta = 0.1 + 19.9 t."""

    kind: ClassVar[str] = "vp-linear"
    steps_per_unit: ClassVar[float] = 999.0

    def log_alpha(self, t: Value) -> Array:
        return -np.asarray(t) / 2 * (0.1 + 19.9 / 2 * t)

    def beta(self, t: Value) -> Array:
        return 0.1 + 19.9 * np.asarray(t)

    def time_of_lam(self, lam: Value) -> Array:
        """The root of 19.9/2 t^2 + 0.1 t = x, divided out so that nothing cancels at small t."""
        x = -2 * _log_alpha_of_lam(lam)
        root: Array = np.sqrt(0.1**2 + 2 * 19.9 * x)
        return 2 * x / (0.1 + root)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """MDM: alpha / sigma = shift * cot(pi t / 2). A shift below 1 is more noise; all of it at t = 1."""

    kind: ClassVar[str] = "cosine"
    steps_per_unit: ClassVar[float] = 1000.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.shift, int | float) or not 0 < self.shift < math.inf:
            raise InputError(f"cosine schedule: 'shift' is {self.shift!r}, expected a number above 0")

    def lam(self, t: Value) -> Array:
        with np.errstate(divide="ignore"):  # inf at time 0
            value = math.log(self.shift) - np.log(np.tan(math.pi / 2 * t))
        return np.where(np.asarray(t) >= 1, -math.inf, value)[()]  # tan of the rounded pi/2 is only large

    def log_alpha(self, t: Value) -> Array:
        return _log_alpha_of_lam(self.lam(t))

    def beta(self, t: Value) -> Array:
        """d log(alpha) / d lam = sigma^2 and d lam / dt = -pi / sin(pi t), without its 0 / 0 at t = 0."""
        angle = math.pi / 2 * np.asarray(t)
        radius = np.hypot(np.sin(angle), self.shift * np.cos(angle))
        return math.pi * np.tan(angle) / np.square(radius)

    def time_of_lam(self, lam: Value) -> Array:
        return np.arctan2(self.shift, np.exp(lam)) / (math.pi / 2)


def _log_alpha_of_lam(lam: Value) -> Array:
    """alpha^2 = 1 / (1 + exp(-2 lam))."""
    return -np.logaddexp(0, -2 * np.asarray(lam)) / 2


# ---------------------------------------------------------------------------------------------------- by name

KINDS: dict[str, Callable[..., Schedule]] = {
    "sd": SdSchedule,
    "vp-linear": VpLinearSchedule,
    "cosine": CosineSchedule,
}


def make_schedule(spec: Mapping[str, Any] | str) -> Schedule:
    """A schedule from its name, or from a dict of its name ("kind") and fields."""
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("kind", None)
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(f"unknown schedule kind {name!r}{nearest(name, KINDS)}\nkinds: {', '.join(KINDS)}")
    fields = [field.name for field in dataclasses.fields(KINDS[name])]  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(f"schedule '{name}' has no field '{key}'{nearest(key, fields)}\nfields: {known}")
    return KINDS[name](**given)


# ------------------------------------------------------------------------------------------------- time grids


def time_grid(
    schedule: Schedule,
    steps: int,
    spacing: str = "time_uniform",
    t_start: float = 1.0,
    t_end: float = 1e-3,
    final_zero: bool = False,
) -> Array:
    """The times a solver walks, falling from t_start to t_end. float64 [steps+1]

    `final_zero` makes the last of the steps a jump from t_end to time 0.
    """
    if spacing not in SPACINGS:
        raise InputError(f"unknown spacing '{spacing}'{nearest(spacing, SPACINGS)}\nspacings: {', '.join(SPACINGS)}")
    if not isinstance(steps, int) or steps < 1 or not 0 <= t_end < t_start <= 1:
        raise InputError(
            f"time grid: {steps} steps from t = {t_start:g} to {t_end:g}\n"
            "expected at least 1 step and 0 <= t_end < t_start <= 1"
        )
    if not math.isfinite(schedule.lam(t_start)):
        raise InputError(
            f"time grid: at t_start = {t_start:g} the '{schedule.kind}' schedule is all noise (lambda -inf)\n"
            "start a little later, for example t_start = 0.997"
        )
    if not math.isfinite(schedule.lam(t_end)) and (final_zero or spacing in ("logsnr", "karras")):
        raise InputError(
            f"time grid: at t_end = {t_end:g} the '{schedule.kind}' schedule has no noise (lambda inf)\n"
            "give a t_end above 0, and final_zero for a last step to 0"
        )
    into, out_of = _measure(schedule, spacing)
    times = out_of(np.linspace(into(t_start), into(t_end), steps + (not final_zero)))
    times[-1], times[0] = t_end, t_start  # in this order: a single step with final_zero never sees t_end
    if final_zero:
        times = np.append(times, 0.0)
    if not (np.diff(times) < 0).all():
        raise InputError(f"time grid: {steps} steps from t = {t_start} to {t_end} lie too close to be told apart")
    return times


def _measure(schedule: Schedule, spacing: str) -> tuple[Callable[[Value], Value], Callable[[Array], Array]]:
    """The measure in which the steps are equal, and its inverse: t, sqrt(t), lam or (sigma/alpha)^(1/rho)."""
    if spacing == "time_uniform":
        return lambda t: t, lambda x: x
    if spacing == "time_quadratic":
        return np.sqrt, np.square
    if spacing == "logsnr":
        return schedule.lam, schedule.time_of_lam
    return (
        lambda t: np.exp(-schedule.lam(t) / KARRAS_RHO),
        lambda x: schedule.time_of_lam(-KARRAS_RHO * np.log(x)),
    )
