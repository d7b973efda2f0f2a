"""The solvers, run on symbols: each walks a time grid once and leaves a table of coefficients behind.

A tensor is written as its coefficients over (base, h0, h1, h2, noise), an array [5, m] for m schedules. BASE,
HISTORY and NOISE are the unit vectors, so the rules below read like the algorithms. A rule evaluates the network
at `point`, which stores m = p * point + q * eps in a history slot, and then either looks ahead from the same base
or takes a step, which makes a new base.

Letters: s and t are the points of the grid where a step starts and ends; x0 = (z - sigma eps) / alpha.
The slots are used in turn. No solver here looks back further than three evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.schedule import Array, Schedule
from mdm.runtime.words import nearest

BASE, *HISTORY, NOISE = np.eye(5)[:, :, None]  # [5,1] each
FEW_STEPS = 15  # below it multistep solvers lower their order at the end, as diffusers does

# The columns of a row that a rule fills.
T, ALPHA, SIGMA, P, Q = range(5)
SLOT, NEXT_BASE, NEXT_POINT, FIRST, UPSAMPLE = 5, slice(8, 13), slice(13, 18), 18, slice(19, 22)
WIDTH = 22


class At(NamedTuple):
    """One time of the grid. The arrays hold a number for each schedule, [m]."""

    time: float
    model_time: float
    alpha: Array
    sigma: Array
    lam: Array
    beta: Array


def grid_points(schedules: Sequence[Schedule], times: Array) -> list[At]:
    each = [(s.alpha(times), s.sigma(times), s.lam(times), s.beta(times)) for s in schedules]
    model_times = np.asarray(schedules[0].model_time(times))
    columns = np.moveaxis(np.array(each), 2, 0)  # [m,4,N] to [N,m,4]
    return [At(float(t), float(n), *c.T) for t, n, c in zip(times, model_times, columns, strict=True)]


@dataclass
class Walk:
    """A grid, and the rows that a rule has written on its way along it."""

    grid: list[At]
    rows: list[Array] = field(default_factory=list)  # [22,m] each
    times: list[float] = field(default_factory=list)  # where each row evaluates the network

    @property
    def to_zero(self) -> bool:
        """The last time has no noise: slopes and higher orders have no value there."""
        return bool((self.grid[-1].sigma == 0).any())

    def evaluate(self, at: At, p: Array, q: Array) -> Array:
        """Evaluate the network at `point` and time `at`. Returns m = p * point + q * eps."""
        slot = len(self.rows) % 3
        row = np.zeros((WIDTH, len(at.alpha)))
        row[T], row[ALPHA], row[SIGMA], row[P], row[Q] = at.model_time, at.alpha, at.sigma, p, q
        row[SLOT + slot] = 1
        row[FIRST] = not self.rows
        self.rows.append(row)
        self.times.append(at.time)
        return HISTORY[slot]

    def look(self, point: Array) -> None:
        """The next evaluation is at `point`, the base stays."""
        self.rows[-1][NEXT_BASE], self.rows[-1][NEXT_POINT] = BASE, point

    def step(self, z: Array) -> None:
        """z is the next base, and the next point."""
        self.rows[-1][NEXT_BASE] = self.rows[-1][NEXT_POINT] = z


def choose(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise InputError(f"{option} is {value!r}{nearest(value, map(str, choices))}\nexpected one of: {expected}")


# ------------------------------------------------------------------------------------------ steps in time t


def evaluate_slope(walk: Walk, at: At) -> Array:
    """dz/dt = -beta/2 (z - eps / sigma), of the probability-flow ODE."""
    return walk.evaluate(at, -at.beta / 2, at.beta / (2 * at.sigma))


def euler(walk: Walk) -> None:
    for s, t in pairwise(walk.grid):
        walk.step(BASE + (t.time - s.time) * evaluate_slope(walk, s))


def trapezoid(walk: Walk, euler_last: bool) -> None:
    """Euler predicts z at t, the mean of both slopes corrects it. The slope has no value at sigma 0."""
    for s, t in pairwise(walk.grid):
        h = t.time - s.time
        slope = evaluate_slope(walk, s)
        if t is walk.grid[-1] and (euler_last or walk.to_zero):
            walk.step(BASE + h * slope)
        else:
            walk.look(BASE + h * slope)
            walk.step(BASE + h / 2 * (slope + evaluate_slope(walk, t)))


def heun(walk: Walk) -> None:
    trapezoid(walk, euler_last=False)


def mdm_paper(walk: Walk) -> None:
    """Algorithm 2 of MDM, made explicit; it ends with an Euler step."""
    trapezoid(walk, euler_last=True)


def euler_maruyama(walk: Walk) -> None:
    """Euler on the reverse SDE dz = (-beta/2 z + beta eps / sigma) dt + sqrt(beta) dw; no noise in the last step."""
    for s, t in pairwise(walk.grid):
        h = t.time - s.time
        eps = walk.evaluate(s, np.zeros_like(s.alpha), np.ones_like(s.alpha))
        fresh = 0 if t is walk.grid[-1] else np.sqrt(-h * s.beta)
        walk.step((1 - h * s.beta / 2) * BASE + h * s.beta / s.sigma * eps + fresh * NOISE)


# ----------------------------------------------------------------------------------------------- DPM-Solver


class Node(NamedTuple):
    """A grid point as DPM-Solver sees it: d(z/a) = m d(b/a), exactly, with mu = log(b/a).

    m = eps: a = alpha, b = sigma (Lu et al. 2022). m = x0: a = sigma, b = alpha (DPM-Solver++).
    """

    at: At
    a: Array
    b: Array
    mu: Array
    p: Array
    q: Array


def nodes(walk: Walk, predict_x0: bool) -> list[Node]:
    if predict_x0:
        return [Node(g, g.sigma, g.alpha, g.lam, 1 / g.alpha, -g.sigma / g.alpha) for g in walk.grid]
    return [Node(g, g.alpha, g.sigma, -g.lam, 0 * g.alpha, 1 + 0 * g.alpha) for g in walk.grid]


def integrate(s: Node, t: Node, m: Array, rise: Array | None = None, bend: Array | None = None) -> Array:
    """z at t if m is the polynomial m + rise x + bend x^2 / 2 over the step, x = 0..1 in mu.

    a_t times the integrals of x^k / k! d(b/a): each follows from the one before by parts. The first has no mu in it
    and is finite at sigma 0 too.
    """
    keep = t.a / s.a
    weight = t.b - keep * s.b
    z = keep * BASE + weight * m
    if rise is not None:
        h = t.mu - s.mu
        weight = t.b - weight / h
        z = z + weight * rise
        if bend is not None:
            z = z + (t.b / 2 - weight / h) * bend
    return z


def multistep(walk: Walk, order: int, predict_x0: bool, solver_type: str, lower_order_final: bool) -> None:
    """One evaluation a step, the polynomial from earlier ones.

    `solver_type` is how order 2 weighs its difference. Order 3 is the one in use everywhere (diffusers), whose bend
    is half the Taylor term's.
    """
    choose("order", order, (1, 2, 3))
    choose("solver_type", solver_type, ("midpoint", "heun"))
    grid = nodes(walk, predict_x0)
    ms: list[Array] = []  # newest first
    for i, k in enumerate(multistep_orders(walk, order, lower_order_final)):
        s, t = grid[i : i + 2]
        ms = [walk.evaluate(s.at, s.p, s.q), *ms[:2]]
        if k == 1:
            walk.step(integrate(s, t, ms[0]))
            continue
        h = t.mu - s.mu
        r0 = (s.mu - grid[i - 1].mu) / h
        d0 = (ms[0] - ms[1]) / r0
        if k == 2:
            walk.step(integrate(s, t, ms[0] + d0 / 2) if solver_type == "midpoint" else integrate(s, t, ms[0], d0))
            continue
        r1 = (grid[i - 1].mu - grid[i - 2].mu) / h
        bend = (d0 - (ms[1] - ms[2]) / r1) / (r0 + r1)
        walk.step(integrate(s, t, ms[0], d0 + r0 * bend, bend))


def multistep_orders(walk: Walk, order: int, lower_order_final: bool) -> list[int]:
    """It rises as history fills, falls to 1 at the end of a short run, and is 1 to sigma 0."""
    steps = len(walk.grid) - 1
    short = lower_order_final and steps < FEW_STEPS
    orders = [min(order, i + 1, steps - i if short else order) for i in range(steps)]
    return [*orders[:-1], 1] if walk.to_zero else orders


def singlestep(walk: Walk, order: int, predict_x0: bool) -> None:
    """A step of order k spans k intervals of the grid and evaluates the network at its first k points."""
    choose("order", order, (1, 2, 3))
    grid = nodes(walk, predict_x0)
    for k in singlestep_orders(walk, order):
        s, *ahead = grid[: k + 1]
        grid = grid[k:]
        h = [t.mu - s.mu for t in ahead]
        m0 = walk.evaluate(s.at, s.p, s.q)
        z = integrate(s, ahead[0], m0)
        if k >= 2:
            walk.look(z)
            m1 = walk.evaluate(ahead[0].at, ahead[0].p, ahead[0].q)
            rise = h[1] / h[0] * (m1 - m0)
            z = integrate(s, ahead[1], m0 + rise / 2) if k == 2 else integrate(s, ahead[1], m0, rise)
        if k == 3:
            walk.look(z)
            m2 = walk.evaluate(ahead[1].at, ahead[1].p, ahead[1].q)
            z = integrate(s, ahead[2], m0, h[2] / h[1] * (m2 - m0))
        walk.step(z)


def singlestep_orders(walk: Walk, order: int) -> list[int]:
    """DiM's rule: 50 evaluations at order 3 are 16 threes and a two, 51 are 16 threes, a two and a one."""
    whole, rest = divmod(len(walk.grid) - 1, order)
    orders = [order] * whole + [rest] * (rest > 0)
    if order == 3 and rest == 0:
        orders[-1:] = [2, 1]
    if walk.to_zero and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def dpmpp_2m_sde(walk: Walk, order: int, lower_order_final: bool) -> None:
    """DPM-Solver++ 2M on the reverse SDE: a step forgets the square of what the ODE's would, and adds fresh noise."""
    choose("order", order, (1, 2))
    grid = nodes(walk, predict_x0=True)
    before = HISTORY[0]
    for i, k in enumerate(multistep_orders(walk, order, lower_order_final)):
        s, t = grid[i : i + 2]
        m = x0 = walk.evaluate(s.at, s.p, s.q)
        h = t.mu - s.mu
        if k == 2:
            m = x0 + h / (2 * (s.mu - grid[i - 1].mu)) * (x0 - before)
        forget = -np.expm1(-2 * h)
        walk.step(t.a / s.a * np.exp(-h) * BASE + t.b * forget * m + t.a * np.sqrt(forget) * NOISE)
        before = x0
