"""Noise schedules: DiM's published numbers, identities every kind must keep, JSON round trip, time grids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.schedule import SPACINGS, JointSchedule, NoiseSchedule, make_schedule, time_grid

ORACLE = Path(__file__).parent.parent / "data" / "dim-tiny-lateral" / "schedule.safetensors"
SPECS: list[dict[str, Any]] = [{"kind": "sd"}, {"kind": "vp-linear"}, {"kind": "cosine", "shift": 0.35}]
JOINT: dict[str, Any] = {
    "kind": "joint",
    "text": SPECS[2],
    "image": SPECS[0],
    "text_tokens": 2,
    "image_tokens": 3,
}
each_kind = pytest.mark.parametrize("schedule", [make_schedule(spec) for spec in SPECS], ids=lambda s: s.kind)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_sd_is_the_schedule_dim_was_trained_with(figure: Callable[[str, float, float], None]) -> None:
    """The oracle is DiM's own table, in float32; t is its sampler's grid and some times off the table."""
    oracle = load_file(ORACLE)
    schedule = make_schedule("sd")
    t = oracle["t"].double()
    measured = {
        "log_alpha": schedule.log_alpha(t),
        "sigma": schedule.sigma(t),
        "lambda": schedule.lam(t),
        "inv_lambda_of_lambda": schedule.time_of_lam(oracle["lambda"].double()),
    }
    for name, value in measured.items():
        error = float((value - oracle[name].double()).abs().max())
        figure(f"dim oracle: schedule, {name}", error, 1e-6)
    assert schedule.model_time(1.0) == 1000


def test_vp_linear_is_its_integral() -> None:
    """log alpha = -1/2 integral of beta, here by the midpoint rule, exact for a straight line."""
    schedule = make_schedule("vp-linear")
    middles = (torch.arange(700, dtype=torch.float64) + 0.5) / 1000
    assert float(schedule.log_alpha(f64(0.7))) == pytest.approx(-0.5 * float(schedule.beta(middles).sum()) / 1000)
    assert float(schedule.beta(f64(0.0))) == pytest.approx(0.1)
    assert float(schedule.beta(f64(1.0))) == pytest.approx(20)
    assert schedule.model_time(1.0) == 999


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_cosine_is_the_shifted_sigmoid(shift: float) -> None:
    """alpha_bar = sigmoid(2 log(shift / tan(pi t / 2))); shift 1 is alpha = cos(pi t / 2)."""
    schedule = make_schedule({"kind": "cosine", "shift": shift})
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = torch.sigmoid(2 * (shift / torch.tan(math.pi / 2 * t)).log())
    torch.testing.assert_close(schedule.alpha(t) ** 2, expected, rtol=1e-13, atol=0)
    if shift == 1:
        torch.testing.assert_close(schedule.alpha(t), torch.cos(math.pi / 2 * t))
    assert float(schedule.alpha(f64(1.0))) == 0


@each_kind
def test_identities(schedule: NoiseSchedule) -> None:
    t = (torch.arange(1, 990, dtype=torch.float64) + 0.5) / 1000  # between the kinks of "sd"
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(schedule.lam(t), (alpha / sigma).log())
    difference = (schedule.log_alpha(t + 1e-6) - schedule.log_alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.beta(t), -2 * difference, rtol=1e-6, atol=1e-6)
    assert bool((schedule.lam(t)[1:] < schedule.lam(t)[:-1]).all())
    zero = f64(0.0)
    assert (float(schedule.alpha(zero)), float(schedule.sigma(zero)), float(schedule.lam(zero))) == (
        1,
        0,
        math.inf,
    )


@each_kind
@given(t=st.floats(5e-4, 0.999))
def test_lambda_and_time_are_inverse(schedule: NoiseSchedule, t: float) -> None:
    assert float(schedule.time_of_lam(schedule.lam(f64(t)))) == pytest.approx(t, abs=1e-11)


@pytest.mark.parametrize("spec", [*SPECS, JOINT], ids=lambda spec: spec["kind"])
def test_json_round_trip(spec: dict[str, Any]) -> None:
    schedule = make_schedule(spec)
    assert schedule.spec() == spec
    assert make_schedule(json.loads(json.dumps(schedule.spec()))) == schedule


def test_joint_gives_each_token_its_own() -> None:
    schedule = make_schedule(JOINT)
    assert isinstance(schedule, JointSchedule)
    t = f64(0.4)
    for name in ("alpha", "sigma", "lam", "beta", "log_alpha"):
        value = getattr(schedule, name)(t)
        assert value.shape == (5, 1)
        assert torch.equal(value[:2, 0], getattr(schedule.text, name)(t).expand(2))
        assert torch.equal(value[2:, 0], getattr(schedule.image, name)(t).expand(3))
    assert schedule.model_time(0.4) == 400


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", r"unknown schedule kind 'cosin'; did you mean 'cosine'\?"),
        ({}, "unknown schedule kind None"),
        ({"kind": "cosine", "shfit": 1}, r"no field 'shfit'; did you mean 'shift'\?"),
        ({"kind": "sd", "shift": 1}, "no field 'shift'\nfields: none"),
        ({"kind": "cosine", "shift": -1}, "'shift' is -1, expected a number above 0"),
        ({"kind": "cosine", "shift": "1"}, "'shift' is '1'"),
        ({"kind": "joint", "text": "cosine"}, "field 'image' is missing"),
        (JOINT | {"text_tokens": -1}, "'text_tokens' is -1, expected a whole number"),
        (
            JOINT | {"image": "vp-linear"},
            "text \\(cosine\\) counts the network's time to 1000, image \\(vp-linear\\) 999",
        ),
        (JOINT | {"image": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_a_wrong_spec_is_told_plainly(spec: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_schedule(spec)
    assert str(error.value).count("\n") < 3


# ------------------------------------------------------------------------------------------------- time grids


@each_kind
@pytest.mark.parametrize("final_zero", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_fall_evenly_in_their_own_measure(spacing: str, final_zero: bool, schedule: NoiseSchedule) -> None:
    times = time_grid(schedule, 12, spacing, t_start=0.99, t_end=2e-3, final_zero=final_zero)
    assert times.shape == (13,)
    assert times.dtype == torch.float64
    assert float(times[0]) == 0.99
    assert bool((times[1:] < times[:-1]).all())
    if final_zero:
        assert float(times[-1]) == 0
        times = times[:-1]
    assert float(times[-1]) == 2e-3
    measure = {
        "time_uniform": times,
        "time_quadratic": times.sqrt(),
        "logsnr": schedule.lam(times),
        "karras": (schedule.sigma(times) / schedule.alpha(times)) ** (1 / 7),
    }[spacing]
    steps = measure.diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-8, atol=1e-10)


def test_the_grids_of_dim() -> None:
    published = torch.linspace(1, 1e-3, 51, dtype=torch.float64)
    torch.testing.assert_close(time_grid(make_schedule("sd"), 50), published, rtol=0, atol=1e-15)


def test_a_joint_grid_follows_its_image() -> None:
    joint = make_schedule(JOINT)
    assert torch.equal(time_grid(joint, 9, "karras", 0.99), time_grid(make_schedule(JOINT["image"]), 9, "karras", 0.99))


def test_one_step() -> None:
    assert time_grid(make_schedule("sd"), 1).tolist() == [1.0, 1e-3]
    assert time_grid(make_schedule("sd"), 1, final_zero=True).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": "karas"}, r"unknown spacing 'karas'; did you mean 'karras'\?"),
        ({"steps": 0}, "at least 1 step"),
        ({"t_start": 0.1, "t_end": 0.5}, "0 <= t_end < t_start <= 1"),
        ({"t_start": 1.0}, "all noise .*\n.*t_start = 0.997"),
        ({"t_end": 0.0, "spacing": "logsnr"}, "no noise .*\n.*t_end above 0"),
        ({"t_end": 0.0, "final_zero": True}, "no noise"),
    ],
)
def test_an_impossible_grid_is_told_plainly(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        time_grid(make_schedule("cosine"), **{"steps": 5, "t_start": 0.997, **arguments})
