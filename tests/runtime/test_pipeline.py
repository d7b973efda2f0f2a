"""Pipelines against the reference: every task from the same start noise, and the same bits in any company."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer, generate, make_schedule, sample, time_grid
from mdm.reference.autoencoder import load_autoencoder
from mdm.reference.generate import Estimator, schedule_of
from mdm.reference.guidance import classifier_free, upsample_guidance
from mdm.reference.solvers import SOLVERS, STOCHASTIC
from mdm.reference.tasks import TASKS, make_request
from mdm.reference.world.language import questions
from mdm.reference.world.measure import to_picture, to_pixels
from mdm.reference.world.render import render
from mdm.reference.world.scene import all_scenes
from mdm.runtime import Pipeline, Request, Result, load
from mdm.runtime.noise import normal
from mdm.runtime.pipeline import Denoiser, Step

Array = np.ndarray
Figure = Callable[[str, float, float], None]
Find = Callable[[str], Any]  # name -> conftest.Deployed

LIMIT = 1e-4  # of the largest latent
SCENES = [all_scenes()[i] for i in (7, 150, 311)]
PICTURES = [render(scene) for scene in SCENES]
PROMPTS = ["two big red circles on the left", "one small blue square on the right", "three small green triangles"]
QUESTIONS = [questions(scene)[i][0] for i, scene in enumerate(SCENES)]
# What each of three samples is told.
TOLD: dict[str, dict[str, list[Any]]] = {
    "class_to_image": {"label": [2, None, 0]},
    "text_to_image": {"prompt": PROMPTS, "negative": ["one small black cross in the middle", None, ""]},
    "caption": {"picture": PICTURES},
    "ask": {"picture": PICTURES, "prompt": QUESTIONS},
    "complete": {"prompt": ["two big red", QUESTIONS[0], ""], "label": [None, 3, 1]},
    "joint": {"label": [None, 1, 3]},
    "turn": {"picture": PICTURES, "prompt": PROMPTS, "negative": [None, "red", "two big"]},
}
SEEDS = [5, 6, 2**40]
NAMES = {"prompt": "prompts", "negative": "negative", "label": "classes"}


def told_reference(one: dict[str, Any]) -> dict[str, Any]:
    """The same words as the reference takes them, for a batch of one."""
    given = {theirs: [one[ours]] for ours, theirs in NAMES.items() if one.get(ours) is not None}
    if one.get("picture") is not None:
        given["pictures"] = to_picture(one["picture"][None])
    return given or {"batch": 1}


def noise_rows(seed: int, number: int, steps: int, shape: tuple[int, ...]) -> torch.Tensor:
    """[S,1,..]: what a stochastic solver adds in each row."""
    return torch.from_numpy(np.stack([normal(seed, number, 1 + i, shape) for i in range(steps)]))[:, None]


def reference(
    case: Any, tokenizer: Tokenizer, task: str, one: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int = 0
) -> Any:
    """`generate` of one sample alone, from the runtime's noise."""
    settings = {name: one[name] for name in one if name not in ("seed", "picture", *NAMES) and one[name] is not None}
    given, config = told_reference(one), case.truth.config
    shape = tuple(make_request(case.truth, tokenizer, task, **given).clean.shape[1:])
    used = {**config.sampler, **config.sampler_for.get(task, {}), **settings}
    if used["solver"] in STOCHASTIC:  # generate draws from torch's own generator
        rows = noise_rows(one["seed"], number, used["steps"], shape)
        module = sys.modules["mdm.reference.generate"]
        monkeypatch.setattr(module, "sample", lambda *args, **options: sample(*args, **options | {"noise": rows}))
    start = torch.from_numpy(normal(one["seed"], number, 0, shape))[None]
    with torch.no_grad():
        made = generate(case.truth, tokenizer, task, noise=start, **given, **settings)
    monkeypatch.undo()
    return made


def compare(
    label: str, ours: list[Result], theirs: list[Any], figure: Figure, pictures: str = "pictures", limit: float = LIMIT
) -> None:
    assert len(ours) == len(theirs) > 0
    worst = max(
        float(np.abs(a.latents - b.latents[0].numpy()).max() / b.latents.abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )
    figure(f"pipeline: {label}, latents, relative", worst, limit)
    assert [[] if result.text is None else [result.text] for result in ours] == [result.texts for result in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.picture is None) == (b.pictures is None)
        if a.picture is not None:
            assert a.picture.dtype == np.uint8
            assert np.abs(a.picture.astype(int) - to_pixels(b.pictures)[0]).max() <= 1


def samples_of(fields: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


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


# ---------------------------------------------------------------------------------------- alone and together


def requests_for(name: str) -> list[Request]:
    """Different tasks, solvers, steps, guidance, text lengths and sizes; some share a lane, some change theirs."""
    if name == "dim":
        return [
            Request.of("class_to_image", **fields)
            for fields in (
                {"seed": 1, "label": 2, "steps": 9}, {"seed": 2, "steps": 5, "solver": "heun"},
                {"seed": 3, "label": 0, "guidance": 0.0, "steps": 4}, {"seed": 4, "label": 1, "size": 12, "steps": 7},
                {"seed": 5, "label": 1, "upsample": 2, "steps": 10}, {"seed": 6, "upsample": 2, "steps": 6},
                {"seed": 1, "label": 2, "steps": 9, "solver": "euler-maruyama", "sample": 3},
                {"seed": 7, "label": 2, "size": 16, "guidance": 1.0, "steps": 6},
            )
        ]  # fmt: skip
    long = "two big red circles on the left at the top"
    return [
        Request.of("text_to_image", prompt=PROMPTS[0], seed=1, steps=5),
        Request.of("text_to_image", prompt=PROMPTS[1], seed=2, steps=3, solver="heun", guidance=4.0),
        Request.of("text_to_image", prompt=PROMPTS[2], seed=2, steps=6, solver="dpmpp_2m_sde", sample=1),
        Request.of("text_to_image", prompt=long, seed=1, negative="red", steps=4),
        Request.of("text_to_image", prompt=PROMPTS[0], seed=3, guidance=0.0, steps=5),
        Request.of("joint", seed=4, label=1, steps=6, solver="euler-maruyama"),
        Request.of("joint", seed=5, steps=2, solver="dim"),
        Request.of("caption", picture=PICTURES[0], seed=6, steps=4),
        Request.of("ask", picture=PICTURES[1], prompt=QUESTIONS[1], seed=7, steps=3),
        Request.of("complete", prompt="two big", seed=8, steps=4),
        Request.of("turn", picture=PICTURES[2], prompt=PROMPTS[1], seed=9, steps=3),
        Request.of("class_to_image", label=2, seed=10, steps=5),
    ]


def bits(results: list[Result]) -> list[tuple[bytes, bytes | None, str | None]]:
    return [
        (result.latents.tobytes(), None if result.picture is None else result.picture.tobytes(), result.text)
        for result in results
    ]


@pytest.mark.parametrize("name", ["mdm", "keep", "dim", "shipped"])
def test_the_same_bits_alone_and_in_any_company(name: str, deployed: Find) -> None:
    case, requests = deployed(name), requests_for(name)
    few = name == "shipped"
    requests = requests[:3] + requests[5:8] if few else requests
    one = Pipeline(case.pipeline.model, batch=1)
    alone = [bits(one.run([request]))[0] for request in requests]
    assert len(set(alone)) == len(alone)
    places = list(range(len(requests)))
    shuffled = random.Random(0).sample(places, len(places))
    for threads, batches in ((1, (3, 8) if few else (1, 2, 3, 8)), (2, (8,) if few else (2, 8))):
        model = case.pipeline.model if threads == 1 else case.load(threads=threads).model
        for batch in batches:
            pipeline = Pipeline(model, batch)
            for order in (places, shuffled):
                together = bits(pipeline.run([requests[i] for i in order]))
                assert together == [alone[i] for i in order], (batch, threads, order)


def test_samples_of_a_seed_are_counted_on(deployed: Find) -> None:
    pipeline = deployed("mdm").pipeline
    many = pipeline.joint(seed=[3, 4], batch=3, steps=2)
    assert [(one.request.seed, one.request.sample) for one in many] == [(s, n) for s in (3, 4) for n in range(3)]
    assert len(set(bits(many))) == 6
    assert bits(pipeline.joint(seed=4, sample=1, batch=2, steps=2)) == bits(many[4:])


def test_results_are_nobody_elses_memory(deployed: Find) -> None:
    """What came out stays as it is whatever runs later in the same lanes, or is written into it."""
    pipeline = deployed("mdm").pipeline
    first = pipeline.joint(seed=1, batch=3, steps=3)
    before = bits(first)
    for result in pipeline.joint(seed=2, batch=3, steps=3):
        result.latents[...] = np.nan
        assert result.picture is not None
        result.picture[...] = 0
    assert bits(first) == before
    assert bits(pipeline.joint(seed=1, batch=3, steps=3)) == before


# ------------------------------------------------------------------------------------------------ noise


def test_given_noise_is_the_start(deployed: Find) -> None:
    pipeline = deployed("mdm").pipeline
    seeded = pipeline.generate(PROMPTS[:2], seed=[3, 4])
    noises = [normal(seed, 0, 0, (24, 12)) for seed in (3, 4)]
    given = pipeline.generate(PROMPTS[:2], seed=99, noise=noises)
    assert bits(given) == bits(seeded)
    doubles = pipeline.generate(PROMPTS[:2], noise=[noise.astype(np.float64) for noise in noises])
    assert bits(doubles) == bits(seeded)
    assert all(np.array_equal(noise, normal(seed, 0, 0, (24, 12))) for noise, seed in zip(noises, (3, 4), strict=True))


def test_given_noise_leaves_a_stochastic_solvers_own_to_the_seed(deployed: Find) -> None:
    pipeline, noise = deployed("mdm").pipeline, normal(1, 0, 0, (24, 12))
    settings: dict[str, Any] = {"noise": noise, "solver": "dpmpp_2m_sde", "steps": 4}
    first, again, other = (pipeline.joint(seed=seed, **settings) for seed in (1, 1, 2))
    assert bits(first) == bits(again) != bits(other)
    assert bits(first) == bits(pipeline.joint(seed=1, solver="dpmpp_2m_sde", steps=4))


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros((24, 11)), np.zeros((1, 24, 12)), np.zeros((24, 12), int), np.zeros((24, 12), complex), "noise", 3.0,
        np.full((24, 12), np.nan), np.full((24, 12), np.inf), np.full((24, 12), 1e39),  # beyond float32
    ],
    ids=lambda noise: f"{np.asarray(noise).dtype}{np.asarray(noise).shape}",
)  # fmt: skip
def test_wrong_noise_is_refused(noise: Any, deployed: Find) -> None:
    with pytest.raises(InputError, match=r"noise is .*, expected finite float32 \[24, 12\]"):
        deployed("mdm").pipeline.joint(noise=noise)


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


# --------------------------------------------------------------------------------------------- callbacks


def test_a_callback_is_told_of_every_evaluation(deployed: Find) -> None:
    pipeline, requests, steps = deployed("mdm").pipeline, requests_for("mdm"), []
    assert bits(pipeline.run(requests, steps.append)) == bits(pipeline.run(requests))
    for index, request in enumerate(requests):
        mine = [step for step in steps if step.index == index]
        evaluations = (2 if request.sampler.get("solver") == "heun" else 1) * request.sampler["steps"]
        assert [(step.done, step.of) for step in mine] == [(n + 1, evaluations) for n in range(evaluations)]
        assert all(step.prepared.request is request for step in mine)
        shapes = {step.x0.shape for step in mine}
        assert shapes == {mine[0].prepared.shape.latents}
        assert len({step.x0.tobytes() for step in mine}) == evaluations  # each its own copy


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "dpm_3s"])
def test_the_last_estimate_is_the_result(solver: str, deployed: Find, figure: Figure) -> None:
    """With a last step of first order to time 0 what is left of the latents is x0 itself."""
    last: dict[int, Array] = {}

    def watch(step: Step) -> None:
        last[step.index] = step.x0

    worst = 0.0
    for name, size in (("mdm", None), ("dim", 12)):
        pipeline = deployed(name).pipeline
        results = pipeline.generate(
            label=[1, 2], guidance=[0.0, 1.5], size=size, solver=solver, steps=[7, 8], t_end=1e-3, final_zero=True,
            callback=watch,
        )  # fmt: skip
        for index, result in enumerate(results):
            worst = max(worst, float(np.abs(last[index] - result.latents).max() / np.abs(result.latents).max()))
    figure(f"last x0 of {solver} against its result", worst, 1e-5 if solver != "heun" else 1e-2)


@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit])
def test_what_a_callback_raises_ends_the_call_alone(error: type[BaseException], deployed: Find) -> None:
    pipeline, requests = deployed("mdm").load(batch=3), requests_for("mdm")
    before = bits(pipeline.run(requests))
    for at in (1, 4):
        seen = []

        def watch(step: Step, at: int = at, seen: list[Step] = seen) -> None:
            seen.append(step)
            if step.index == 2 and step.done == at:
                raise error("enough")

        with pytest.raises(error, match="enough"):
            pipeline.run(requests, watch)
        assert seen[-1].index == 2 or error not in (KeyboardInterrupt, SystemExit)
        assert not any(lane.jobs for lane in pipeline.lanes.made.values())
        assert bits(pipeline.run(requests)) == before


# ----------------------------------------------------------------------------------------------- facts


def again(pipeline: Pipeline, result: Result) -> Result:
    """What a result's facts alone, passed through JSON, come to. Pictures are not part of them."""
    facts = json.loads(json.dumps(result.facts()))
    outcome = {name: facts.pop(name, None) for name in ("text", "evaluations", "seconds")}
    assert outcome["text"] == result.text
    assert outcome["evaluations"] == result.evaluations
    [made] = pipeline.run([Request.of(**facts, picture=result.request.picture)])
    return made


@pytest.mark.parametrize("name", ["mdm", "dim", "latent"])
def test_facts_are_enough_to_make_the_same_again(name: str, deployed: Find) -> None:
    pipeline = deployed(name).pipeline
    requests = requests_for("mdm" if name == "mdm" else "dim")
    if name == "latent":
        requests = [dataclasses.replace(one, size=16) for one in requests if one.upsample is None]
    results = pipeline.run(requests)
    made = [again(pipeline, result) for result in results]
    assert bits(made) == bits(results)
    assert [one.facts() | {"seconds": 0} for one in made] == [one.facts() | {"seconds": 0} for one in results]


def test_facts_of_another_default_still_make_the_same(deployed: Find, spoil: Callable[..., Path]) -> None:
    """Every setting is pinned: a bundle that is meant to be used otherwise makes the same picture of them."""
    results = deployed("mdm").pipeline.run(requests_for("mdm"))

    def change(manifest: dict[str, Any], folder: Any) -> None:
        manifest["sampler"] |= {"solver": "dpmpp_3m", "steps": 7, "guidance": 0.3, "spacing": "karras", "t_end": 0.1,
                                "final_zero": True, "order": 2, "solver_type": "heun"}  # fmt: skip

    other = load(spoil("mdm", change), threads=1)
    assert other.joint()[0].sampler["solver_type"] == "heun"
    assert bits([again(other, result) for result in results]) == bits(results)


def test_times_add_up(deployed: Find) -> None:
    results = deployed("mdm").load(batch=1).joint(seed=[1, 2, 3], steps=3)
    assert all(result.seconds > 0 and result.waited >= 0 for result in results)
    assert results[2].waited >= results[0].seconds + results[1].seconds
