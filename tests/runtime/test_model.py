"""What a request comes to before the steps: its latents as the reference has them, its text length, its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer
from mdm.reference.tasks import TASKS, make_request
from mdm.reference.world.measure import to_picture
from mdm.reference.world.render import render
from mdm.reference.world.scene import all_scenes
from mdm.runtime import Request
from mdm.runtime.model import Model, Prepared
from mdm.runtime.noise import normal
from mdm.runtime.pictures import fit, read_picture
from mdm.runtime.solver import ROW

Find = Callable[[str], Any]

PICTURE = render(all_scenes()[7])
WORDS = "red " * 30  # one piece each


def prepared(model: Model, task: str, **fields: Any) -> Prepared:
    return model.prepare(Request.of(task, **fields))


# --------------------------------------------------------------------------------- as the reference makes it


FIELDS: dict[str, dict[str, Any]] = {
    "class_to_image": {"label": 2},
    "text_to_image": {"prompt": "two big red circles", "negative": "one small blue cross at the top"},
    "caption": {"picture": PICTURE, "label": 1},
    "ask": {"picture": PICTURE, "prompt": "what colour?"},
    "complete": {"prompt": "two big"},
    "joint": {"label": 0},
    "turn": {"picture": PICTURE, "prompt": "two big red circles. now blue", "negative": "red", "label": 3},
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["mdm", "shipped"])
def test_conditioning_is_the_references(
    name: str, task: str, deployed: Find, tokenizer: Tokenizer, figure: Callable[[str, float, float], None]
) -> None:
    case, fields = deployed(name), FIELDS[task]
    ours = prepared(case.pipeline.model, task, **fields, seed=3, sample=2)
    names = {"prompt": "prompts", "negative": "negative", "label": "classes"}
    told: dict[str, Any] = {names[word]: [value] for word, value in fields.items() if word in names}
    if "picture" in fields:
        told["pictures"] = to_picture(PICTURE[None])
    with torch.no_grad():
        theirs = make_request(case.truth, tokenizer, task, **told)
    inputs, given = ours.job.inputs, theirs.given[0].numpy()
    assert ours.shape.latents == tuple(theirs.clean.shape[1:])
    assert ours.shape.text == theirs.text_tokens
    assert np.array_equal(inputs["given"], given)
    assert (inputs["y"], inputs["uncond_y"]) == (int(theirs.y), int(theirs.unguided_y))
    worst = 0.0
    for mine, clean in ((ours.job.state["base"], theirs.clean), (inputs["uncond"], theirs.unguided_clean)):
        if given.any():
            expected = clean[0].numpy()[given]
            worst = max(worst, float(np.abs(mine[given] - expected).max() / np.abs(expected).max()))
    figure(f"conditioning of {name}, {task}, relative", worst, 1e-5)
    start = normal(3, 2, 0, ours.shape.latents)
    assert np.array_equal(ours.job.state["base"][~given], start[~given])


def test_a_picture_is_fitted_to_the_size_that_is_made(deployed: Find) -> None:
    model = deployed("mdm").pipeline.model
    wide = np.concatenate([PICTURE[:, :5], PICTURE, PICTURE[:, :5]], axis=1)
    for size in (32, 48):
        fitted = fit(read_picture(wide), size, 3)
        ours = prepared(model, "caption", picture=wide, size=size)
        same = prepared(model, "caption", picture=fitted, size=size)
        assert np.array_equal(ours.job.state["base"], same.job.state["base"])
        assert ours.shape.latents == (8 + (size // 8) ** 2, 12)
    assert np.array_equal(fit(read_picture(wide), 32, 3), PICTURE)


# ---------------------------------------------------------------------------------------------- text lengths


@pytest.mark.parametrize(
    ("task", "tokens", "length"),
    [
        ("text_to_image", 0, 8), ("text_to_image", 7, 8), ("text_to_image", 8, 8), ("text_to_image", 9, 20),
        ("text_to_image", 20, 20), ("complete", 0, 8), ("complete", 4, 8), ("complete", 5, 20), ("complete", 16, 20),
        ("turn", 4, 8), ("turn", 16, 20), ("ask", 16, 20),
    ],
)  # fmt: skip
def test_the_smallest_length_that_holds_the_prompt(task: str, tokens: int, length: int, deployed: Find) -> None:
    """With room for four pieces more where text is made."""
    fields = {"picture": PICTURE} if task in ("turn", "ask") else {}
    made = prepared(deployed("mdm").pipeline.model, task, prompt=WORDS[: 4 * tokens], **fields)
    assert made.shape.text == length
    known = length if task == "text_to_image" else tokens
    assert made.job.inputs["given"][:length].tolist() == [True] * known + [False] * (length - known)


@pytest.mark.parametrize(
    ("task", "tokens", "said"),
    [
        ("text_to_image", 21, "the prompt has 21 tokens\nexpected at most 20 in all: shorten it"),
        ("complete", 17, "the prompt has 17 tokens and 4 are left free for the text to come\nexpected at most 20"),
        ("turn", 25, "25 tokens and 4 are left free"),
        ("text_to_image", 20_000, "20000 tokens\n"),
    ],
)
def test_a_prompt_too_long_for_all_lengths_is_told(task: str, tokens: int, said: str, deployed: Find) -> None:
    fields = {"picture": PICTURE} if task == "turn" else {}
    with pytest.raises(InputError) as error:
        prepared(deployed("mdm").pipeline.model, task, prompt="red " * tokens, **fields)
    assert said in str(error.value)


def test_a_negative_prompt_counts_too(deployed: Find) -> None:
    model = deployed("mdm").pipeline.model
    assert prepared(model, "text_to_image", prompt="red", negative=WORDS[: 4 * 8]).shape.text == 8
    longer = prepared(model, "text_to_image", prompt="red", negative=WORDS[: 4 * 9])
    assert longer.shape.text == 20
    padded = model.encode_text(model.tokenizer.encode("red"), 20)
    assert np.array_equal(longer.job.state["base"][:20], padded)
    assert np.array_equal(longer.job.inputs["uncond"][:20], model.encode_text(model.tokenizer.encode(WORDS[:36]), 20))
    with pytest.raises(InputError, match="has 21 tokens"):
        prepared(model, "text_to_image", prompt="red", negative=WORDS[: 4 * 21])


def test_the_length_depends_on_nothing_but_the_request(deployed: Find) -> None:
    """A neighbour's long prompt does not lengthen another's text."""
    pipeline, prompts = deployed("mdm").pipeline, ["red", WORDS[: 4 * 15], "blue", WORDS[: 4 * 8]]
    results = pipeline.generate(prompts, steps=1)
    assert [len(result.latents) for result in results] == [24, 36, 24, 24]


# --------------------------------------------------------------------------------------------------- graphs


def test_each_request_has_its_graph(deployed: Find) -> None:
    model = deployed("mdm").pipeline.model
    for task, fields, graph in [
        ("text_to_image", {"prompt": "red"}, "step_joint_guided"),
        ("text_to_image", {"prompt": "red", "guidance": 0}, "step_joint"),
        ("text_to_image", {"prompt": "red", "size": 48}, "step_joint_guided_48"),
        ("class_to_image", {"size": 32}, "step_image_guided"),
        ("class_to_image", {"size": 48, "guidance": 0.0}, "step_image_48"),
        ("caption", {"picture": PICTURE, "guidance": 3.0}, "step_joint"),  # it drops nothing
        ("complete", {"prompt": "red"}, "step_text"),
        ("turn", {"picture": PICTURE, "prompt": "red"}, "step_turn_guided"),
    ]:  # fmt: skip
        made = prepared(model, task, **fields)
        assert set(made.job.graphs) == {graph}
        assert made.job.rows.dtype == np.float32
        assert len(made.job.rows) == len(made.job.graphs) == made.sampler["steps"] == 3


def test_rows_without_a_correction_run_on_the_plain_graph(deployed: Find) -> None:
    model = deployed("dim").pipeline.model
    made = prepared(model, "class_to_image", upsample=2)
    assert made.shape.latents == (3, 16, 16)
    assert (made.sampler["solver"], made.sampler["guidance"], made.sampler["steps"]) == ("dpm_3s", 3.0, 50)
    weights = made.job.rows[:, 0, ROW.index("w")]
    assert weights.tolist() == [1.0] * 16 + [0.0] * 34
    assert made.job.graphs == ["step_image_guided_16_upsample2"] * 16 + ["step_image_guided_16"] * 34
    assert prepared(model, "class_to_image", upsample=2, guidance=0).job.graphs[::49] == [
        "step_image_16_upsample2", "step_image_16",
    ]  # fmt: skip
    assert prepared(model, "class_to_image", upsample=2, size=16).job.graphs == made.job.graphs


@pytest.mark.parametrize(
    ("name", "task", "fields", "said"),
    [
        ("mdm", "text_to_imag", {}, "no task 'text_to_imag'; did you mean 'text_to_image'?\ntasks: class_to_image,"),
        ("dim", "caption", {}, "has no task 'caption'"),
        ("mdm", "text_to_image", {}, "task 'text_to_image' needs prompt"),
        ("mdm", "class_to_image", {"prompt": "red"}, "task 'class_to_image' takes no prompt"),
        ("mdm", "caption", {}, "task 'caption' needs picture"),
        ("mdm", "joint", {"picture": PICTURE}, "task 'joint' takes no picture"),
        ("mdm", "ask", {"picture": PICTURE}, "task 'ask' needs prompt"),
        ("mdm", "joint", {"negative": ""}, "task 'joint' takes no negative prompt"),
        ("dim", "class_to_image", {"negative": "red"}, "takes no negative prompt"),
        ("mdm", "joint", {"label": 4}, "label is 4, expected 0 to 3"),
        ("mdm", "joint", {"label": -1}, "label is -1, expected 0 to 3"),
        ("mdm", "joint", {"label": 10**100}, "label is 1000"),
        ("mdm", "joint", {"size": 64}, "size is 64, but this bundle's pictures are of 32 or 48\nother sizes come with"),
        ("mdm", "joint", {"size": 0}, "size is 0, but this bundle's pictures are of 32 or 48"),
        ("dim", "class_to_image", {"size": 10}, "pictures are of 8 or 12 or 16"),
        ("latent", "class_to_image", {"size": 8}, "size is 8, but this bundle's pictures are of 16 or 24"),
        ("mdm", "joint", {"upsample": 2}, "no graph with upsample guidance by 2\nexport it with --upsample 2"),
        ("dim", "class_to_image", {"upsample": 3}, "no graph with upsample guidance by 3"),
        ("dim", "class_to_image", {"upsample": 2, "size": 12}, "upsample guidance by 2 at 12 pixels"),
        ("dim", "class_to_image", {"upsample": -2}, "no graph with upsample guidance by -2"),
        ("mdm", "complete", {"prompt": "red", "size": 32}, "size is 32, but this bundle's pictures are of no size"),
        ("mdm", "joint", {"seed": -1}, "seed is -1, expected a whole number of 0 to 18446744073709551615"),
        ("mdm", "joint", {"seed": 2**64}, "seed is 18446744073709551616, expected"),
        ("mdm", "joint", {"sample": 2**64}, "sample is 18446744073709551616, expected"),
        ("mdm", "joint", {"t_start": 1.0}, "'cosine' schedule is all noise"),
        ("mdm", "joint", {"t_start": 1.5}, "expected at least 1 step and 0 <= t_end < t_start <= 1"),
        ("mdm", "joint", {"t_start": float("nan")}, "t_start is nan, expected a finite number"),
        ("mdm", "joint", {"t_start": 10**400}, "t_start"),
        ("mdm", "joint", {"t_end": -0.1}, "t_end < t_start <= 1"),
        ("mdm", "joint", {"t_end": 0.99}, "t_end < t_start <= 1"),
        ("mdm", "joint", {"spacing": "karas"}, "unknown spacing 'karas'; did you mean 'karras'?"),
        ("mdm", "joint", {"solver": "dpmpp_2m", "solver_type": "hein"}, "'hein'; did you mean 'heun'?"),
        ("mdm", "joint", {"solver": "dpm_3m", "order": 4}, "order is 4\nexpected one of: 1, 2, 3"),
        ("mdm", "joint", {"guidance": 1e39}, "guidance"),  # beyond float32, which graphs compute in
        ("mdm", "text_to_image", {"prompt": "red zebra"}, "does not know 'zebra'"),
        ("mdm", "text_to_image", {"prompt": "red", "negative": "zebra"}, "does not know 'zebra'"),
        ("mdm", "caption", {"picture": "/missing.png"}, "picture '/missing.png' cannot be read: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_told(name: str, task: str, fields: dict[str, Any], said: str, deployed: Find) -> None:
    with pytest.raises(InputError) as error:
        prepared(deployed(name).pipeline.model, task, **fields)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_noise_of_ones_own_does_not_excuse_a_wrong_seed(deployed: Find) -> None:
    """A stochastic solver draws from the seed later, in the middle of a step that others share."""
    fields: dict[str, Any] = {"noise": np.zeros((24, 12)), "seed": -1, "solver": "dpmpp_2m_sde"}
    with pytest.raises(InputError, match="seed is -1"):
        prepared(deployed("mdm").pipeline.model, "joint", **fields)


def test_preparing_changes_nothing_that_was_given(deployed: Find) -> None:
    noise, picture = normal(1, 0, 0, (24, 12)), PICTURE.copy()
    request = Request.of("caption", picture=picture, noise=noise, steps=2)
    pipeline = deployed("mdm").pipeline
    [first] = pipeline.run([request])
    [second] = pipeline.run([request])
    assert np.array_equal(first.latents, second.latents)
    assert np.array_equal(noise, normal(1, 0, 0, (24, 12)))
    assert np.array_equal(picture, PICTURE)
    assert first.request is request
