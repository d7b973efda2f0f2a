"""Every solver's table, run by `run_table`, against the reference's sampler, in float64 and with a network that is
not linear: the two share no code, and a coefficient wrong in its fourth digit is seen.

Grids start at 0.9973 so that no time lies on a knot of the sd table, where the reference's beta is one of two
values as its time was rounded.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import config as presets
from mdm.reference import guidance, solvers
from mdm.reference import schedule as reference
from mdm.runtime.schedule import Array, make_schedule
from mdm.runtime.solver import ROW, SOLVERS, STOCHASTIC, run_table, sampler_of, solver_table

Figure = Callable[[str, float, float], None]
LIMIT = 1e-12  # relative to the largest value; rounding leaves up to 1e-13
SPECS: list[dict[str, Any]] = [{"kind": "sd"}, {"kind": "vp-linear"}, {"kind": "cosine", "shift": 0.35}]
STEPS = (1, 2, 3, 5, 10, 20)
GRIDS: list[dict[str, Any]] = [
    {},
    {"t_end": 0.02, "final_zero": True},
    {"spacing": "time_quadratic", "final_zero": False},
    {"spacing": "logsnr", "t_end": 5e-3},
    {"spacing": "karras", "t_end": 0.02, "final_zero": True},
    {"t_end": 0.0, "final_zero": False},
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SOLVERS),
    *((name, {"lower_order_final": False}) for name in ("dpm_2m", "dpmpp_3m", "dpmpp_2m_sde")),
    *((name, {"solver_type": "heun"}) for name in ("dpm_2m", "dpmpp_2m")),
    ("dpmpp_2m_sde", {"order": 1}),
    ("dpmpp_1", {"order": 3}),
    ("dim", {"order": 2, "predict_x0": False}),
]


def cases(specs: Sequence[Any]) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """Each spec with each number of steps, on two of the six grids, so that every pair of the three turns up."""
    for i, (spec, steps) in enumerate(itertools.product(specs, STEPS)):
        for j in (i + i // len(STEPS), i + i // len(STEPS) + 3):
            yield spec, steps, GRIDS[j % len(GRIDS)]


each_solver = pytest.mark.parametrize("solver", SOLVERS)


def network(z: Array, t: Any) -> Array:
    """Any smooth function that is not linear; t is the network's, up to 1000."""
    value: Array = np.tanh(1.3 * z + 0.002 * t) + 0.3 * np.cos(z)
    return value


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def difference(ours: Array, theirs: Array) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def sample(solver: str, schedule: reference.NoiseSchedule, z: Array, noise: Array, **options: Any) -> Array:
    """The reference's run."""

    def model(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(network(z.numpy(), float(schedule.model_time(t))))

    if solver in STOCHASTIC:
        options["noise"] = torch.from_numpy(noise)
    return solvers.sample(solver, model, torch.from_numpy(z), schedule, **options).numpy()


def run(rows: Array, solver: str, z: Array, noise: Array, tokens: tuple[int, ...] = ()) -> Array:
    return run_table(rows, network, z, noise if solver in STOCHASTIC else None, tokens)


@pytest.mark.parametrize(
    ("solver", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)
def test_a_table_computes_what_the_references_sampler_does(
    solver: str, options: dict[str, Any], figure: Figure
) -> None:
    z, worst = draw(3, 5), 0.0
    for spec, steps, grid in cases(SPECS):
        settings = {"solver": solver, "steps": steps, "t_start": 0.9973, **grid, **options}
        noise = draw(steps, 3, 5, seed=1)
        rows = solver_table([make_schedule(spec)], **settings)
        assert np.isfinite(rows).all()
        assert rows.dtype == np.float64
        theirs = sample(schedule=reference.make_schedule(spec), z=z, noise=noise, **settings)
        worst = max(worst, difference(run(rows, solver, z, noise), theirs))
    figure(f"table of {solver} {options or ''}", worst, LIMIT)


@each_solver
def test_every_number_of_steps(solver: str, figure: Figure) -> None:
    """1 to 50, each on one of the schedules and grids."""
    z, worst = draw(3, 5), 0.0
    for steps in range(1, 51):
        spec, grid = SPECS[steps % len(SPECS)], GRIDS[steps // len(SPECS) % len(GRIDS)]
        settings = {"solver": solver, "steps": steps, "t_start": 0.9973, **grid}
        noise = draw(steps, 3, 5, seed=1)
        theirs = sample(schedule=reference.make_schedule(spec), z=z, noise=noise, **settings)
        rows = solver_table([make_schedule(spec)], **settings)
        worst = max(worst, difference(run(rows, solver, z, noise), theirs))
    figure(f"table of {solver}, 1 to 50 steps", worst, LIMIT)


@each_solver
def test_two_schedules_are_the_references_joint_one(solver: str, figure: Figure) -> None:
    z, worst = draw(2, 8, 4), 0.0
    for (text, image), steps, grid in cases([(SPECS[2], SPECS[0])]):
        joint = reference.JointSchedule(reference.make_schedule(text), reference.make_schedule(image), 3, 5)
        settings = {"solver": solver, "steps": steps, "t_start": 0.9973, **grid}
        noise = draw(steps, 2, 8, 4, seed=1)
        rows = solver_table([make_schedule(text), make_schedule(image)], **settings)
        assert rows.shape[1:] == (2, len(ROW)) == (2, 22)
        ours = run(rows, solver, z, noise, tokens=(3, 5))
        worst = max(worst, difference(ours, sample(schedule=joint, z=z, noise=noise, **settings)))
    figure(f"table of {solver}, two schedules", worst, LIMIT)


def test_the_grid_follows_the_clock() -> None:
    text, image = make_schedule({"kind": "cosine", "shift": 0.3}), make_schedule("sd")
    settings: dict[str, Any] = {"solver": "dpmpp_2m", "steps": 6, "t_start": 0.99, "spacing": "logsnr"}
    by_text = solver_table([text, image], clock=0, **settings)
    assert np.array_equal(by_text[:, ::-1], solver_table([image, text], **settings))
    assert np.array_equal(by_text[:, 0], solver_table([text], **settings)[:, 0])
    assert not np.allclose(by_text, solver_table([text, image], **settings))


def test_the_published_samplers_start_at_pure_noise(figure: Figure) -> None:
    """Every preset's own sampler, unchanged but for fewer steps of the thousand, on its own schedule."""
    for name in presets.PRESETS:
        config = dataclasses.asdict(presets.load_config(name))
        settings = sampler_of(config, None)
        settings["steps"] = min(settings["steps"], 100)
        del settings["guidance"]
        noise, z = draw(settings["steps"], 3, 5, seed=1), draw(3, 5)
        rows = solver_table([make_schedule(config["schedule_image"])], **settings)
        theirs = sample(schedule=reference.make_schedule(config["schedule_image"]), z=z, noise=noise, **settings)
        figure(f"table of {name}'s own sampler", difference(run(rows, settings["solver"], z, noise), theirs), LIMIT)


# ------------------------------------------------------------------------------------------ what a row promises


@each_solver
def test_rows_keep_the_stages_promises(solver: str) -> None:
    schedule = make_schedule("vp-linear")
    for grid in GRIDS:
        rows = solver_table([schedule], solver=solver, steps=7, **grid)[:, 0]
        c = dict(zip(ROW, rows.T, strict=True))
        assert list(c["first"]) == [1] + [0] * (len(rows) - 1)
        slots = rows[:, [ROW.index(f"slot{k}") for k in range(3)]]
        assert (np.sort(slots, axis=1) == [0, 0, 1]).all()
        base = rows[:, [i for i, name in enumerate(ROW) if name.startswith("base_")]]
        point = rows[:, [i for i, name in enumerate(ROW) if name.startswith("point_")]]
        assert np.array_equal(base[-1], point[-1])
        inside = (base != point).any(axis=1)  # of a step of several stages: the base waits for its end
        assert (base[inside] == [1, 0, 0, 0, 0]).all()
        assert inside.any() == (solver in ("dim", "heun", "mdm-paper") or solver[-2:] in ("2s", "3s"))
        t = c["t"] / 999
        np.testing.assert_array_equal([c["alpha"], c["sigma"]], [schedule.alpha(t), schedule.sigma(t)])
        assert not rows[:, -3:].any()
        assert (c["base_noise"] != 0).any() == (solver in STOCHASTIC)


def test_nothing_is_read_before_it_is_written() -> None:
    for solver in SOLVERS:
        rows = solver_table([make_schedule("vp-linear")], solver=solver, steps=9)[:, 0]
        written = np.zeros(3)
        for row in rows:
            c = dict(zip(ROW, row, strict=True))
            written = np.maximum(written, [c["slot0"], c["slot1"], c["slot2"]])
            for k in range(3):
                assert written[k] or c[f"base_h{k}"] == c[f"point_h{k}"] == 0


def test_float32_latents_stay_float32() -> None:
    rows = solver_table([make_schedule("sd")], solver="dim", steps=5)
    z = draw(2, 3).astype(np.float32)

    def watch(z: Array, t: Any) -> Array:
        assert z.dtype == t.dtype == np.float32
        return network(z, t)

    ours = run_table(rows, watch, z)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, run_table(rows, network, z.astype(np.float64)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["dim", "dpm_3m", "heun", "euler-maruyama", "dpmpp_2m_sde"])
def test_a_coefficient_wrong_in_its_fourth_digit_is_seen(solver: str) -> None:
    """Each number of two rows in the middle, one after the other: a thousand times the limit at the least."""
    settings: dict[str, Any] = {"solver": solver, "steps": 20, "t_start": 0.9973}
    rows = solver_table([make_schedule("sd")], **settings)
    z, noise = draw(3, 5), draw(20, 3, 5, seed=1)
    right = sample(schedule=reference.make_schedule("sd"), z=z, noise=noise, **settings)
    used = [i for i, name in enumerate(ROW) if name in ("t", "p", "q") or name.startswith(("base_", "point_"))]
    planted = 0
    for i in (len(rows) // 2, len(rows) // 2 + 1):
        for j in (j for j in used if rows[i, 0, j]):
            wrong = rows.copy()
            wrong[i, 0, j] *= 1.0003
            assert difference(run(wrong, solver, z, noise), right) > 1000 * LIMIT, (i, ROW[j])
            planted += 1
    assert planted > 8


# ---------------------------------------------------------------------------------------------- upsample guidance


@pytest.mark.parametrize("factor", [2, 3])
def test_upsample_columns_are_the_references(factor: int, figure: Figure) -> None:
    """On DiM's own grid, on every table index and threshold, and below the table, where nothing but data is left."""
    schedule, worst = reference.make_schedule("sd"), 0.0
    grids: list[tuple[float, dict[str, Any]]] = [
        (0.3, {"steps": 50}),
        (0.3, {"steps": 999}),
        (1.0, {"steps": 20, "t_end": 5e-4, "final_zero": True}),
    ]
    for eta, grid in grids:
        upsample = {"factor": factor, "theta": 0.7, "eta": eta}
        rows = solver_table([make_schedule("sd")], solver="dpm_3s", upsample=upsample, **grid)
        w, inv_sqrt_power, tau = rows[:, 0, -3:].T
        times = reference.time_grid(schedule, **grid)[:-1]
        near = np.array([abs(float(t) - (1 - eta)) < 1e-9 for t in times])  # rounding decides in the reference
        assert near.sum() <= 1
        on = np.array([float(t) >= 1 - eta for t in times]) | near
        assert np.array_equal(w, 0.7 * on)
        assert not inv_sqrt_power[~on].any()
        assert not tau[~on].any()
        on_times = [t for t, is_on in zip(times, on, strict=True) if is_on]
        power = torch.stack([guidance.pooled_power(t, factor) for t in on_times])
        low = torch.stack([guidance.low_time(t, factor) for t in on_times])
        worst = max(worst, difference(inv_sqrt_power[on], (1 / power.sqrt()).numpy()))
        worst = max(worst, difference(tau[on], 1000 * low.numpy()))
    figure(f"upsample columns, factor {factor}", worst, 1e-14)


def test_upsample_guidance_is_off_unless_asked() -> None:
    schedule = make_schedule("sd")
    settings: dict[str, Any] = {"solver": "dpm_3s", "steps": 50}
    plain = solver_table([schedule], **settings)
    guided = solver_table([schedule], upsample={"factor": 2}, **settings)
    assert not plain[..., -3:].any()
    assert np.array_equal(plain[..., :-3], guided[..., :-3])
    assert list(guided[:, 0, ROW.index("w")]) == [1] * 16 + [0] * 34  # DiM's: 16 of 50 times lie at 0.7 or above


@pytest.mark.parametrize(
    ("schedules", "upsample", "message"),
    [
        (["cosine"], {"factor": 2}, "'cosine', expected 'sd'"),
        (["cosine", "sd"], {"factor": 2}, "'cosine, sd', expected 'sd'"),
        (["sd"], {"facto": 2}, "no option 'facto'; did you mean 'factor'"),
        (["sd"], {"theta": 1.0}, "'factor' is None, expected a whole number above 0"),
        (["sd"], {"factor": 0}, "'factor' is 0"),
    ],
)
def test_wrong_upsample_guidance_is_told_plainly(schedules: list[str], upsample: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solver_table([make_schedule(s) for s in schedules], solver="dim", steps=5, t_start=0.9, upsample=upsample)


# --------------------------------------------------------------------------------------------- names and defaults


def test_names_options_and_defaults_are_the_references() -> None:
    assert list(SOLVERS) == list(solvers.SOLVERS)
    assert STOCHASTIC == solvers.STOCHASTIC
    for name, function in solvers.SOLVERS.items():
        keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        expected = {p.name: p.default for p in keyword_only if p.name not in ("callback", "noise")}
        assert SOLVERS[name].options == expected, name
    ours, theirs = (inspect.signature(function).parameters for function in (solver_table, solvers.sample))
    for key in ("spacing", "t_start", "t_end", "final_zero"):
        assert ours[key].default == theirs[key].default


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("task", [None, "joint"])
def test_a_models_sampler_has_every_field_pinned(name: str, task: str | None) -> None:
    config = dataclasses.asdict(presets.load_config(name))
    sampler = sampler_of(config, task)
    asked = config["sampler"] | config["sampler_for"].get(task, {})
    assert asked.items() <= sampler.items()
    grid = {"spacing", "t_start", "t_end", "final_zero"}
    assert sampler.keys() == {"solver", "steps", "guidance"} | grid | SOLVERS[asked["solver"]].options.keys()
    assert sampler["final_zero"] is (name == "dim-small")
    assert None not in sampler.values()
    if name == "mdm-tiny":
        assert (sampler["solver"], sampler["steps"]) == (("dpmpp_2m_sde", 40) if task else ("dpmpp_2m", 20))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"steps": 5}, "'sampler' has no 'solver'"),
        ({"solver": "dim"}, "'sampler' has no 'steps', found: solver"),
        ({"solver": "dimm", "steps": 5}, "unknown solver 'dimm'; did you mean 'dim'"),
        ({"solver": "dim", "steps": 5, "spacin": "karras"}, "has no option 'spacin'; did you mean 'spacing'"),
        ({"solver": "euler", "steps": 5, "solver_type": "heun"}, "solver 'euler' has no option 'solver_type'"),
        ({"solver": "dim", "steps": 5, "guidance": math.inf}, "guidance is inf, expected a finite number"),
    ],
)
def test_a_wrong_sampler_is_told_plainly(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        sampler_of({"sampler": sampler})
    assert str(error.value).count("\n") < 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "dpmpp_2"}, "unknown solver 'dpmpp_2'; did you mean 'dpmpp_2s'"),
        ({"solver": "dpmpp_2m", "solver_typ": 1}, "no option 'solver_typ'; did you mean 'solver_type'"),
        ({"solver": "heun", "order": 1}, "solver 'heun' has no option 'order'\noptions: none"),
        ({"solver": "dpm_2m", "solver_type": "hein"}, "solver_type is 'hein'; did you mean 'heun'"),
        ({"solver": "dpm_2m", "order": 4}, "order is 4\nexpected one of: 1, 2, 3"),
        ({"solver": "dpmpp_2m_sde", "order": 3}, "order is 3\nexpected one of: 1, 2"),
        ({"solver": "dim", "spacing": "carras"}, "did you mean 'karras'"),
        ({"solver": "dim", "schedules": ["cosine", "vp-linear"]}, "cosine counts to 1000, vp-linear counts to 999"),
        ({"solver": "dim", "schedules": []}, "none"),
        ({"solver": "dim", "schedules": ["cosine", "sd"], "t_start": 1.0}, "'cosine' schedule is all noise"),
        ({"solver": "dim", "schedules": [{"kind": "cosine", "shift": 1e-310}]}, "no finite coefficients at t = 0.9"),
    ],
)
def test_wrong_use_is_told_plainly(settings: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"schedules": ["sd"], "steps": 5, "t_start": 0.9, **settings}
    arguments["schedules"] = [make_schedule(spec) for spec in arguments["schedules"]]
    with pytest.raises(InputError, match=message) as error:
        solver_table(**arguments)
    assert str(error.value).count("\n") < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stochastic: give it noise, an array \(4, 2, 3\)"),
        ({"noise": np.zeros((3, 2, 3))}, r"noise has shape \(3, 2, 3\), expected \(4, 2, 3\)"),
        ({"noise": np.zeros((4, 2, 3)), "tokens": (1, 1)}, r"tokens is \(1, 1\), expected 1 counts"),
    ],
)
def test_a_wrong_run_is_told_plainly(options: dict[str, Any], message: str) -> None:
    rows = solver_table([make_schedule("sd")], solver="euler-maruyama", steps=4)
    with pytest.raises(InputError, match=message):
        run_table(rows, network, np.zeros((2, 3)), **options)
