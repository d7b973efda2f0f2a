"""What tests of the runtime against the reference share: words for every task, and its run of one sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mdm.reference import Tokenizer, generate, sample
from mdm.reference.solvers import STOCHASTIC
from mdm.reference.tasks import make_request
from mdm.reference.world.language import questions
from mdm.reference.world.measure import to_picture, to_pixels
from mdm.reference.world.render import render
from mdm.reference.world.scene import all_scenes
from mdm.runtime import Result
from mdm.runtime.noise import normal

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
