"""Samplers against diffusers' schedulers, on the same times and the same model, in float64.

A diffusers scheduler brings its own times and float32 tables, so each test overwrites its `sigmas`, which are
our sigma/alpha. Some of its steps also cast the latent to float32; `Float64` is a tensor that refuses. Both
sides then differ by rounding alone ("pytest -s" prints each difference), and LIMIT leaves that some room.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference import solver_steps, solvers, solvers_sde
from mdm.reference.schedule import JointSchedule, NoiseSchedule, make_schedule, time_grid
from mdm.reference.solvers import SOLVERS, STOCHASTIC, multistep, sample, singlestep, singlestep_orders

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of these tests ([dev] extra)")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # diffusers' own
LIMIT = 1e-12
DIFFERENCES: list[float] = []  # of every comparison so far
SCHEDULES = {
    "sd": make_schedule("sd"),
    "vp-linear": make_schedule("vp-linear"),
    "cosine": make_schedule({"kind": "cosine", "shift": 0.35}),
}


class Float64(torch.Tensor):
    """A tensor that stays float64 where diffusers asks for float32."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        asked = kwargs.get("dtype", args[0] if args else None)
        return self if asked is torch.float32 else super().to(*args, **kwargs)


def model(z: Tensor, t: Tensor) -> Tensor:
    """Any smooth function that is not linear: its values are not small, so a wrong coefficient shows."""
    return torch.tanh(1.3 * z + 2 * t) + 0.3 * torch.cos(z)


def start() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grid(schedule: NoiseSchedule, steps: int, **options: Any) -> Tensor:
    return time_grid(schedule, steps, **{"t_start": 0.997, **options})


def noise_ratio(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    return torch.stack([schedule.sigma(t) / schedule.alpha(t) for t in times])


def walk(scheduler: Any, z: Tensor, times: Tensor, ratio: Tensor, **options: Any) -> Tensor:
    """A DPM-Solver scheduler of diffusers over our times; `options` are lists with one entry a step."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = ratio
    scheduler.set_begin_index(0)
    z = z.as_subclass(Float64)
    for i, t in enumerate(times[:-1]):
        extra = {name: values[i] for name, values in options.items()}
        z = scheduler.step(model(z, t), scheduler.timesteps[i], z, **extra).prev_sample
    assert z.dtype == torch.float64
    return z.as_subclass(torch.Tensor)


def difference(ours: Tensor, theirs: Tensor, label: str) -> float:
    """Largest difference, relative to the largest value."""
    value = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{label}: {value:.1e}")
    DIFFERENCES.append(value)
    return value


def multistep_scheduler(order: int, algorithm: str, times: Tensor, solver_type: str = "midpoint") -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=solver_type,
        final_sigmas_type="zero" if times[-1] == 0 else "sigma_min",
    )


# ------------------------------------------------------------------------------------------------- DPM-Solver

GRIDS = [
    pytest.param(6, {}, id="6"),  # short: lower orders at the end
    pytest.param(20, {}, id="20"),
    pytest.param(20, {"spacing": "karras", "t_end": 0.02, "final_zero": True}, id="20-karras-zero"),
]


@pytest.mark.parametrize(("steps", "options"), GRIDS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep(
    order: int, algorithm: str, solver_type: str, kind: str, steps: int, options: dict[str, Any]
) -> None:
    """diffusers has no dpmsolver (eps-form) that ends at sigma 0; there only finiteness is tested."""
    schedule = SCHEDULES[kind]
    times = grid(schedule, steps, **options)
    x0_form = algorithm == "dpmsolver++"
    ours = multistep(model, start(), schedule, times, order=order, predict_x0=x0_form, solver_type=solver_type)
    if not x0_form and times[-1] == 0:
        assert bool(ours.isfinite().all())
        return
    scheduler = multistep_scheduler(order, algorithm, times, solver_type)
    theirs = walk(scheduler, start(), times, noise_ratio(schedule, times))
    assert difference(ours, theirs, f"{algorithm} {order}M {solver_type} {kind} {steps}") < LIMIT


@pytest.mark.parametrize(("steps", "options"), GRIDS)
@pytest.mark.parametrize("order", [1, 2])
def test_multistep_sde(order: int, steps: int, options: dict[str, Any]) -> None:
    schedule = SCHEDULES["sd"]
    times = grid(schedule, steps, **options)
    noise = torch.randn(steps, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = SOLVERS["dpmpp_2m_sde"](model, start(), schedule, times, noise=noise, order=order)
    scheduler = multistep_scheduler(order, "sde-dpmsolver++", times)
    draws = list(noise.as_subclass(Float64))
    theirs = walk(scheduler, start(), times, noise_ratio(schedule, times), variance_noise=draws)
    assert difference(ours, theirs, f"sde-dpmsolver++ {order}M {steps}") < LIMIT


def walk_singlestep(order: int, algorithm: str, times: Tensor, ratio: Tensor) -> Tensor:
    """diffusers' singlestep scheduler, with the order of each stage set to ours and DiM's choice of formulas.

    DiM predicts order 3's second intermediate point by diffusers' "heun" formula and all else by "midpoint".
    No single setting of diffusers gives both, so the setting changes between stages.
    """
    groups = singlestep_orders(order, times)
    final = "zero" if times[-1] == 0 else "sigma_min"
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=order, algorithm_type=algorithm, final_sigmas_type=final, lower_order_final=True
    )
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = ratio
    scheduler.set_begin_index(0)
    scheduler.order_list = [stage for k in groups for stage in range(1, k + 1)]
    types = ["heun" if (k, stage) == (3, 2) else "midpoint" for k in groups for stage in range(1, k + 1)]
    z = start()
    for t, step_t, solver_type in zip(times, scheduler.timesteps, types, strict=False):
        scheduler.register_to_config(solver_type=solver_type)
        z = scheduler.step(model(z, t), step_t, z).prev_sample
    return z


@pytest.mark.parametrize(
    ("steps", "options"), [(7, {}), (8, {}), (9, {}), (20, {}), (20, {"t_end": 0.02, "final_zero": True})]
)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep(order: int, algorithm: str, kind: str, steps: int, options: dict[str, Any]) -> None:
    """diffusers has no eps-form that ends at sigma 0; there only finiteness is tested."""
    schedule = SCHEDULES[kind]
    times = grid(schedule, steps, **options)
    x0_form = algorithm == "dpmsolver++"
    ours = singlestep(model, start(), schedule, times, order=order, predict_x0=x0_form)
    if not x0_form and times[-1] == 0:
        assert bool(ours.isfinite().all())
        return
    theirs = walk_singlestep(order, algorithm, times, noise_ratio(schedule, times))
    assert difference(ours, theirs, f"{algorithm} {order}S {kind} {steps}") < LIMIT


def test_singlestep_orders() -> None:
    """Which step gets which order: DiM's rule, and diffusers' own list where that follows the same rule.

    Order 2 with an even number of evaluations differs: diffusers always ends it with two first-order steps.
    """
    times = torch.linspace(1, 1e-3, 51)
    assert singlestep_orders(3, times) == [3] * 16 + [2]
    assert singlestep_orders(3, times[:-1]) == [3] * 16 + [1]
    assert singlestep_orders(3, times[:-2]) == [3] * 15 + [2, 1]
    for order, counts in ((1, range(2, 30)), (2, range(3, 30, 2)), (3, range(3, 60))):
        for final, end in (("sigma_min", 1e-3), ("zero", 0.0)):
            scheduler = diffusers.DPMSolverSinglestepScheduler(
                solver_order=order, final_sigmas_type=final, lower_order_final=True
            )
            for n in counts:
                groups = singlestep_orders(order, torch.linspace(1, end, n + 1))
                ours = [stage for k in groups for stage in range(1, k + 1)]
                assert ours == scheduler.get_order_list(n), (order, n, final)


# ------------------------------------------------------------------------------- DDIM, Euler, Heun, the paper


@pytest.mark.parametrize("options", [{}, {"t_end": 0.02, "final_zero": True}])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim(kind: str, options: dict[str, Any]) -> None:
    """Against DDIMScheduler, with our alpha_bar as its table, and EulerDiscreteScheduler: DDIM on z/alpha."""
    schedule, steps = SCHEDULES[kind], 20
    times = grid(schedule, steps, **options)
    ours = SOLVERS["ddim"](model, start(), schedule, times)
    alpha_bar = torch.stack([schedule.alpha(t) ** 2 for t in times])

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=steps, clip_sample=False)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alpha_bar[:-1].flip(0), alpha_bar[-1]
    z = start()
    for i, t in enumerate(times[:-1]):
        z = scheduler.step(model(z, t), steps - 1 - i, z).prev_sample
    assert difference(ours, z, f"ddim {kind}") < LIMIT

    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = noise_ratio(schedule, times)
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    scaled = (start() / alpha_bar[0].sqrt()).as_subclass(Float64)
    for i, t in enumerate(times[:-1]):
        eps = model(scaled * alpha_bar[i].sqrt(), t)
        scaled = scheduler.step(eps, scheduler.timesteps[i], scaled).prev_sample
    z = scaled.as_subclass(torch.Tensor) * alpha_bar[-1].sqrt()
    assert difference(ours, z, f"ddim as k-diffusion's Euler {kind}") < LIMIT


def flow(name: str, z: Tensor, schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """diffusers' flow-matching Euler or Heun on our slope, with time in the place of its sigma."""

    def slope(z: Tensor, t: Tensor) -> Tensor:
        return -0.5 * schedule.beta(t) * (z - model(z, t) / schedule.sigma(t))

    scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")()
    scheduler.set_timesteps(len(times) - 1)
    stops = times
    if name == "Heun":  # it wants every inner point twice: as the end of a step and as the start of the next
        stops = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    scheduler.sigmas = stops
    scheduler.timesteps = stops[:-1]
    scheduler.set_begin_index(0)
    evaluations = (len(times) - 1) * (2 if name == "Heun" else 1)
    inner = torch.cat([times[:1], times[1:].repeat_interleave(2)])  # where Heun evaluates
    z = z.as_subclass(Float64)
    for i in range(evaluations):
        t = inner[i] if name == "Heun" else times[i]
        z = scheduler.step(slope(z, t), stops[min(i, len(stops) - 2)].float(), z).prev_sample
    return z.as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_euler_heun_and_the_papers_trapezoid(kind: str) -> None:
    """diffusers' EulerDiscrete and HeunDiscrete step z/alpha in sigma/alpha, which is another discretisation.

    Its flow-matching Euler and Heun take any slope, so they are given ours.
    """
    schedule = SCHEDULES[kind]
    times = grid(schedule, 20, t_end=0.02)
    euler = flow("Euler", start(), schedule, times)
    heun = flow("Heun", start(), schedule, times)
    paper = flow("Euler", flow("Heun", start(), schedule, times[:-1]), schedule, times[-2:])
    for name, theirs in (("euler", euler), ("heun", heun), ("mdm-paper", paper)):
        ours = SOLVERS[name](model, start(), schedule, times)
        assert difference(ours, theirs, f"{name} {kind}") < LIMIT


def test_euler_maruyama() -> None:
    """Against ScoreSdeVpScheduler, which steps by 1/steps whatever its times: the grid is uniform down to 0.

    It adds noise in the last step too; there its `x_mean` is compared.
    """
    deprecated = pytest.importorskip(
        "diffusers.schedulers.deprecated.scheduling_sde_vp", reason="this diffusers has no VP-SDE scheduler"
    )
    steps = 40
    scheduler = deprecated.ScoreSdeVpScheduler(num_train_timesteps=steps, beta_min=0.1, beta_max=20)
    scheduler.set_timesteps(steps)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    z = mean = start()
    draws = torch.Generator().manual_seed(2)
    for t in times[:-1]:
        z, mean = scheduler.step_pred(model(z, t), z, t.repeat(len(z)), draws)
    noise = torch.Generator().manual_seed(2)
    ours = SOLVERS["euler-maruyama"](model, start(), SCHEDULES["vp-linear"], times, noise=noise)
    assert difference(ours, mean, "euler-maruyama") < LIMIT


def test_the_worst_of_them(figure: Callable[[str, float, float], None]) -> None:
    """Stands behind the comparisons and before the planted faults, which differ on purpose."""
    if DIFFERENCES:  # none when it is run alone
        figure(f"solvers against diffusers, worst of {len(DIFFERENCES)} runs", max(DIFFERENCES), LIMIT)


# --------------------------------------------------------------------------------------------- planted faults

FAULTS = [
    (solvers, "multistep", "0.5 * d1", "0.5003 * d1"),
    (solvers, "multistep", "(r0, bend)), bend)", "(r0, bend)), 1.0003 * bend)"),
    (solvers, "singlestep", "0.5 * rise", "0.5003 * rise"),
    (solvers, "singlestep", "lam[3] / lam[2]", "1.0003 * lam[3] / lam[2]"),
    (solver_steps, "dpm_step", "phi_1 / h - 1", "phi_1 / h - 1.0003"),
    (solver_steps, "ddim_step", "schedule.sigma(t)", "1.0003 * schedule.sigma(t)"),
    (solver_steps, "ode_slope", "0.5 *", "0.5003 *"),
    (solvers, "_trapezoid", "0.5 * (t - s)", "0.5003 * (t - s)"),
    (solvers_sde, "dpmpp_2m_sde", "-2 * h", "-2.0003 * h"),
    (solvers_sde, "euler_maruyama", "-0.5 * beta", "-0.5003 * beta"),
]
ORACLES = {
    "multistep": lambda: test_multistep(3, "dpmsolver++", "midpoint", "sd", 20, {}),
    "singlestep": lambda: test_singlestep(3, "dpmsolver", "sd", 20, {}),
    "dpm_step": lambda: test_singlestep(3, "dpmsolver++", "sd", 20, {}),
    "ddim_step": lambda: test_ddim("sd", {}),
    "_trapezoid": lambda: test_euler_heun_and_the_papers_trapezoid("sd"),
    "ode_slope": lambda: test_euler_heun_and_the_papers_trapezoid("cosine"),
    "dpmpp_2m_sde": lambda: test_multistep_sde(2, 20, {}),
    "euler_maruyama": test_euler_maruyama,
}


@pytest.mark.parametrize(("module", "name", "right", "wrong"), FAULTS)
def test_a_coefficient_wrong_in_its_fourth_digit_is_caught(
    module: ModuleType, name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(getattr(module, name))
    assert source.count(right) == 1
    space = dict(vars(module))
    exec(source.replace(right, wrong), space)
    for place in (solvers, solver_steps, solvers_sde):
        if hasattr(place, name):
            monkeypatch.setattr(place, name, space[name])
    for alias, solver in SOLVERS.items():
        if solver is getattr(module, name, None) or alias.replace("-", "_") == name:
            monkeypatch.setitem(SOLVERS, alias, space[name])
    if name in globals():
        monkeypatch.setitem(globals(), name, space[name])
    monkeypatch.setitem(globals(), "LIMIT", 1e-6)  # the tolerance must be enough
    with pytest.raises(AssertionError):
        ORACLES[name]()


# ------------------------------------------------------------------------------------- two modalities at once


@pytest.mark.parametrize("name", SOLVERS)
def test_a_joint_schedule_is_two_runs_side_by_side(name: str) -> None:
    """Bit for bit: each token goes through the arithmetic its own schedule alone would put it through."""
    text, image = (
        make_schedule({"kind": "cosine", "shift": 0.3}),
        make_schedule({"kind": "cosine", "shift": 2.0}),
    )
    joint = JointSchedule(text, image, text_tokens=3, image_tokens=5)
    steps = 8
    draws = torch.Generator().manual_seed(3)
    z = torch.randn(2, 8, 4, dtype=torch.float64, generator=draws)
    noise = torch.randn(steps, 2, 8, 4, dtype=torch.float64, generator=draws)
    for spacing in ("time_uniform", "logsnr"):
        times = time_grid(joint, steps, spacing, t_start=0.997)

        def run(schedule: NoiseSchedule, first: int, last: int, times: Tensor = times) -> Tensor:
            options = {"noise": noise[:, :, first:last]} if name in STOCHASTIC else {}
            return SOLVERS[name](model, z[:, first:last], schedule, times, **options)

        both = run(joint, 0, 8)
        assert torch.equal(both, torch.cat([run(text, 0, 3), run(image, 3, 8)], dim=1))
        assert not torch.equal(both[:, :3], run(image, 0, 3))


# ---------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", SOLVERS)
def test_the_latent_keeps_its_precision_and_the_model_gets_float64_times(name: str) -> None:
    joint = JointSchedule(SCHEDULES["cosine"], make_schedule("cosine"), 2, 3)

    def watch(z: Tensor, t: Tensor) -> Tensor:
        assert z.dtype == torch.float32
        assert t.dtype == torch.float64
        assert t.ndim == 0
        return model(z, t).to(z)

    options: dict[str, Any] = {"noise": torch.Generator().manual_seed(0)} if name in STOCHASTIC else {}
    for final_zero in (False, True):
        z = sample(name, watch, torch.randn(2, 5, 4), joint, 6, t_start=0.997, final_zero=final_zero, **options)
        assert z.dtype == torch.float32
        assert bool(z.isfinite().all())


@pytest.mark.parametrize(("name", "evaluations"), [("dim", 50), ("dpmpp_2m", 50), ("heun", 100), ("mdm-paper", 99)])
def test_the_callback_hears_of_every_evaluation(name: str, evaluations: int) -> None:
    seen: list[Any] = []
    schedule = SCHEDULES["sd"]
    sample(name, model, start(), schedule, 50, callback=seen.append)
    assert [event["step"] for event in seen] == list(range(evaluations))
    for event in seen:
        z, t, eps = event["z"], event["t"], event["eps"]
        torch.testing.assert_close(eps, model(z, t), rtol=0, atol=0)
        torch.testing.assert_close(schedule.alpha(t) * event["x0"] + schedule.sigma(t) * eps, z)


def test_dim_and_dim_small_walk_their_published_times() -> None:
    seen: list[float] = []
    sample("dim", model, start(), SCHEDULES["sd"], 50, callback=lambda event: seen.append(float(event["t"])))
    assert seen == pytest.approx(torch.linspace(1, 1e-3, 51, dtype=torch.float64)[:-1].tolist(), abs=1e-15)
    seen.clear()
    noise = torch.Generator().manual_seed(0)
    schedule = SCHEDULES["vp-linear"]
    sample(
        "euler-maruyama",
        model,
        start(),
        schedule,
        1000,
        noise=noise,
        callback=lambda e: seen.append(float(e["t"])),
    )
    published = [0.0, *torch.linspace(1e-3, 1, 1000, dtype=torch.float64).tolist()]
    assert [*seen, 0.0] == pytest.approx(published[::-1], abs=1e-12)


def test_wrong_use_is_told_plainly() -> None:
    schedule = SCHEDULES["sd"]
    with pytest.raises(InputError, match=r"unknown solver 'dpmpp2m'; did you mean 'dpmpp_2m'\?"):
        sample("dpmpp2m", model, start(), schedule, 5)
    with pytest.raises(InputError, match="'euler-maruyama' is stochastic"):
        sample("euler-maruyama", model, start(), schedule, 5)
    with pytest.raises(InputError, match=r"noise has shape \(4, 3, 5\), expected \(5, 3, 5\)"):
        sample("dpmpp_2m_sde", model, start(), schedule, 5, noise=torch.zeros(4, 3, 5))
    with pytest.raises(InputError, match="solver_type is 'midpiont', expected one of: midpoint, heun"):
        sample("dpmpp_2m", model, start(), schedule, 5, solver_type="midpiont")
    for times in (torch.tensor([0.1, 0.5]), torch.tensor([0.5]), torch.tensor([0.5, 0.5])):
        with pytest.raises(InputError, match="one falling row"):
            SOLVERS["ddim"](model, start(), schedule, times)
