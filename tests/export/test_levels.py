"""alpha and sigma in the graph, float32, against the reference's schedules in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mdm.export.graph import Graph
from mdm.export.levels import levels_at
from mdm.reference.schedule import make_schedule

SPECS: dict[str, dict[str, Any]] = {
    **{f"cosine {shift:g}": {"kind": "cosine", "shift": shift} for shift in (0.1, 0.25, 1.0, 3.0, 10.0)},
    "cosine by itself": {"kind": "cosine"},
    "vp-linear": {"kind": "vp-linear"},
    "sd": {"kind": "sd"},
}
SAID = Callable[[dict[str, Any], np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def levels(blank_graph: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]) -> SAID:
    """alpha and sigma [B] that a graph of that schedule gives at network times [B]."""

    def run(spec: dict[str, Any], t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        g = blank_graph()
        for name, value in zip(("alpha", "sigma"), levels_at(g, spec, g.input("t", "float32", ["batch"])), strict=True):
            g.output(name, value, ["batch", 1, 1])
        alpha, sigma = run_graph(g, t=t)
        return alpha.squeeze((1, 2)).astype(np.float64), sigma.squeeze((1, 2)).astype(np.float64)

    return run


def truth(spec: dict[str, Any], t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    schedule = make_schedule(spec)
    time = torch.from_numpy(t.astype(np.float64)) / schedule.model_time(1.0)
    return schedule.alpha(time).numpy(), schedule.sigma(time).numpy()


def times_of(spec: dict[str, Any]) -> np.ndarray:
    """Whole times, which are sd's kinks and DiM's own, their neighbours in float32, and times between."""
    last = make_schedule(spec).model_time(1.0)
    whole = np.arange(1, last + 1, dtype=np.float32)
    between = np.random.default_rng(3).uniform(1, last, 2000).astype(np.float32)
    beside = np.concatenate([np.nextafter(whole, np.float32(0)), np.nextafter(whole, np.float32(2000))])
    times = np.concatenate([whole, between, beside])
    return times[times <= last]


EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
NEAR = 10.0  # network times from the end of a cosine, where alpha goes to 0 and its relative error without bound


@EVERY_SPEC
def test_levels_are_the_references(
    spec: dict[str, Any], levels: SAID, figure: Callable[[str, float, float], None], request: pytest.FixtureRequest
) -> None:
    t = times_of(spec)
    t = t[t <= 1000 - NEAR] if spec["kind"] == "cosine" else t
    for name, found, expected in zip(("alpha", "sigma"), levels(spec, t), truth(spec, t), strict=True):
        worst = np.abs(found / expected - 1).max()
        figure(f"{name} of {request.node.callspec.id}, relative", worst, 1e-5 if name == "alpha" else 1e-6)


@pytest.mark.parametrize("shift", [0.1, 1.0, 10.0])
def test_a_cosine_ends_without_signal(shift: float, levels: SAID, figure: Callable[[str, float, float], None]) -> None:
    """alpha stands beside terms of size 1 there, so its absolute error counts: float32's rounding of t pi / 2000."""
    spec = {"kind": "cosine", "shift": shift}
    t = np.linspace(1000 - NEAR, 1000, 500, dtype=np.float32)
    for name, found, expected in zip(("alpha", "sigma"), levels(spec, t), truth(spec, t), strict=True):
        figure(f"{name} of cosine {shift:g} at its end, absolute", np.abs(found - expected).max(), 2e-7 * max(shift, 1))


def test_sd_below_its_first_step(levels: SAID, figure: Callable[[str, float, float], None]) -> None:
    """Down to t = 1e-5, DiM's earliest. sigma is small there: a difference of two table entries, 2e-6 of 4e-4."""
    t = np.array([0.01, 0.1, 0.5, 0.9, 0.999], np.float32)
    for name, found, expected in zip(
        ("alpha", "sigma"), levels({"kind": "sd"}, t), truth({"kind": "sd"}, t), strict=True
    ):
        figure(f"{name} of sd below 1, relative", np.abs(found / expected - 1).max(), 1e-5)
