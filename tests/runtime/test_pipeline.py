"""Pipelines against the reference: every task from the same start noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mdm.reference import Tokenizer, generate, make_schedule, sample
from mdm.reference.autoencoder import load_autoencoder
from mdm.reference.guidance import classifier_free, upsample_guidance
from mdm.reference.solvers import SOLVERS, STOCHASTIC
from mdm.reference.tasks import TASKS
from mdm.reference.world.measure import to_picture, to_pixels
from mdm.runtime import Request, Result
from mdm.runtime.noise import normal

from .against_reference import (
    LIMIT,
    PROMPTS,
    SEEDS,
    TOLD,
    Figure,
    Find,
    compare,
    noise_rows,
    reference,
    samples_of,
)

# --------------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_model_does_what_generate_does(
    task: str, deployed: Find, tokenizer: Tokenizer, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample in few steps, the other as the model is meant to be used."""
    case, fields = deployed("shipped"), {name: values[:2] for name, values in TOLD[task].items()}
    fields |= {"seed": SEEDS[:2], "steps": [6, None if task != "joint" else 20]}
    ours = case.pipeline.sample(task, **fields)
    theirs = [reference(case, tokenizer, task, one, monkeypatch) for one in samples_of(fields)]
    compare(f"shipped, {task}", ours, theirs, figure)
    if TASKS[task].makes_text and task != "turn":
        assert all(result.text for result in ours)


# A setting for each sample of one call.
MIXED: dict[str, list[Any]] = {
    "solver": ["heun", "dpmpp_2m_sde", None],
    "steps": [4, 6, None],
    "guidance": [0.0, 2.5, None],
    "spacing": [None, "karras", "time_quadratic"],
    "t_end": [0.01, None, 0.002],
    "final_zero": [None, True, None],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_with_a_sampler_for_each_sample(
    task: str, deployed: Find, tokenizer: Tokenizer, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, fields = deployed("mdm"), {**TOLD[task], **MIXED, "seed": SEEDS}
    ours = case.pipeline.sample(task, **fields)
    theirs = [reference(case, tokenizer, task, one, monkeypatch) for one in samples_of(fields)]
    compare(f"tiny, {task}, three samplers", ours, theirs, figure)
    heun = 2 * 4  # two evaluations a step
    assert [result.evaluations for result in ours] == [heun, 6, 3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(
    solver: str, deployed: Find, tokenizer: Tokenizer, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two schedules at once; the second of the seed's samples."""
    case, one = deployed("mdm"), {"label": 2, "seed": 9, "solver": solver, "steps": 5, "guidance": 0.7, "t_end": 0.01}
    ours = case.pipeline.sample("joint", sample=1, **one)
    theirs = reference(case, tokenizer, "joint", one, monkeypatch, number=1)
    compare(f"tiny, joint, {solver}", ours, [theirs], figure)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_selects_tokens(
    task: str, deployed: Find, tokenizer: Tokenizer, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six evaluations, of which four see a mask; one token chosen otherwise would show in the first digit.

    Its schedules are of two kinds, so that a grid of times tells which of them it follows.
    """
    samplers = {"steps": [6, 6, 6], "guidance": [0.0, 1.5, 3.0], "spacing": ["logsnr", None, "karras"]}
    case, fields = deployed("keep"), {**TOLD[task], "seed": SEEDS, **samplers}
    ours = case.pipeline.sample(task, **fields)
    theirs = [reference(case, tokenizer, task, one, monkeypatch) for one in samples_of(fields)]
    compare(f"tiny, keep 0.5, {task}", ours, theirs, figure)


def test_a_comparison_can_fail(
    deployed: Find, tokenizer: Tokenizer, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of a request is a difference far above the limit. Random weights would hardly hear the words."""
    case = deployed("shipped")
    one: dict[str, Any] = {"prompt": PROMPTS[0], "negative": "red", "label": 1, "seed": 3, "guidance": 1.0, "steps": 4}
    theirs = reference(case, tokenizer, "text_to_image", one, monkeypatch)
    compare("the unchanged request", case.pipeline.sample("text_to_image", **one), [theirs], figure)
    changes = {"prompt": PROMPTS[1], "negative": "blue", "label": 2, "seed": 4, "guidance": 1.01, "steps": 5,
               "sample": 1, "t_end": 0.002, "solver": "ddim", "spacing": "karras", "order": 1,
               "solver_type": "heun", "lower_order_final": False}  # fmt: skip
    wrong = case.pipeline.run([Request.of("text_to_image", **one | {name: value}) for name, value in changes.items()])
    for name, ours in zip(changes, wrong, strict=True):
        moved = np.abs(ours.latents - theirs.latents[0].numpy()).max() / float(theirs.latents.abs().max())
        assert moved > 10 * LIMIT, (name, moved)


def test_another_picture_size(deployed: Find, tokenizer: Tokenizer, figure: Figure) -> None:
    """The same weights at 48 pixels, from a picture of that size."""
    case = deployed("mdm")
    shown = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), np.uint8)
    ours = case.pipeline.turn(shown[0], PROMPTS[0], size=48, seed=8)
    start = torch.from_numpy(normal(8, 0, 0, ours[0].latents.shape))[None]
    told: dict[str, Any] = {"prompts": PROMPTS[:1], "pictures": to_picture(shown)}
    theirs = generate(case.model(48), tokenizer, "turn", noise=start, **told)
    compare("tiny at 48 pixels, turn", ours, [theirs], figure)
    assert ours[0].latents.shape == (20 + 2 * 36, 12)
    assert ours[0].picture is not None
    assert ours[0].picture.shape == (48, 48, 3)


# --------------------------------------------------------------------------------------------------- DiM


@torch.no_grad()
def dim_reference(
    case: Any, one: dict[str, Any], size: int, number: int = 0, upsample: int = 0, folder: Any = None
) -> torch.Tensor:
    """Latents [1,C,H,W] by the reference's samplers."""
    model = case.model(size)
    config = model.config
    schedule = make_schedule(config.schedule_image)
    options = {
        name: value for name, value in one.items() if name not in ("label", "seed", "guidance", "solver", "steps")
    }
    label = config.classes if one.get("label") is None else one["label"]

    def guided(network: Any) -> Any:
        def estimate(y: int) -> Any:
            return lambda z, t: network(z, schedule.model_time(t).expand(1).float(), torch.tensor([y]))

        scale = one["guidance"]
        return classifier_free(estimate(label), estimate(config.classes), scale) if scale else estimate(label)

    eps = guided(model)
    if upsample:
        from safetensors.torch import save_file

        from mdm.reference import load_model

        save_file(model.state_dict(), folder / "large.safetensors")  # positions resized up, then down, as DiM does
        low = load_model(folder / "large.safetensors", dataclasses.replace(config, image_size=size // upsample))
        eps = upsample_guidance(eps, guided(low), schedule, factor=upsample)
    shape = (config.in_channels, size, size)
    if one["solver"] in STOCHASTIC:
        options["noise"] = noise_rows(one["seed"], number, one["steps"], shape)
    start = torch.from_numpy(normal(one["seed"], number, 0, shape))[None]
    return sample(one["solver"], eps, start, schedule, one["steps"], **options)


def check_dim(label: str, ours: list[Result], theirs: list[torch.Tensor], shown: Any, figure: Figure) -> None:
    worst = max(
        float(np.abs(a.latents - b[0].numpy()).max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )
    figure(f"pipeline: {label}, relative", worst, LIMIT)
    for result, latents in zip(ours, theirs, strict=True):
        assert result.text is None
        assert result.picture is not None
        assert np.abs(result.picture.astype(int) - to_pixels(shown(latents))[0]).max() <= 1


DIM_FIELDS: dict[str, list[Any]] = {
    "label": [1, None, 4, 0],
    "guidance": [0.0, 0.4, 2.0, 0.4],
    "solver": ["dim", "dim", "heun", "euler-maruyama"],
    "steps": [50, 7, 6, 30],
    "seed": [1, 2, 3, 4],
}


@pytest.mark.parametrize("size", [8, 12])
def test_dim_on_pixels(size: int, deployed: Find, figure: Figure) -> None:
    case = deployed("dim")
    ours = case.pipeline.generate(**DIM_FIELDS, size=size)
    theirs = [dim_reference(case, one, size) for one in samples_of(DIM_FIELDS)]
    check_dim(f"DiM at {size} pixels", ours, theirs, lambda z: z, figure)
    assert {result.picture.shape for result in ours if result.picture is not None} == {(size, size, 3)}


@pytest.mark.parametrize("size", [8, 12])
def test_dim_with_an_external_autoencoder(size: int, deployed: Find, figure: Figure) -> None:
    """Latents of half the picture's size, scaled by Stable Diffusion's 0.18215."""
    case = deployed("latent")
    autoencoder = load_autoencoder(case.checkpoint.parent / "vae.safetensors")
    ours = case.pipeline.generate(**DIM_FIELDS, size=2 * size)
    theirs = [dim_reference(case, one, size) for one in samples_of(DIM_FIELDS)]
    with torch.no_grad():
        check_dim(f"latent DiM at {size} latents", ours, theirs, lambda z: autoencoder.decode(z / 0.18215), figure)
    pictures = [result.picture for result in ours if result.picture is not None]
    assert {picture.shape for picture in pictures} == {(2 * size, 2 * size, 3)}
    assert len(np.unique(np.stack(pictures))) > 20  # not all clamped


UPSAMPLE: list[dict[str, Any]] = [
    {},
    {"guidance": 0.0},
    {"solver": "ddim", "steps": 11, "guidance": 0.8},
    {"steps": 20, "t_end": 0.72},  # corrected to the end
    {"steps": 9, "t_start": 0.65},  # never corrected
    {"solver": "euler-maruyama", "steps": 12},
]


@pytest.mark.parametrize("settings", UPSAMPLE, ids=lambda one: "-".join(map(str, one.values())) or "default")
def test_upsample_guidance(settings: dict[str, Any], deployed: Find, figure: Figure, tmp_path: Any) -> None:
    case = deployed("dim")
    one: dict[str, Any] = {"label": 3, "seed": 11, "solver": "dpm_3s", "steps": 50, "guidance": 3.0, **settings}
    asked = {"label": 3, "seed": 11, **settings}
    ours = case.pipeline.generate(**asked, sample=2, upsample=2)
    theirs = dim_reference(case, one, 16, number=2, upsample=2, folder=tmp_path)
    check_dim(f"upsample guidance {settings or ''}", ours, [theirs], lambda z: z, figure)
    assert ours[0].picture is not None
    assert ours[0].picture.shape == (16, 16, 3)
    [plain] = case.pipeline.generate(**one, sample=2, size=16)
    corrected = "t_start" not in settings
    assert np.allclose(plain.latents, ours[0].latents, atol=1e-4) == (not corrected)
