"""Pictures for people: several on one sheet, each with a line of text below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MARGIN, TEXT, LINE, LINES = 14, 14, 18, 4  # pixels around a picture, of a letter and of a line; lines below a picture
LEGIBLE = 160  # pixels; a smaller picture is enlarged to at least that many
COLUMNS = 8
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (120, 120, 128)

Pixels = npt.NDArray[np.uint8]  # [H,W,C]
Cell = tuple[Pixels, str]  # a picture and what stands below it


def image_of(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def enlarged(pixels: Pixels) -> Image.Image:
    """By a whole factor and without blur: every pixel of the model's stays a square."""
    image = image_of(pixels)
    factor = -(-LEGIBLE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def rows_of(cells: Sequence[Cell], batch: int) -> list[Sequence[Cell]]:
    """Rows for each prompt's `batch` samples; where each has but one, all share the rows, equally filled."""
    group = batch if batch > 1 else len(cells)
    length = -(-group // -(-group // COLUMNS))
    groups = [cells[first : first + group] for first in range(0, len(cells), group)]
    return [one[first : first + length] for one in groups for first in range(0, len(one), length)]


def draw_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Rows of captioned pictures; the largest picture sets the width of all columns."""
    shown = [[(enlarged(pixels), text) for pixels, text in row] for row in rows]
    width = max(image.width for row in shown for image, _ in row)
    font = ImageFont.load_default(TEXT)
    wrapped = [[wrap(text, width, font) for _, text in row] for row in shown]
    heights = [
        MARGIN + max(image.height for image, _ in row) + LINE * max(map(len, lines))
        for row, lines in zip(shown, wrapped, strict=True)
    ]
    columns = max(map(len, shown))
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), sum(heights) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, lines, height in zip(shown, wrapped, heights, strict=True):
        for column, (image, _) in enumerate(row):
            left, bottom = MARGIN + column * (width + MARGIN), top + image.height
            sheet.paste(image, (left, top))
            pen.rectangle((left - 1, top - 1, left + image.width, bottom), outline=FAINT)
            for number, line in enumerate(lines[column]):
                pen.text((left, bottom + 3 + number * LINE), line, INK, font)
        top += height
    return sheet


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in lines that fit the width, cut after the last that is shown."""
    for letters in range(width // 4, 4, -1):
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" ...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
