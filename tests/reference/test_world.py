"""The captioned picture world: grammar both ways, the held-out split, the renderer, the judging rules.

The detectors decide the figures of `mdm evaluate`, so they are tested hardest: every picture the renderer can
draw, noise, blur, and pictures in which one value is drawn wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mdm.plugins.errors import InputError
from mdm.reference.world import detect as d
from mdm.reference.world import language, render, scene
from mdm.reference.world.scene import Scene

SCENES = scene.all_scenes()
FIELDS = ("count", "size", "colour", "shape", "place")
VALUES = (scene.COUNTS, scene.SIZES, scene.COLOURS, scene.SHAPES, scene.PLACES)
Figure = Callable[[str, float, float], None]
scenes = st.sampled_from(SCENES)
shifts = st.sampled_from(render.SHIFTS)


def blurred(picture: NDArray[Any]) -> NDArray[np.float64]:
    """Picture in 0..1 under a [1 2 1]/4 blur along both axes."""
    p = np.pad(picture / 255, ((1, 1), (1, 1), (0, 0)), mode="edge")
    p = (p[:-2] + 2 * p[1:-1] + p[2:]) / 4
    return (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]) / 4


# --- scenes and the held-out split


def test_there_are_720_scenes() -> None:
    assert len(SCENES) == len(set(SCENES)) == 720


def test_a_tenth_is_held_out_and_every_pair_of_values_is_trained() -> None:
    held = [s for s in SCENES if scene.held_out(s)]
    trained = [s for s in SCENES if not scene.held_out(s)]
    assert len(held) == 72
    for (field, values), (other, others) in combinations(zip(FIELDS, VALUES, strict=True), 2):
        pairs = {(getattr(s, field), getattr(s, other)) for s in trained}
        assert len(pairs) == len(values) * len(others), f"a pair of {field} and {other} is never trained"
    for field, values in zip(FIELDS, VALUES, strict=True):
        assert {getattr(s, field) for s in held} == set(values), f"no held-out scene for some {field}"


@given(scenes, st.sampled_from(scene.COUNTS), st.sampled_from(scene.SIZES))
def test_count_and_size_do_not_decide_what_is_held_out(s: Scene, count: int, size: str) -> None:
    assert scene.held_out(s) == scene.held_out(replace(s, count=count, size=size))


# --- language


def test_captions_round_trip() -> None:
    captions = [language.caption(s) for s in SCENES]
    assert len(set(captions)) == len(SCENES)
    assert [language.parse_caption(c) for c in captions] == SCENES
    assert "two big red circles on the left" in captions
    assert "one small blue cross in the middle" in captions
    assert "three small black triangles at the top" in captions


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two big red circle on the left",
        "one big red circles on the left",
        "two big red circles at the left",
        "two red big circles on the left",
        "two big red circles on the left.",
        "two big red circles  on the left",
        "two big pink circles on the left",
    ],
)
def test_what_is_nearly_a_caption_is_none(text: str) -> None:
    assert language.parse_caption(text) is None


@given(scenes)
def test_the_five_answers_make_up_the_caption(s: Scene) -> None:
    asked = language.questions(s)
    assert tuple(question for question, _ in asked) == language.QUESTIONS
    assert " ".join(answer for _, answer in asked) == language.caption(s)


@given(scenes, st.integers(0, 2**32 - 1))
def test_a_dialogue_changes_one_value_and_never_leads_into_the_held_out_scenes(s: Scene, seed: int) -> None:
    earlier, request, new = language.dialogue(s, np.random.default_rng(seed))
    assert language.parse_caption(earlier) == s
    changed = [field for field in FIELDS if getattr(s, field) != getattr(new, field)]
    assert changed in (["size"], ["colour"])
    assert request == f"now {getattr(new, changed[0])}"
    assert scene.held_out(s) or not scene.held_out(new)


# --- pictures


def test_objects_lie_inside_and_do_not_touch() -> None:
    for s, shift in product(SCENES, render.SHIFTS):
        away = np.linalg.norm(render.render(s, shift) / 255 - render.BACKGROUND, axis=-1)
        ink = away > 0.01  # any coverage at all
        ys, xs = np.nonzero(ink)
        assert 1 <= min(ys.min(), xs.min()) <= max(ys.max(), xs.max()) <= 30, f"{s} touches the border"
        assert len(d.components(ink)) == s.count, f"{s}: objects touch"


@given(scenes)
def test_a_shift_moves_the_whole_picture_across_its_line(s: Scene) -> None:
    before, after = render.SHIFTS
    axis = 1 if s.place in render.COLUMNS else 0
    moved = np.roll(render.render(s, before), after - before, axis)
    np.testing.assert_array_equal(moved, render.render(s, after))


def test_picture_table_holds_every_picture() -> None:
    table = render.picture_table()
    assert table.shape == (720, 2, 32, 32, 3)
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table[100, 1], render.render(SCENES[100], render.SHIFTS[1]))
    assert len({picture.tobytes() for picture in table.reshape(720 * 2, -1)}) == 720 * 2


# --- detectors


def share_wrong(change: Callable[[NDArray[np.uint8]], NDArray[Any]]) -> float:
    """Share of the scenes, each at one random shift, that are read wrong in any field."""
    rng = np.random.default_rng(1)
    pictures = [render.render(s, render.SHIFTS[rng.integers(2)]) for s in SCENES]
    return float(np.mean([d.detect(change(p)).scene != s for p, s in zip(pictures, SCENES, strict=True)]))


def test_detectors_read_every_clean_picture(figure: Figure) -> None:
    wrong = [d.detect(render.render(s, shift)).scene != s for s in SCENES for shift in render.SHIFTS]
    figure("detectors: share of all 1440 clean pictures read wrong", float(np.mean(wrong)), 0)


def test_detectors_bear_noise_and_blur(figure: Figure) -> None:
    rng = np.random.default_rng(2)
    noise = share_wrong(lambda p: p / 255 + rng.normal(0, 0.05, p.shape))
    more_noise = share_wrong(lambda p: p / 255 + rng.normal(0, 0.1, p.shape))
    blur = share_wrong(blurred)
    both = share_wrong(lambda p: blurred(p) + rng.normal(0, 0.05, p.shape))
    figure("detectors: wrong at noise 0.05", noise, 0.01)
    figure("detectors: wrong at noise 0.1", more_noise, 0.01)
    figure("detectors: wrong at blur [1 2 1]", blur, 0.01)
    figure("detectors: wrong at blur and noise 0.05", both, 0.01)


@given(scenes, scenes, shifts, st.sampled_from(FIELDS))
def test_a_wrongly_drawn_value_is_seen(s: Scene, other: Scene, shift: int, field: str) -> None:
    drawn = replace(s, **{field: getattr(other, field)})
    seen = d.detect(render.render(drawn, shift))
    for name in FIELDS:
        assert (getattr(seen, name) == getattr(s, name)) == (getattr(drawn, name) == getattr(s, name))


def paste(target: Scene, source: Scene, columns: slice) -> NDArray[np.uint8]:
    """The picture of `target` with some columns from the picture of `source`."""
    picture = render.render(target)
    picture[:, columns] = render.render(source)[:, columns]
    return picture


def test_a_group_of_two_kinds_has_the_value_of_more_than_half_or_none() -> None:
    two, three = Scene(2, "big", "red", "circle", "top"), Scene(3, "big", "red", "circle", "top")
    half = d.detect(paste(two, replace(two, colour="blue", shape="square"), slice(16, 32)))
    assert (half.count, half.colour, half.shape, half.size, half.place) == (2, None, None, "big", "top")
    third = d.detect(paste(three, replace(three, colour="blue", shape="square"), slice(21, 32)))
    assert (third.count, third.colour, third.shape) == (3, "red", "circle")


def test_what_is_no_scene_is_not_called_one() -> None:
    empty = np.full((32, 32, 3), 237, np.uint8)
    assert d.detect(empty) == d.Detection(count=0)
    noise = np.random.default_rng(0).uniform(0, 1, (32, 32, 3))
    assert d.detect(noise).scene is None
    assert d.detect(np.full((32, 32, 3), np.nan)).scene is None

    bar = empty.copy()
    bar[14:18, 4:28] = (220, 30, 30)
    assert d.detect(bar) == d.Detection(count=1, size=None, colour="red", shape=None, place="middle")

    corner = empty.copy()
    corner[2:10, 2:10] = (255, 150, 0)  # orange, which is no colour of the world
    assert d.detect(corner) == d.Detection(count=1, size="big", colour=None, shape="square", place=None)

    specks = render.render(SCENES[0])
    specks[28, 5] = specks[29, 20] = 0
    assert d.detect(specks).scene == SCENES[0]


def test_a_picture_of_another_size_is_an_error() -> None:
    with pytest.raises(InputError, match=r"found shape \[16, 32, 3\], expected \[32, 32, 3\]"):
        d.detect(np.zeros((16, 32, 3), np.uint8))
