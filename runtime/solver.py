"""A sampler as a table: one row of numbers for each evaluation of the network, computed before the first one.

A step graph, or `run_table` below in ten lines of numpy, does with each row [m, 22]

    eps = network(point, t)
    m = p * point + q * eps;  history[k] = m where slot k is 1
    base' = base_base * base + sum of base_hk * history[k] + base_noise * noise;  point' likewise
    start: base = point = z, history = 0;  result: base

m counts the noise schedules, text first where there are two; each row then holds a set of numbers for either.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import InputError
from mdm.runtime import solver_rules as rules
from mdm.runtime.schedule import ROUNDING, Array, Schedule, sd_betas, time_grid
from mdm.runtime.words import nearest

PARTS = ("base", "h0", "h1", "h2", "noise")
ROW = (
    *("t", "alpha", "sigma", "p", "q", "slot0", "slot1", "slot2"),
    *(f"base_{part}" for part in PARTS),
    *(f"point_{part}" for part in PARTS),
    *("first", "w", "inv_sqrt_power", "tau"),
)


class Solver(NamedTuple):
    """A rule, and the options it takes with their defaults."""

    rule: Callable[..., None]
    options: dict[str, Any]


def _single(order: int, predict_x0: bool) -> Solver:
    return Solver(rules.singlestep, {"order": order, "predict_x0": predict_x0})


def _multi(order: int, predict_x0: bool) -> Solver:
    options = {"order": order, "predict_x0": predict_x0, "solver_type": "midpoint", "lower_order_final": True}
    return Solver(rules.multistep, options)


SOLVERS = {
    "dim": _single(3, True),
    "mdm-paper": Solver(rules.mdm_paper, {}),
    "ddim": Solver(partial(rules.singlestep, order=1, predict_x0=False), {}),
    "euler": Solver(rules.euler, {}),
    "heun": Solver(rules.heun, {}),
    "dpm_1": _multi(1, False),
    "dpm_2m": _multi(2, False),
    "dpm_3m": _multi(3, False),
    "dpm_2s": _single(2, False),
    "dpm_3s": _single(3, False),
    "dpmpp_1": _multi(1, True),
    "dpmpp_2m": _multi(2, True),
    "dpmpp_3m": _multi(3, True),
    "dpmpp_2s": _single(2, True),
    "dpmpp_3s": _single(3, True),
    "dpmpp_2m_sde": Solver(rules.dpmpp_2m_sde, {"order": 2, "lower_order_final": True}),
    "euler-maruyama": Solver(rules.euler_maruyama, {}),
}
STOCHASTIC = ("dpmpp_2m_sde", "euler-maruyama")  # these want noise, one tensor for each row
GRID = ("spacing", "t_start", "t_end", "final_zero")
UPSAMPLE = {"factor": None, "theta": 1.0, "eta": 0.3}


def solver_table(
    schedules: Sequence[Schedule],
    *,
    solver: str,
    steps: int,
    spacing: str = "time_uniform",
    t_start: float = 1.0,
    t_end: float = 1e-3,
    final_zero: bool | None = None,
    clock: int = -1,
    upsample: Mapping[str, Any] | None = None,
    **options: Any,
) -> Array:
    """The rows of a run. float64 [S, m, 22], columns as in ROW

    `clock` is the schedule that the time grid follows; `options` are the solver's own. `upsample` ("factor", "theta",
    "eta") fills the last three columns for DiM's upsample guidance. final_zero None is as published.
    """
    if len({schedule.steps_per_unit for schedule in schedules}) != 1:
        found = ", ".join(f"{s.kind} counts to {s.steps_per_unit:g}" for s in schedules) or "none"
        raise InputError(f"solver table: one network is given one time, but of the schedules\n{found}")
    chosen = _solver(solver)
    _known(f"solver '{solver}'", options, chosen.options)
    zero = final_zero_of(solver, final_zero)
    times = [time_grid(schedule, steps, spacing, t_start, t_end, zero) for schedule in schedules][clock]
    with np.errstate(all="ignore"):  # what comes of it is checked below
        walk = rules.Walk(rules.grid_points(schedules, times))
        chosen.rule(walk, **chosen.options | options)
        rows = np.stack(walk.rows).transpose(0, 2, 1)
        if upsample is not None:
            rows[:, :, rules.UPSAMPLE] = _upsample_columns(schedules, walk.times, upsample)
    if not np.isfinite(rows).all():
        worst = walk.times[int(np.argmin(np.isfinite(rows).all((1, 2))))]
        raise InputError(f"solver table: '{solver}' has no finite coefficients at t = {worst:g} of this schedule")
    return rows


def final_zero_of(solver: str, asked: bool | None) -> bool:
    """As published, euler-maruyama ends at time 0 and every other solver at t_end."""
    return solver == "euler-maruyama" if asked is None else asked


def _solver(name: str) -> Solver:
    if name not in SOLVERS:
        raise InputError(f"unknown solver '{name}'{nearest(name, SOLVERS)}\nsolvers: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def copy_row(modalities: int) -> Array:
    """A row that leaves base as it is and makes point the same, for a slot without a sample. float64 [m,22]"""
    values = {"t": 1.0, "alpha": 1.0, "sigma": 1.0, "base_base": 1.0, "point_base": 1.0}
    return np.tile([values.get(column, 0.0) for column in ROW], (modalities, 1))


def _known(what: str, given: Iterable[str], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            names = ", ".join(known) or "none"
            raise InputError(f"{what} has no option '{key}'{nearest(key, known)}\noptions: {names}")


def sampler_of(config: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
    """The sampler a model is meant to be used with for a task, every field pinned."""
    return pinned({**config["sampler"], **config.get("sampler_for", {}).get(task, {})}, "config key 'sampler'")


def pinned(settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """These settings of a sampler and the defaults of all others; `what` has them, in errors.

    But for "guidance", the fields are arguments of `solver_table`.
    """
    for key in ("solver", "steps"):
        if key not in settings:
            raise InputError(f"{what} has no '{key}', found: {', '.join(settings)}")
    solver = _solver(settings["solver"])
    arguments = inspect.signature(solver_table).parameters
    defaults = {"guidance": 0.0} | {key: arguments[key].default for key in GRID} | solver.options
    _known(f"{what}: solver '{settings['solver']}'", settings, ["solver", "steps", *defaults])
    sampler = {"solver": None, "steps": None, **defaults, **settings}
    if not math.isfinite(sampler["guidance"]):
        raise InputError(f"guidance is {sampler['guidance']}, expected a finite number")
    return sampler | {"final_zero": final_zero_of(sampler["solver"], sampler["final_zero"])}


# -------------------------------------------------------------------------------------------- upsample guidance


def _upsample_columns(schedules: Sequence[Schedule], times: list[float], upsample: Mapping[str, Any]) -> Array:
    """w, 1/sqrt(P) and tau of each time; zeros once w is. DiM Eq. 4. [S,1,3]

    P = ab + (1 - ab) / m^2 is a pooled latent's power, and tau the nearest of DiM's 1000 levels to the time whose
    signal-to-noise ratio is m^2 times that of t, never later than t.
    """
    kinds = [schedule.kind for schedule in schedules]
    if kinds != ["sd"]:
        raise InputError(f"upsample guidance: the schedule is '{', '.join(kinds)}', expected 'sd': it reads that table")
    _known("upsample guidance", upsample, UPSAMPLE)
    factor, theta, eta = (UPSAMPLE | dict(upsample)).values()
    if not isinstance(factor, int) or factor < 1:
        raise InputError(f"upsample guidance: 'factor' is {factor!r}, expected a whole number above 0")

    alpha_bar = np.append(1.0, np.cumprod(1 - sd_betas()))
    snr = alpha_bar / (1 - alpha_bar)  # inf at index 0
    t = np.asarray(times)
    here = _table_index(t)
    levels = np.append(np.arange(999, 0, -1, dtype=np.float32) / 1000, 1e-5)
    gaps = np.abs(snr[_table_index(levels)] - factor**2 * snr[here][:, None])  # [S,1000]
    tau = np.minimum(1 - gaps.argmin(1) / 999, t) * schedules[0].model_time(1.0)
    power = alpha_bar[here] + (1 - alpha_bar[here]) / factor**2
    on = t >= 1 - eta - ROUNDING
    return np.where(on, [theta * np.ones_like(t), 1 / np.sqrt(power), tau], 0).T[:, None]


def _table_index(t: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """floor(1000 t) in float32, as DiM computes it: five of its levels land one low."""
    return (np.asarray(t, np.float32) * np.float32(1000)).astype(np.intp)


# -------------------------------------------------------------------------------------------- running a table


def run_table(
    rows: Array,
    network: Callable[[Any, Any], Any],
    z: npt.NDArray[Any],
    noise: npt.NDArray[Any] | None = None,
    tokens: Sequence[int] = (),
) -> npt.NDArray[Any]:
    """Walk z down a table, as every step graph does; to read when writing a host in another language.

    `network(point, t)` returns eps; `noise` [S, *z.shape] is wanted by the solvers in STOCHASTIC. With two schedules
    z is [..., L, d] and `tokens` (T, M) says that its first T tokens are text and the other M picture, L = T + M.
    """
    if noise is None and rows[:, :, [ROW.index("base_noise"), ROW.index("point_noise")]].any():
        raise InputError(f"this table's solver is stochastic: give it noise, an array {(len(rows), *z.shape)}")
    if noise is not None and noise.shape != (len(rows), *z.shape):
        raise InputError(f"noise has shape {noise.shape}, expected {(len(rows), *z.shape)} ([rows, *z.shape])")
    if len(tokens or [0]) != rows.shape[1]:
        raise InputError(f"tokens is {tuple(tokens)}, expected {rows.shape[1]} counts, one for each schedule")
    base = point = z
    history = [np.zeros_like(z)] * 3
    for i, row in enumerate(rows.astype(z.dtype)):  # [m,22]
        spread = np.repeat(row, tokens, axis=0).T[:, :, None] if tokens else row[0]  # [22,L,1] or [22]
        c = dict(zip(ROW, spread, strict=True))
        m = c["p"] * point + c["q"] * network(point, row[0, 0])
        history = [np.where(c[f"slot{k}"] == 1, m, h) for k, h in enumerate(history)]
        tensors = dict(zip(PARTS, (base, *history, 0 * z if noise is None else noise[i]), strict=True))
        base = sum(c[f"base_{part}"] * x for part, x in tensors.items())
        point = sum(c[f"point_{part}"] * x for part, x in tensors.items())
    return base
