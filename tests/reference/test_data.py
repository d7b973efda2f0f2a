"""Training rows: the world's rows hold together and never show a held-out scene, whatever the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer, load_config
from mdm.reference.data import EMPTY_PROMPT, Rows, World
from mdm.reference.tasks import TASKS
from mdm.reference.world import language
from mdm.reference.world.detect import detect
from mdm.reference.world.measure import to_pixels
from mdm.reference.world.render import picture_table
from mdm.reference.world.scene import SHAPES, Scene, all_scenes, held_out

Tiny = Callable[..., dict[str, Any]]
DRAWN = 1500  # rows a task


@pytest.fixture(scope="module")
def world(tiny: Tiny, tokenizer: Tokenizer) -> World:
    return World(load_config(tiny()), tokenizer)


@pytest.fixture(scope="module")
def scene_of() -> Callable[[Tensor], Scene]:
    """The scene of a picture, by its exact pixels."""
    table = {p.tobytes(): s for s, ps in zip(all_scenes(), picture_table(), strict=True) for p in ps}
    return lambda picture: table[to_pixels(picture[None])[0].tobytes()]


def drawn(world: World, task: str, count: int = DRAWN, seed: int = 0) -> Rows:
    return world.draw([task] * count, 20, torch.Generator().manual_seed(seed))


def texts(world: World, rows: Rows) -> list[tuple[str, str]]:
    """Each row's given text and the text to generate."""
    T = rows.ids.shape[1]
    decode = world.tokenizer.decode
    return [
        (decode(row[known].tolist()), decode(row[~known].tolist()))
        for row, known in zip(rows.ids, rows.given[:, :T], strict=True)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_no_row_shows_or_tells_a_held_out_scene(world: World, scene_of: Callable[[Tensor], Scene], task: str) -> None:
    rows = drawn(world, task)
    for pictures in rows.pictures:
        for picture in pictures:
            assert not held_out(scene_of(picture))
    told = [world.tokenizer.decode(row.tolist()) for row in rows.ids] if rows.ids.shape[1] else []
    unseen = [language.caption(scene) for scene in all_scenes() if held_out(scene)]
    found = {caption for caption in unseen if any(caption in text for text in told)}
    assert not found


def test_the_autoencoder_sees_no_held_out_scene_either(world: World, scene_of: Callable[[Tensor], Scene]) -> None:
    pictures = world.pictures(DRAWN, torch.Generator().manual_seed(0))
    seen = {scene_of(picture) for picture in pictures}
    assert not any(map(held_out, seen))
    assert len(seen) > 500  # of 648: it is the whole world, not a corner


@pytest.mark.parametrize("task", TASKS)
def test_a_task_marks_its_rows_as_requests_are_marked(world: World, task: str) -> None:
    rows, kind = drawn(world, task, 50), TASKS[task]
    T = 20 if kind.text else 0
    assert rows.ids.shape == (50, T)
    assert rows.given.shape == (50, T + 16 * kind.pictures)
    assert rows.makes_text.tolist() == [kind.makes_text] * 50
    assert rows.makes_image.tolist() == [kind.makes_image] * 50
    image = rows.given[:, T:]
    assert torch.equal(
        image, (torch.arange(16 * kind.pictures) < {"given": 16, "both": 16}.get(kind.image, 0)).expand_as(image)
    )
    for known in rows.given[:, :T]:
        count = int(known.sum())
        assert known.tolist() == [True] * count + [False] * (T - count)  # a prompt stands in front
        assert count == {"given": T, "made": 0}.get(kind.text, count)
    assert rows.pictures.shape[:2] == (50, kind.pictures)
    if kind.pictures:
        assert -1 <= rows.pictures.min() < 0 < rows.pictures.max() <= 1


@pytest.mark.parametrize("task", ["text_to_image", "caption", "joint"])
def test_text_and_picture_say_the_same(world: World, task: str) -> None:
    """Checked by the detector, which does not know the renderer."""
    rows = drawn(world, task, 200)
    blank = 0
    for (given, made), picture in zip(texts(world, rows), rows.pictures[:, 0], strict=True):
        text = given or made
        blank += not text
        assert not text or language.parse_caption(text) == detect(to_pixels(picture[None])[0]).scene
    low, high = (0.04, 0.2) if task == "text_to_image" else (0, 0)
    assert low <= blank / 200 <= high  # EMPTY_PROMPT of 200, give or take 4 deviations


def test_classes_are_shapes_and_some_are_left_out(world: World) -> None:
    for task, share in (("class_to_image", EMPTY_PROMPT), ("joint", 0.5)):
        rows = drawn(world, task, 400)
        null = rows.y == 4
        assert abs(float(null.float().mean()) - share) < 0.1
        for y, picture in zip(rows.y[~null][:100], rows.pictures[~null][:100, 0], strict=True):
            assert detect(to_pixels(picture[None])[0]).shape == SHAPES[int(y)]
    assert (drawn(world, "ask", 50).y == 4).all()


def test_answers_are_right(world: World) -> None:
    rows = drawn(world, "ask", 300)
    asked = set()
    for (question, answer), picture in zip(texts(world, rows), rows.pictures[:, 0], strict=True):
        scene = detect(to_pixels(picture[None])[0]).scene
        assert scene is not None
        assert dict(language.questions(scene))[question] == answer
        asked.add(question)
    assert asked == set(language.QUESTIONS)


def test_continuations_are_captions_or_answers(world: World) -> None:
    kinds = {"answer": 0, "caption": 0}
    for prompt, rest in texts(world, drawn(world, "complete", 300)):
        if ". " in prompt:
            caption, question = prompt.split(". ")
            scene = language.parse_caption(caption)
            assert scene is not None
            assert dict(language.questions(scene))[question] == rest
            kinds["answer"] += 1
        else:
            assert language.parse_caption(f"{prompt} {rest}".strip()) is not None
            kinds["caption"] += 1
    assert min(kinds.values()) > 90


def test_a_turn_leads_from_the_upper_picture_to_the_lower(world: World) -> None:
    rows = drawn(world, "turn", 300)
    blank = 0
    for (prompt, made), (before, after) in zip(texts(world, rows), rows.pictures, strict=True):
        new = detect(to_pixels(after[None])[0]).scene
        assert language.parse_caption(made) == new
        if not prompt:
            blank += 1
            continue
        caption, request = prompt.split(". ")
        old = language.parse_caption(caption)
        assert old is not None
        assert old == detect(to_pixels(before[None])[0]).scene
        assert dict(language.changes(old))[request] == new
    assert 10 <= blank <= 60


def test_the_generator_decides_and_moves_on(world: World) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (world.draw(["joint"] * 8, 8, generator) for _ in range(2))
    again = drawn(world, "joint", 8, seed=3)
    assert torch.equal(first.pictures, again.pictures)
    assert torch.equal(first.ids, again.ids[:, :8])
    assert not torch.equal(first.pictures, second.pictures)
    assert np.array_equal(first.y, again.y)


def test_tasks_of_one_shape_share_a_batch(world: World) -> None:
    tasks = ["text_to_image", "caption", "ask", "joint"]
    rows = world.draw(tasks, 8, torch.Generator().manual_seed(0))
    assert rows.given[:, 8:].any(1).tolist() == [False, True, True, False]
    assert rows.makes_text.tolist() == [False, True, True, True]
    assert rows.makes_image.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"image_size": 16}, "image_size"), ({"in_channels": 4}, "in_channels|channels"), ({"classes": 3}, "classes")],
)
def test_a_config_that_the_world_does_not_fit_is_an_error(
    tiny: Tiny, tokenizer: Tokenizer, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        World(load_config(tiny(**change)), tokenizer)


@pytest.mark.parametrize("task", ["text_to_image", "turn"])
def test_hidden_prompt_is_pads_in_its_place(task: str, world: World) -> None:
    """What the unguided half of guidance sees when sampling: as many given tokens, all of them pads."""
    rows = drawn(world, task, 400)
    prompts = [prompt for prompt, _ in texts(world, rows)]
    hidden = [i for i, prompt in enumerate(prompts) if not prompt]
    assert 0.05 < len(hidden) / len(prompts) < 0.16
    T = rows.ids.shape[1]
    lengths = {int(n) for n in rows.given[:, :T].sum(1)}
    assert {int(rows.given[i, :T].sum()) for i in hidden} <= lengths
    assert all(rows.ids[i][rows.given[i, :T]].eq(world.tokenizer.pad).all() for i in hidden)
    if task == "turn":
        assert all(texts(world, rows)[i][1] for i in hidden[:5])  # the answer is still there
