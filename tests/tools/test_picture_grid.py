"""The demo's sheet: every picture stands in its cell, no caption runs into what is below it, all scenes are unseen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

pytest.importorskip("torch", reason="torch (extra export) is not installed")

from mdm.reference import Tokenizer
from mdm.reference.multimodal import MDM
from mdm.reference.world.language import caption, questions
from mdm.reference.world.scene import COLOURS, PLACES, SHAPES, all_scenes, held_out
from mdm.tools import picture_grid as grid

CELL = 32 * grid.ZOOM


def picture(value: int) -> NDArray[np.uint8]:
    return np.full((32, 32, 3), value, np.uint8)


def sections(rows: int, columns: int, text: str = "") -> list[grid.Section]:
    return [
        (f"section {row}", [(picture(20 + 30 * row + 4 * column), text) for column in range(columns)])
        for row in range(rows)
    ]


def corner(row: int, column: int) -> tuple[int, int]:
    """Left and top of a picture."""
    height = CELL + grid.CAPTION + 40
    return grid.MARGIN + column * (CELL + grid.MARGIN), row * height + grid.MARGIN + 40 - grid.MARGIN


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("columns", [1, grid.COLUMNS])
def test_every_picture_stands_whole_in_its_cell(rows: int, columns: int) -> None:
    sheet = grid.draw_sheet(sections(rows, columns))
    assert sheet.mode == "RGB"
    assert sheet.width == grid.MARGIN + grid.COLUMNS * (CELL + grid.MARGIN)
    for row in range(rows):
        for column in range(columns):
            x, y = corner(row, column)
            assert x + CELL < sheet.width
            assert y + CELL < sheet.height
            part = np.asarray(sheet.crop((x, y, x + CELL, y + CELL)))
            assert (part == 20 + 30 * row + 4 * column).all()


def test_a_picture_is_enlarged_without_blur() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    x, y = corner(0, 0)
    part = grid.draw_sheet([("", [(pixels, "")])]).crop((x, y, x + CELL, y + CELL))
    assert np.array_equal(np.asarray(part), pixels.repeat(grid.ZOOM, 0).repeat(grid.ZOOM, 1))


def ink(text: str) -> tuple[int, int, int, int]:
    """Where a picture's caption in the middle of a sheet of two rows leaves ink."""
    with_text, without = sections(2, 3), sections(2, 3)
    with_text[0][1][1] = (with_text[0][1][1][0], text)
    box = ImageChops.difference(grid.draw_sheet(with_text), grid.draw_sheet(without)).getbbox()
    assert box is not None
    return box


LONGEST = max((caption(scene) for scene in all_scenes()), key=len)
ANSWERED = max((f"{question} {answer}" for s in all_scenes() for question, answer in questions(s)), key=len)
GARBLED = " ".join(["triangles"] * 8)  # what a bad joint run might say: a text of 8 tokens


@pytest.mark.parametrize("text", [LONGEST, ANSWERED, GARBLED], ids=["caption", "answer", "garbled"])
def test_a_caption_stays_below_its_picture_and_above_the_next_row(text: str) -> None:
    left, top, right, bottom = ink(text)
    x, y = corner(0, 1)
    title = grid.CAPTION + CELL + 40 + grid.MARGIN  # where the next section's title begins
    assert left >= x
    assert top > y + CELL
    assert right <= x + CELL + grid.MARGIN, f"runs {right - x - CELL} pixels into its neighbour"
    assert bottom <= title, f"ends {bottom - title} pixels below the next title's top"


def test_titles_fit_the_sheet(tiny_model: Callable[..., MDM], tokenizer: Tokenizer) -> None:
    """On a tiny random model: the demo's sections have the shape that the sheet wants."""
    made = grid.run_tasks(tiny_model(), tokenizer, seed=0)
    assert len(made) == 4
    pen, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(18)
    for title, items in made:
        assert len(items) == grid.COLUMNS
        assert pen.textlength(title, font) < grid.COLUMNS * CELL
        assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels, _ in items)
    prompts = [text for _, text in made[0][1]]
    assert prompts == [caption(scene) for scene in grid.scenes_of_demo(grid.COLUMNS)]
    assert all(text.startswith(questions(all_scenes()[0])[i % 5][0]) for i, (_, text) in enumerate(made[2][1]))
    grid.draw_sheet(made)


def test_the_demos_scenes_are_unseen_different_and_varied() -> None:
    scenes = grid.scenes_of_demo(grid.COLUMNS)
    assert len(set(scenes)) == grid.COLUMNS
    assert all(map(held_out, scenes))
    assert grid.scenes_of_demo(grid.COLUMNS) == scenes
    values = [len({getattr(s, name) for s in scenes}) for name in ("colour", "shape", "place")]
    print(f"of {len(COLOURS)} colours, {len(SHAPES)} shapes, {len(PLACES)} places the demo shows {values}")
    assert min(values) >= 3
