"""Sampler tables and golden runs, against the runtime's table and its walk over the torch model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mdm.export import golden
from mdm.export.golden import FEW, MOST, default_run, reference_run, tasks_of, write_runs, write_tables
from mdm.export.graphs import Plan, plan_graphs
from mdm.export.precision import make_precision
from mdm.export.truth import Truth
from mdm.export.weights import Checkpoint
from mdm.reference import load_config
from mdm.reference.checkpoint import build_model
from mdm.reference.config import PRESETS, Config
from mdm.reference.guidance import guide
from mdm.reference.multimodal import MDM
from mdm.reference.schedule import make_schedule as reference_schedule
from mdm.reference.schedule import time_grid
from mdm.reference.tasks import TASKS
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import ROW, SOLVERS, STOCHASTIC, run_table, solver_table

Hold = Callable[[str, float, float], None]
Runs = dict[str, np.ndarray]
EVERY_TASK = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def truth_of(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]], tiny_model: Callable[..., MDM]
) -> Callable[..., Truth]:
    """truth_of(family="dim", ...): a tiny model with that config."""

    def make(**changes: Any) -> Truth:
        config, path = load_config(tiny(**changes)), tmp_path_factory.mktemp("golden") / "model.safetensors"
        if config.family == "mdm":
            save_file(tiny_model(**changes).state_dict(), path)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(6)
                save_file(build_model(config).state_dict(), path)
        return Truth(Checkpoint(path, config), config)

    return make


# ----------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("preset", ["mdm-tiny", "dim-small", "dim-huge-256"])
def test_tables_are_the_runtimes(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    write_tables(tmp_path / "sampler", config)
    assert {path.stem for path in (tmp_path / "sampler").iterdir()} == set(tasks_of(config))
    specs = {"text": config.schedule_text, "image": config.schedule_image}
    for name in tasks_of(config):
        table, task = json.loads((tmp_path / "sampler" / f"{name}.json").read_text()), TASKS[name]
        present = [modality for modality, there in (("text", task.text), ("image", task.image)) if there]
        assert (table["task"], table["columns"], table["modalities"]) == (name, list(ROW), present)
        settings = {key: value for key, value in table["sampler"].items() if key != "guidance"}
        clock = present.index("image" if task.makes_image else "text")
        rows = solver_table([make_schedule(specs[modality]) for modality in present], clock=clock, **settings)
        assert np.array_equal(np.array(table["rows"]), rows)  # to the last bit
        assert np.shape(table["rows"])[1:] == (len(present), len(ROW))


def test_upsample_guidance_has_tables_of_its_own(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> None:
    config = load_config(tiny(family="dim", in_channels=4))
    specs = plan_graphs(config, [config.image_size], [2])
    write_tables(tmp_path / "sampler", config, specs)
    table = json.loads((tmp_path / "sampler" / "image_guided_16_upsample2.json").read_text())
    assert {table["graph"], table["plain_graph"]} < {spec.name for spec in specs}
    assert (table["sampler"]["solver"], table["sampler"]["guidance"]) == ("dpm_3s", 3.0)
    w = np.array(table["rows"])[:, 0, ROW.index("w")]
    assert w[0] == 1
    assert w[-1] == 0


def test_tables_have_the_tasks_own_sampler(tmp_path: Path) -> None:
    write_tables(tmp_path / "sampler", load_config("mdm-tiny"))
    found = {path.stem: json.loads(path.read_text())["sampler"] for path in (tmp_path / "sampler").iterdir()}
    assert (found["joint"]["solver"], found["joint"]["steps"]) == ("dpmpp_2m_sde", 40)
    assert (found["caption"]["solver"], found["caption"]["steps"]) == ("dpmpp_2m", 20)


@EVERY_TASK
def test_a_table_walks_the_times_that_the_reference_does(task: str, tiny: Callable[..., dict[str, Any]]) -> None:
    """Spaced in lambda, in which text and picture differ."""
    sampler = {"solver": "ddim", "steps": 5, "guidance": 0.0, "t_start": 0.99, "spacing": "logsnr"}
    config = load_config(tiny(sampler=sampler))
    schedule = reference_schedule(config.schedule_image if TASKS[task].makes_image else config.schedule_text)
    times = time_grid(schedule, 5, "logsnr", 0.99)[:-1]
    assert np.allclose(default_run(config, task).rows[:, 0, ROW.index("t")], 1000 * times, rtol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_default_run_has_its_graph(preset: str) -> None:
    config = load_config(preset)
    names = {spec.name for spec in plan_graphs(config, [config.image_size], [])}
    runs = [default_run(config, task) for task in tasks_of(config)]
    assert {run.graph for run in runs} <= names
    assert all(run.guided == bool(TASKS[run.task].drops and run.sampler["guidance"]) for run in runs)


def test_fewer_steps_are_a_whole_run_of_fewer_steps() -> None:
    config = load_config("dim-huge-256")
    run = default_run(config, "class_to_image", FEW)
    assert run.sampler["steps"] == len(run.rows) == FEW
    assert default_run(config, "class_to_image", 1000).sampler["steps"] == 50


# ------------------------------------------------------------------------------------------------------- runs


def walk(config: Config, truth: Truth, task: str, saved: Runs) -> tuple[np.ndarray, np.ndarray]:
    """The same run by the runtime's walk, the torch model as its network -> the points, and the end."""
    model, points = truth.model(config.image_size), []
    given_in = {name.removeprefix("in."): torch.from_numpy(v) for name, v in saved.items() if name.startswith("in.")}
    base, y, guided = given_in["base"], given_in["y"], "uncond_y" in given_in
    given = given_in.get("given", torch.zeros(base.shape[:2], dtype=torch.bool))
    text = min(config.text_lengths) if TASKS[task].text else 0
    tokens = [n for n in (text, base.shape[1] - text) if n] if config.family == "mdm" else []

    def kept(clean: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.where(given[..., None], clean, z) if config.family == "mdm" else z

    def estimate(z: torch.Tensor, t: Any, y: torch.Tensor) -> torch.Tensor:
        times = torch.full((len(z),), float(t))
        return model(z, times, text, given, y) if config.family == "mdm" else model(z, times, y)

    @torch.no_grad()
    def network(point: np.ndarray, t: Any) -> np.ndarray:
        z = torch.from_numpy(point)
        points.append(kept(base, z).numpy())
        eps = estimate(kept(base, z), t, y)
        if guided:
            untold = kept(given_in.get("uncond", base), z)
            eps = guide(eps, estimate(untold, t, given_in["uncond_y"]), float(given_in["guidance"][0]))
        return eps.numpy()

    end = run_table(saved["in.rows"], network, base.numpy(), saved.get("in.noise"), tokens if len(tokens) > 1 else ())
    return np.stack(points), kept(base, torch.from_numpy(end)).numpy()


def check_walk(label: str, truth: Truth, task: str, saved: Runs, figure: Hold) -> None:
    points, end = walk(truth.config, truth, task, saved)
    assert points.shape == saved["out.points"].shape
    worst = max(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for ours, theirs in ((points, saved["out.points"]), (end, saved["out.z"]))
    )
    figure(f"golden run of {label} against the runtime's walk, relative", worst, 1e-4)


@EVERY_TASK
def test_a_run_is_what_the_runtime_walks(task: str, truth_of: Callable[..., Truth], figure: Hold) -> None:
    truth = truth_of()
    run = default_run(truth.config, task)
    saved = reference_run(truth.config, truth, run)
    assert ("in.uncond_y" in saved) == run.guided
    assert len(saved["out.points"]) == len(run.rows)
    check_walk(task, truth, task, saved, figure)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_what_the_runtime_walks(solver: str, truth_of: Callable[..., Truth], figure: Hold) -> None:
    sampler = {"solver": solver, "steps": 5, "guidance": 0.4, "t_start": 0.99, "t_end": 0.01}
    truth = truth_of(family="dim", sampler=sampler)
    run = default_run(truth.config, "class_to_image")
    saved = reference_run(truth.config, truth, run)
    assert ("in.noise" in saved) == (solver in STOCHASTIC)
    if solver in STOCHASTIC:
        assert saved["in.noise"].shape == (len(run.rows), *saved["in.base"].shape)
    check_walk(solver, truth, "class_to_image", saved, figure)


def test_a_stochastic_joint_run_is_what_the_runtime_walks(truth_of: Callable[..., Truth], figure: Hold) -> None:
    truth = truth_of(sampler_for={"joint": {"solver": "dpmpp_2m_sde", "steps": 4}})
    saved = reference_run(truth.config, truth, default_run(truth.config, "joint"))
    assert saved["in.noise"].shape == (4, *saved["in.base"].shape)
    check_walk("joint, stochastic", truth, "joint", saved, figure)


def plan_of(truth: Truth) -> Plan:
    return Plan(truth.checkpoint, truth.config, make_precision("fp32"), 20, ())


def test_runs_are_small_and_repeat(truth_of: Callable[..., Truth], tmp_path: Path) -> None:
    truth, made = truth_of(), []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        written = write_runs(tmp_path / name, plan_of(truth), truth)
        assert written == {f"task_{task}": f"{name}/task_{task}.safetensors" for task in TASKS}
        made.append({task: load_file(tmp_path / name / f"task_{task}.safetensors") for task in TASKS})
    for task, saved in made[0].items():
        kinds = {name: array.dtype.name for name, array in saved.items()}
        assert kinds.pop("out.eps") == "float64"
        assert set(kinds.values()) <= {"float32", "int64", "bool"}
        assert saved.keys() == made[1][task].keys()
        assert all(np.array_equal(array, made[1][task][name]) for name, array in saved.items())


@pytest.mark.parametrize(("large", "expected"), [(0, (FEW, 1)), (10**9, (MOST, 2))])
def test_a_large_models_runs_are_short(
    large: int, expected: tuple[int, int], truth_of: Callable[..., Truth], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(golden, "LARGE", large)
    truth = truth_of(family="dim", blocks=1, sampler={"solver": "ddim", "steps": 60, "guidance": 0.4})
    write_runs(tmp_path, plan_of(truth), truth)
    run = load_file(tmp_path / "task_class_to_image.safetensors")
    assert run["out.points"].shape[:2] == expected
    assert len(run["in.rows"]) == expected[0]
