"""What `tools/demo` runs: every kind of task on the shipped checkpoint, as one picture with its prompts.

Prompts and pictures are held out of training, so none of what it shows was learnt by heart.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER, Tokenizer, generate, load_model
from mdm.reference.multimodal import MDM
from mdm.reference.world.language import caption, questions
from mdm.reference.world.measure import to_picture, to_pixels
from mdm.reference.world.render import render
from mdm.reference.world.scene import Scene, all_scenes, held_out

COLUMNS, ZOOM, MARGIN, CAPTION = 6, 5, 14, 56  # pictures in a row; screen pixels a pixel; pixels around and below
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (120, 120, 128)

Section = tuple[str, list[tuple[NDArray[np.uint8], str]]]  # title, pictures with what stands below them


def draw_sheet(sections: list[Section]) -> Image.Image:
    """The sections one below the other, each a title and a row of captioned pictures."""
    cell = 32 * ZOOM
    width = MARGIN + COLUMNS * (cell + MARGIN)
    row, head = cell + CAPTION, 40
    sheet = Image.new("RGB", (width, len(sections) * (row + head) + MARGIN), PAPER)
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(18)
    for number, (title, items) in enumerate(sections):
        top = number * (row + head) + MARGIN
        pen.text((MARGIN, top), title, INK, large)
        for column, (pixels, text) in enumerate(items):
            x, y = MARGIN + column * (cell + MARGIN), top + head - MARGIN
            sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline=FAINT)
            pen.multiline_text(
                (x, y + cell + 5), "\n".join(textwrap.wrap(text, 23, max_lines=3, placeholder=" ...")), INK, small
            )
    return sheet


def scenes_of_demo(count: int) -> list[Scene]:
    """Held-out scenes, spread over colours, shapes and places."""
    unseen = [scene for scene in all_scenes() if held_out(scene)]
    return [unseen[i] for i in np.random.default_rng(138).permutation(len(unseen))[:count]]


def run_tasks(model: MDM, tokenizer: Tokenizer, seed: int) -> list[Section]:
    scenes = scenes_of_demo(COLUMNS)
    shown = np.stack([render(scene) for scene in scenes])
    prompts = [caption(scene) for scene in scenes]
    asked = [questions(scene)[i % 5][0] for i, scene in enumerate(scenes)]

    drawn = generate(model, tokenizer, "text_to_image", prompts=prompts, seed=seed)
    told = generate(model, tokenizer, "caption", pictures=to_picture(shown), seed=seed)
    answered = generate(model, tokenizer, "ask", prompts=asked, pictures=to_picture(shown), seed=seed)
    joint = generate(model, tokenizer, "joint", batch=COLUMNS, seed=seed)
    assert drawn.pictures is not None
    assert joint.pictures is not None
    answers = [f"{question} {answer}" for question, answer in zip(asked, answered.texts, strict=True)]
    return [
        ("text to picture: the prompt stands below", list(zip(to_pixels(drawn.pictures), prompts, strict=True))),
        ("picture to text: the caption is generated", list(zip(shown, told.texts, strict=True))),
        ("question about a picture: the answer is generated", list(zip(shown, answers, strict=True))),
        (
            "joint: picture and caption generated together",
            list(zip(to_pixels(joint.pictures), joint.texts, strict=True)),
        ),
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="out/demo.png", show_default=True)
@click.option("--seed", default=0, show_default=True)
def command(out: Path, seed: int) -> None:
    model = load_model(SHIPPED_CHECKPOINT, "mdm-tiny")
    assert isinstance(model, MDM)
    sections = run_tasks(model, Tokenizer(SHIPPED_TOKENIZER), seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(sections).save(out)
    for title, items in sections:
        click.echo(f"\n{title}")
        for _, text in items:
            click.echo(f"  {text}")
    click.echo(f"\nThe pictures are in {out}")


if __name__ == "__main__":
    sys.exit(command())
