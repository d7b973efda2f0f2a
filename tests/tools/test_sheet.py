"""Sheets: pictures whole, in their places and without blur; text below its own picture, within its width."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops, ImageFont

from mdm.tools.sheet import COLUMNS, LEGIBLE, LINES, MARGIN, TEXT, Cell, Pixels, draw_sheet, enlarged, rows_of, wrap


def picture(value: int, side: int = 32, channels: int = 3) -> Pixels:
    return np.full((side, side, channels), value, np.uint8)


@pytest.mark.parametrize(("side", "shown"), [(8, 160), (32, 160), (48, 192), (96, 192), (256, 256), (512, 512)])
def test_small_pictures_are_enlarged_by_whole_factors(side: int, shown: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    factor = shown // side
    assert np.array_equal(np.asarray(enlarged(pixels)), pixels.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize(
    ("count", "batch", "lengths"),
    [
        (3, 1, [3]), (9, 1, [5, 4]), (6, 3, [3, 3]), (20, 10, [5, 5, 5, 5]), (8, 8, [8]), (2, 8, [2]),
    ],
)  # fmt: skip
def test_a_prompts_samples_have_rows_of_their_own(count: int, batch: int, lengths: list[int]) -> None:
    cells: list[Cell] = [(picture(index), str(index)) for index in range(count)]
    rows = rows_of(cells, batch)
    assert [len(row) for row in rows] == lengths
    assert [text for row in rows for _, text in row] == [str(index) for index in range(count)]
    assert max(lengths) <= COLUMNS


@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_stands_whole_in_its_cell(channels: int) -> None:
    rows = [[(picture(40 * row + 10 * column, channels=channels), "") for column in range(3)] for row in range(2)]
    sheet = draw_sheet(rows)
    assert sheet.size == (MARGIN + 3 * (LEGIBLE + MARGIN), MARGIN + 2 * (LEGIBLE + MARGIN))
    for row in range(2):
        for column in range(3):
            left, top = MARGIN + column * (LEGIBLE + MARGIN), MARGIN + row * (LEGIBLE + MARGIN)
            part = np.asarray(sheet.crop((left, top, left + LEGIBLE, top + LEGIBLE)))
            assert (part == 40 * row + 10 * column).all()


@pytest.mark.parametrize("text", ["two big red circles on the left", "W" * 300, "triangles " * 40])
def test_a_text_leaves_ink_below_its_own_picture_alone(text: str) -> None:
    """The longest text sets the height of its row, so both sheets have the same size."""
    long = "word " * 100
    with_text, without = ([[(picture(9), long), (picture(9), one), (picture(9), "")]] for one in (text, ""))
    box = ImageChops.difference(draw_sheet(with_text), draw_sheet(without)).getbbox()
    assert box is not None
    left, top = MARGIN + LEGIBLE + MARGIN, MARGIN + LEGIBLE
    assert left - 1 <= box[0] < box[2] <= left + LEGIBLE + 1
    assert top < box[1] < box[3] <= draw_sheet(with_text).height


def test_a_long_text_is_cut_visibly() -> None:
    font = ImageFont.load_default(TEXT)
    lines = wrap("one two three " * 30, 160, font)
    assert len(lines) == LINES
    assert lines[-1].endswith(" ...")
    assert wrap("", 160, font) == []


def test_pictures_of_several_sizes_share_a_sheet() -> None:
    sheet = draw_sheet([[(picture(1, 300), "a"), (picture(2, 32), "b")], [(picture(3, 64), "c")]])
    assert sheet.width == MARGIN + 2 * (300 + MARGIN)
    assert sheet.getpixel((MARGIN + 300 + MARGIN, MARGIN)) == (2, 2, 2)
