"""What goes into a bundle so that it can be checked, and driven, where no PyTorch is.

    golden/<graph>.safetensors       inputs `in.<name>` and the model's answers `out.<name>`
    golden/task_<task>.safetensors   one whole run: start, conditioning, its own table (`in.rows`, 40 steps at most,
                                     4 for large models), latents, noise estimate and selection at every evaluation,
                                     the latents at the end, and the text and picture that they decode to
    sampler/<task>.json              the table of the default sampler, for hosts in any language

Letters: B batch, S evaluations, L latent tokens, T text tokens, d latent width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from mdm.export.graphs import GraphSpec, Plan
from mdm.export.truth import Arrays, Truth, points_of
from mdm.reference.config import Config
from mdm.reference.dim import DiM
from mdm.reference.generate import Estimator, schedule_of
from mdm.reference.guidance import classifier_free
from mdm.reference.multimodal import MDM
from mdm.reference.schedule import make_schedule as reference_schedule
from mdm.reference.solvers import sample
from mdm.reference.tasks import TASKS, Request, Task
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import ROW, STOCHASTIC, sampler_of, solver_table

LARGE = 100_000_000  # parameters; up to it the model answers in float64, beyond it a run has FEW steps, and one sample
FEW, MOST = 4, 40
# What DiM samples upsample guidance with; beyond the config's own sampler.
UPSAMPLE_SAMPLER = {"solver": "dpm_3s", "guidance": 3.0}


@dataclass(frozen=True)
class Run:
    """A task's default sampler: its settings, its table [S,m,R], the graphs that execute it."""

    task: str
    set: str  # of modalities
    sampler: dict[str, Any]
    rows: np.ndarray

    @property
    def guided(self) -> bool:
        return bool(self.sampler["guidance"] and TASKS[self.task].drops)

    @property
    def graph(self) -> str:
        return f"step_{self.set}{'_guided' if self.guided else ''}"


def set_of(task: Task) -> str:
    """The set of modalities whose graphs run a task."""
    if not task.text:
        return "image"
    return {0: "text", 1: "joint", 2: "turn"}[task.pictures]


def tasks_of(config: Config) -> dict[str, Task]:
    return {"class_to_image": TASKS["class_to_image"]} if config.family == "dim" else TASKS


def default_run(config: Config, task: str, steps: int | None = None) -> Run:
    sampler = sampler_of({"sampler": config.sampler, "sampler_for": config.sampler_for}, task)
    if steps is not None:
        sampler["steps"] = min(steps, sampler["steps"])
    makes = TASKS[task]
    specs = [config.schedule_text, config.schedule_image]
    modalities = [0] if makes.text and not makes.image else [1] if not makes.text else [0, 1]
    # The grid follows the picture's schedule wherever a picture is made; what is given needs no coefficients.
    clock = modalities.index(1) if makes.makes_image else 0
    settings = {key: value for key, value in sampler.items() if key != "guidance"}
    rows = solver_table([make_schedule(specs[m]) for m in modalities], clock=clock, **settings)
    return Run(task, set_of(makes), sampler, rows)


def write_tables(folder: Path, config: Config, specs: Sequence[GraphSpec] = ()) -> None:
    """sampler/<task>.json: columns and rows, a list of numbers for each modality of each evaluation."""
    folder.mkdir()
    for task in tasks_of(config):
        run = default_run(config, task)
        modalities = {"image": ["image"], "text": ["text"]}.get(run.set, ["text", "image"])
        _write_table(folder / f"{task}.json", task=task, graph=run.graph, modalities=modalities, sampler=run.sampler,
                     rows=run.rows)  # fmt: skip
    for spec in specs:
        if spec.upsample and spec.guided:
            sampler = sampler_of({"sampler": dict(config.sampler) | UPSAMPLE_SAMPLER})
            settings = {key: value for key, value in sampler.items() if key != "guidance"}
            schedule = make_schedule(config.schedule_image)
            rows = solver_table([schedule], upsample={"factor": spec.upsample}, **settings)
            plain = spec.name.removesuffix(f"_upsample{spec.upsample}")  # for the rows whose w is 0
            _write_table(folder / f"{spec.name.removeprefix('step_')}.json", task="class_to_image", graph=spec.name,
                         plain_graph=plain, modalities=["image"], sampler=sampler, rows=rows)  # fmt: skip


def _write_table(path: Path, rows: np.ndarray, **facts: Any) -> None:
    content = {**facts, "columns": list(ROW), "rows": rows.tolist()}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def write_cases(folder: Path, plan: Plan, truth: Truth) -> dict[str, str]:
    """The first point of each graph -> graph: file."""
    written = {}
    truth = truth if plan.parameters > LARGE else truth.in_float64()
    for spec in plan.specs:
        inputs = truth.inputs(spec, points_of(spec, plan.config)[0])
        outputs = truth.outputs(spec, inputs)
        tensors = {f"in.{name}": v for name, v in inputs.items()} | {f"out.{name}": v for name, v in outputs.items()}
        written[spec.name] = _save(folder / f"{spec.name}.safetensors", tensors)
    return written


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """In float32, but for a run's estimates: a table multiplies their rounding by up to sigma / alpha at its start."""
    kept = {
        name: v.astype(np.float32) if v.dtype == np.float64 and name != "out.eps" else v for name, v in tensors.items()
    }
    path.write_bytes(save({name: np.ascontiguousarray(kept[name]) for name in sorted(kept)}))
    return f"{path.parent.name}/{path.name}"


# --------------------------------------------------------------------------------------------------- whole runs


def write_runs(folder: Path, plan: Plan, truth: Truth) -> dict[str, str]:
    """One run of each task by the reference's own solver -> task_<task>: file."""
    config = plan.config
    steps, batch = (FEW, 1) if plan.parameters > LARGE else (MOST, 2)
    truth = truth if plan.parameters > LARGE else truth.in_float64()
    written = {}
    for task in tasks_of(config):
        run = default_run(config, task, steps)
        arrays = reference_run(config, truth, run, batch)
        arrays.pop("out.logits", None)  # a large vocabulary's are larger than all the rest
        written[f"task_{task}"] = _save(folder / f"task_{task}.safetensors", arrays)
    return written


@torch.no_grad()
def reference_run(config: Config, truth: Truth, run: Run, batch: int = 2, seed: int = 0) -> Arrays:
    model = truth.model(config.image_size)
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, config.classes, (batch,), generator=draw)
    null = torch.full((batch,), config.classes)
    guidance = float(run.sampler["guidance"])
    evaluations: dict[str, list[Tensor]] = {"points": [], "eps": []}
    options = {key: value for key, value in run.sampler.items() if key not in ("solver", "steps", "guidance")}
    tensors: dict[str, Tensor] = {"y": y, "guidance": torch.full((batch,), guidance)}
    if isinstance(model, DiM):
        schedule = reference_schedule(config.schedule_image)
        z = torch.randn(batch, config.in_channels, config.image_size, config.image_size, generator=draw).to(truth.dtype)

        def estimate(y: Tensor) -> Any:
            return lambda z, t: model(z, schedule.model_time(t).expand(len(z)), y)

        eps = classifier_free(estimate(y), estimate(null), guidance) if run.guided else estimate(y)
        tensors |= {"base": z, "uncond_y": null} if run.guided else {"base": z}

        def clean(z: Tensor) -> Tensor:
            return z
    else:
        request = random_request(model, run.task, y if TASKS[run.task].drops == "class" else null, draw, truth.dtype)
        schedule = schedule_of(model, request)
        eps = Estimator(model, request, schedule, guidance)
        z = torch.randn(request.clean.shape, generator=draw).to(truth.dtype)
        if config.keep < 1:
            evaluations["mask"] = []

        def clean(z: Tensor) -> Tensor:
            return torch.where(request.given[..., None], request.clean, z)

        tensors |= {"base": clean(z), "given": request.given, "y": request.y}
        if run.guided:
            tensors |= {"uncond": request.unguided_clean, "uncond_y": request.unguided_y}
    if run.sampler["solver"] in STOCHASTIC:
        options["noise"] = torch.randn(len(run.rows), *z.shape, generator=draw).to(truth.dtype)
        tensors["noise"] = options["noise"]
    all_selected = torch.ones(z.shape[:2], dtype=truth.dtype)
    chosen = [all_selected]  # the selection that each evaluation works with

    def record(evaluation: dict[str, Any]) -> None:
        evaluations["points"].append(clean(evaluation["z"]))
        evaluations["eps"].append(evaluation["eps"])
        if "mask" in evaluations:
            assert isinstance(eps, Estimator)
            evaluations["mask"].append(chosen[-1])
            chosen.append(all_selected if eps.mask is None else eps.mask)

    options["callback"] = record
    end = clean(sample(run.sampler["solver"], eps, z, schedule, run.sampler["steps"], **options))
    inputs = {f"in.{name}": tensor.numpy() for name, tensor in tensors.items()}
    inputs |= {"in.rows": run.rows.astype(np.float32), "in.steps": np.array([run.sampler["steps"]])}
    outputs = {name: torch.stack(tensors) for name, tensors in evaluations.items()}
    outputs |= {"z": end} | truth.decoded(TASKS[run.task], end)
    return inputs | {f"out.{name}": tensor.numpy() for name, tensor in outputs.items()}


def random_request(
    model: MDM, task_name: str, y: Tensor, draw: torch.Generator, dtype: torch.dtype = torch.float32
) -> Request:
    """A request of random pieces and smooth random pictures: no tokenizer is needed, and no picture."""
    config, task, batch = model.config, TASKS[task_name], len(y)
    T = min(config.text_lengths) if task.text else 0
    clean, given = [], []

    def text() -> Tensor:
        return model.vae.encode_text(torch.randint(0, config.vocabulary, (batch, T), generator=draw))

    if T:
        known = {"given": T, "both": T // 2, "made": 0}[task.text]
        clean.append(text())
        given.append((torch.arange(T) < known).expand(batch, -1))
    unguided = [text()] if T else []
    if task.image:
        coarse = (torch.rand(batch, config.in_channels, 4, 4, generator=draw) * 2 - 1).to(dtype)
        size = (config.image_size, config.image_size)
        shown = model.vae.encode_image(torch.nn.functional.interpolate(coarse, size, mode="bilinear"))  # [B,M,d]
        tokens = shown.shape[1]
        stack = torch.cat([shown] * task.pictures, dim=1)
        clean.append(stack)
        unguided.append(stack)
        known = tokens if task.image in ("given", "both") else 0
        given.append((torch.arange(stack.shape[1]) < known).expand(batch, -1))
    null = torch.full((batch,), config.classes)
    return Request(
        task, T, torch.cat(clean, 1), torch.cat(given, 1), y,
        torch.cat(unguided, 1), null if task.drops == "class" else y,
    )  # fmt: skip
