"""The schedules in numpy against the reference's in torch: the same numbers, names and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import schedule as reference
from mdm.runtime.schedule import KINDS, SPACINGS, Array, make_schedule, time_grid

Figure = Callable[[str, float, float], None]
SPECS: list[dict[str, Any]] = [
    {"kind": "sd"},
    {"kind": "vp-linear"},
    {"kind": "cosine", "shift": 1.0},
    {"kind": "cosine", "shift": 0.25},
    {"kind": "cosine", "shift": 3.0},
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
# Both ends, both sides of 1/1000 (where the sd table starts), and times off the sd table's knots: at a knot, beta
# has two values.
INNER = np.concatenate([[1e-4, 9e-4, 1e-3 + 1e-6, 2e-3 - 1e-6], (np.arange(1, 999) + 0.37) / 1000, [1 - 1e-9]])


def worst(ours: Any, theirs: torch.Tensor) -> float:
    """Largest difference, relative to each value where that is above 1e-3 and to 1e-3 where it is below."""
    expected = theirs.numpy()
    return float((np.abs(ours - expected) / np.maximum(np.abs(expected), 1e-3)).max())


@each_spec
def test_every_function_is_the_references(spec: dict[str, Any], figure: Figure) -> None:
    ours, theirs = make_schedule(spec), reference.make_schedule(spec)
    t = torch.from_numpy(INNER)
    differences = [
        worst(getattr(ours, name)(INNER), getattr(theirs, name)(t))
        for name in ("log_alpha", "alpha", "sigma", "lam", "beta", "model_time")
    ]
    lam = theirs.lam(t)
    differences.append(worst(ours.time_of_lam(lam.numpy()), theirs.time_of_lam(lam)))
    figure(f"schedule {ours.spec()}", max(differences), 1e-12)


@each_spec
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_both_ends_are_the_references(spec: dict[str, Any], t: float) -> None:
    ours, theirs = make_schedule(spec), reference.make_schedule(spec)
    names = ["log_alpha", "alpha", "sigma", "lam", "model_time"]
    if spec["kind"] != "cosine" or t == 0:  # no noise is added to noise: beta is infinite at the cosine's end
        names.append("beta")
    for name in names:
        expected = float(getattr(theirs, name)(torch.tensor(t, dtype=torch.float64)))
        assert float(getattr(ours, name)(t)) == pytest.approx(expected, rel=1e-12, abs=1e-15), name


def test_small_alphas_keep_their_digits() -> None:
    """Far out, where the signal is a millionth, every digit of it still counts: x0 divides by alpha."""
    spec = {"kind": "cosine", "shift": 0.01}
    t = 1 - np.array([1e-3, 1e-5, 1e-8])
    ours, theirs = make_schedule(spec).alpha(t), reference.make_schedule(spec).alpha(torch.from_numpy(t))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


def test_beta_on_a_knot_is_the_noisier_side_however_the_time_was_rounded() -> None:
    """sd's beta jumps there by up to 0.5%: an ulp of the time must not decide."""
    sd = make_schedule("sd")
    knots = np.arange(1, 1000) / 1000
    for t in (knots, np.nextafter(knots, 0), np.nextafter(knots, 1)):
        assert np.array_equal(sd.beta(t), sd.beta(knots + 1e-5))
    assert (np.diff(sd.beta(knots)) > 0).all()


@each_spec
def test_floats_and_arrays_give_the_same(spec: dict[str, Any]) -> None:
    schedule = make_schedule(spec)
    for name in ("log_alpha", "alpha", "sigma", "lam", "beta", "model_time"):
        function: Callable[[Any], Array] = getattr(schedule, name)
        assert function(0.3) == function(np.array([[0.3]]))[0, 0], name
    assert schedule.time_of_lam(0.3) == schedule.time_of_lam(np.array([0.3]))[0]


@each_spec
def test_json_round_trip(spec: dict[str, Any]) -> None:
    schedule = make_schedule(spec)
    assert schedule.spec() == reference.make_schedule(spec).spec() == spec
    assert make_schedule(json.loads(json.dumps(schedule.spec()))) == schedule


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_enough(kind: str) -> None:
    assert make_schedule(kind).spec() == reference.make_schedule(kind).spec()


@each_spec
def test_time_grids_are_the_references(spec: dict[str, Any], figure: Figure) -> None:
    ours, theirs = make_schedule(spec), reference.make_schedule(spec)
    differences = []
    for spacing in SPACINGS:
        for steps in (1, 2, 3, 20, 1000):
            for t_start, t_end, zero in ((0.997, 1e-3, False), (0.99, 2e-2, True), (0.5, 1e-4, False)):
                arguments = (steps, spacing, t_start, t_end, zero)
                times = time_grid(ours, *arguments)
                assert times.shape == (steps + 1,)
                differences.append(worst(times, reference.time_grid(theirs, *arguments)))
                assert times[0] == t_start
                assert times[-1] == (0 if zero else t_end)
    figure(f"time grids of {spec}", max(differences), 1e-12)


def test_spacings_are_the_references() -> None:
    assert SPACINGS == reference.SPACINGS


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("sd", {"spacing": "logsn"}),
        ("sd", {"steps": 0}),
        ("sd", {"t_start": 1e-3}),
        ("sd", {"t_start": math.nan}),
        ("sd", {"t_end": -0.1}),
        ("sd", {"t_start": 1.5}),
        ("cosine", {}),  # all noise at t = 1
        ("vp-linear", {"t_end": 0.0, "spacing": "karras"}),
        ("vp-linear", {"t_end": 0.0, "final_zero": True}),
    ],
)
def test_wrong_grids_are_told_in_the_references_words(spec: str, options: dict[str, Any]) -> None:
    arguments = {"steps": 5, **options}
    with pytest.raises(InputError) as theirs:
        reference.time_grid(reference.make_schedule(spec), **arguments)
    with pytest.raises(InputError) as ours:
        time_grid(make_schedule(spec), **arguments)
    assert str(ours.value) == str(theirs.value)


def test_a_grid_that_cannot_fall_is_an_error() -> None:
    with pytest.raises(InputError, match="too close"):
        time_grid(make_schedule("sd"), 50, t_start=0.5, t_end=0.5 - 1e-15)
    with pytest.raises(InputError, match=r"2\.5 steps"):
        time_grid(make_schedule("sd"), 2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "cosine", "shfit": 1},
        {"kind": "sd", "shift": 1},
        {"kind": "cosine", "shift": -1},
        {"kind": "cosine", "shift": "1"},
        {"kind": "cosine", "shift": math.inf},
    ],
)
def test_wrong_specs_are_told_in_the_references_words(spec: dict[str, Any]) -> None:
    with pytest.raises(InputError) as theirs:
        reference.make_schedule(spec)
    with pytest.raises(InputError) as ours:
        make_schedule(spec)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("spec", ["cosin", {}, {"kind": 3}])
def test_an_unknown_kind_is_told_plainly(spec: Any) -> None:
    """The reference's list has "joint" too; two modalities are two schedules here."""
    with pytest.raises(InputError, match=r"unknown schedule kind .*\nkinds: sd, vp-linear, cosine$") as error:
        make_schedule(spec)
    assert "did you mean 'cosine'?" in str(error.value) or spec != "cosin"
