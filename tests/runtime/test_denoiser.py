"""The network alone: the reference's estimate, a sampler made by hand, and wrong use."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer, make_schedule, time_grid
from mdm.reference.generate import Estimator, schedule_of
from mdm.reference.tasks import TASKS, make_request
from mdm.runtime.denoiser import Denoiser
from mdm.runtime.noise import normal

from .against_reference import (
    LIMIT,
    PROMPTS,
    TOLD,
    Array,
    Figure,
    Find,
    samples_of,
    told_reference,
)

# ---------------------------------------------------------------------------------------------- denoise


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["mdm", "shipped"])
def test_denoise_is_the_references_estimate(
    name: str, task: str, deployed: Find, tokenizer: Tokenizer, figure: Figure
) -> None:
    """Two samples with different words and guidance, at three times; what lies under given tokens has no say."""
    case = deployed(name)
    # Texts of one length each, for a batch has one.
    two = {name: values[:2] for name, values in TOLD[task].items() if name != "prompt"}
    if "prompt" in TOLD[task]:
        two["prompt"] = PROMPTS[:2] if task != "complete" else ["two big", "red"]
    scales = [0.7, 2.0]
    denoiser = case.pipeline.denoise(task, **two, guidance=scales)
    worst = 0.0
    for t in (0.95, 0.4, 0.03):
        z = np.random.default_rng(round(100 * t)).standard_normal(denoiser.shape, np.float32)
        eps = denoiser(z, t)
        assert eps.shape == z.shape
        assert eps.dtype == np.float32
        for index, one in enumerate(samples_of(two)):
            request = make_request(case.truth, tokenizer, task, **told_reference(one))
            schedule = schedule_of(case.truth, request)
            estimate = Estimator(case.truth, request, schedule, scales[index])
            time = torch.tensor(t, dtype=torch.float64)
            theirs = estimate(torch.from_numpy(z[index : index + 1]), time)[0].numpy()
            worst = max(worst, float(np.abs(eps[index] - theirs).max() / np.abs(theirs).max()))
            made = ~request.given[0].numpy()  # what is given has no noise, whatever its schedule
            for ours, level in zip(denoiser.alpha_sigma(t), (schedule.alpha(time), schedule.sigma(time)), strict=True):
                spread, expected = (np.broadcast_to(x, z.shape[1:])[made] for x in (ours, level.numpy()))
                np.testing.assert_allclose(spread, expected, rtol=1e-6)
        assert not eps[denoiser.given].any()
        other = np.where(denoiser.given[..., None], 7, z)
        assert np.array_equal(denoiser(other, t), eps)
    figure(f"denoise: {name}, {task}, relative", worst, LIMIT)


def by_hand(denoiser: Denoiser, z: Array, times: Array) -> Array:
    """DDIM, by what a denoiser offers alone."""
    for s, t in pairwise(times):
        eps = denoiser(z, s)
        (alpha, sigma), (alpha_next, sigma_next) = denoiser.alpha_sigma(s), denoiser.alpha_sigma(t)
        z = alpha_next * (z - sigma * eps) / alpha + sigma_next * eps
    return z


@pytest.mark.parametrize("task", ["joint", "text_to_image", "caption", "turn"])
def test_a_ddim_by_hand_is_the_pipelines(task: str, deployed: Find, figure: Figure) -> None:
    pipeline = deployed("mdm").pipeline
    told = {name: values[:2] for name, values in TOLD[task].items()} | {"guidance": [0.0, 1.5], "seed": [3, 4]}
    ours = np.stack([result.latents for result in pipeline.sample(task, **told, solver="ddim", steps=6)])
    denoiser = pipeline.denoise(task, **told)
    model = deployed("mdm").truth
    schedule = model.schedules["text" if task == "caption" else "image"]
    times = time_grid(schedule, 6, t_start=0.99).numpy()
    start = np.stack([normal(seed, 0, 0, denoiser.shape[1:]) for seed in (3, 4)])
    z = by_hand(denoiser, start, times)
    given = denoiser.given
    assert given is not None
    z, ours = z[~given], ours[~given]
    figure(f"DDIM by hand, {task}, relative", float(np.abs(z - ours).max() / np.abs(ours).max()), LIMIT)


def test_a_ddim_by_hand_for_dim(deployed: Find, figure: Figure) -> None:
    pipeline = deployed("dim").pipeline
    told: dict[str, Any] = {"label": [1, None], "guidance": 0.8, "seed": [3, 4], "size": 12}
    ours = np.stack([result.latents for result in pipeline.generate(**told, solver="ddim", steps=6)])
    denoiser = pipeline.denoise("class_to_image", **told)
    assert denoiser.shape == (2, 3, 12, 12)
    start = np.stack([normal(seed, 0, 0, (3, 12, 12)) for seed in (3, 4)])
    z = by_hand(denoiser, start, time_grid(make_schedule("sd"), 6).numpy())
    figure("DDIM by hand, DiM, relative", float(np.abs(z - ours).max() / np.abs(ours).max()), LIMIT)


# ---------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("task", "fields", "said"),
    [
        ("text_to_image", {"prompt": ["red", "red " * 9]}, "denoise: the samples differ in task, size or text length"),
        ("joint", {"size": [32, 48]}, "denoise: the samples differ"),
        ("joint", {"seed": [], "label": []}, "there are 0 of seed"),
        ("text_to_image", {}, "needs prompt"),
        ("nothing", {}, "has no task 'nothing'"),
    ],
)
def test_what_cannot_be_denoised_together(task: str, fields: dict[str, Any], said: str, deployed: Find) -> None:
    with pytest.raises(InputError, match=said):
        deployed("mdm").pipeline.denoise(task, **fields)


def test_denoise_of_another_shape(deployed: Find) -> None:
    denoiser = deployed("mdm").pipeline.denoise("joint", seed=[1, 2])
    for shape in ((2, 24, 11), (1, 24, 12), (24, 12), (3, 24, 12)):
        with pytest.raises(InputError, match=r"z has shape \[.*\], expected \[2, 24, 12\]"):
            denoiser(np.zeros(shape, np.float32), 0.5)
    lists = denoiser(np.zeros((2, 24, 12)).tolist(), 0.5)
    assert np.array_equal(lists, denoiser(np.zeros((2, 24, 12), np.float32), 0.5))


@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_denoise_at_no_time(t: float, deployed: Find) -> None:
    """t lies in (0,1]: at 0 there is no noise to estimate."""
    denoiser = deployed("mdm").pipeline.denoise("joint")
    with pytest.raises(InputError, match="t is"):
        denoiser(np.zeros(denoiser.shape, np.float32), t)


def test_denoise_is_the_network_alone_without_upsample_guidance(deployed: Find) -> None:
    with pytest.raises(InputError, match="upsample"):
        deployed("dim").pipeline.denoise("class_to_image", label=1, upsample=2)
