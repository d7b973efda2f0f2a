"""What `tools/demo` runs, from the shipped checkpoint to pictures: export with validation, then every task by the
runtime, from the bundle alone. Prompts and pictures are held out of training: none of it was learnt by heart.

    out/mdm-tiny.bundle/   the bundle
    out/demo.png           all on one sheet; what is given stands there in grey, what was made in black
    out/demo/              each picture by itself: given-0.png, text_to_image-0.png, ...; results.jsonl has a line each
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mdm.export import export_bundle
from mdm.plugins.errors import InputError
from mdm.reference import SHIPPED_CHECKPOINT
from mdm.reference.world.language import caption, changes, described_questions, dialogue_prompt, questions
from mdm.reference.world.render import render
from mdm.reference.world.scene import SHAPES, Scene, all_scenes, held_out
from mdm.runtime import Pipeline, Result, load
from mdm.tools.main import report
from mdm.tools.options import FILE
from mdm.tools.result_files import record_of
from mdm.tools.sheet import FAINT, INK, LEGIBLE, LINE, MARGIN, PAPER, TEXT, Pixels, enlarged, wrap

COLUMNS = 6  # cells in a row
HEAD, LINES, LINES_ALONE = 30, 3, 4  # pixels of a title; lines of text below a picture, and where there is none
LEGEND = "Made by ONNX Runtime from the exported bundle. Grey text is given, black text is generated."


class Cell(NamedTuple):
    """A picture and the text below it, or text alone."""

    pixels: Pixels | None
    given: str = ""
    made: str = ""


class Section(NamedTuple):
    title: str
    cells: list[Cell]
    results: Sequence[Result] = ()


def draw_sheet(sections: Sequence[Section]) -> Image.Image:
    """The sections one below the other, each a title and a row. Its size depends on their number alone, not on how
    long the texts are."""
    heights = [
        MARGIN + HEAD + (LEGIBLE + LINES * LINE if any(c.pixels is not None for c in cells) else LINES_ALONE * LINE)
        for _, cells, _ in sections
    ]
    size = (MARGIN + COLUMNS * (LEGIBLE + MARGIN), 2 * MARGIN + LINE + sum(heights))
    sheet, font, large = Image.new("RGB", size, PAPER), ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 4)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), LEGEND, FAINT, font)
    top = 2 * MARGIN + LINE
    for (title, cells, _), height in zip(sections, heights, strict=True):
        pen.text((MARGIN, top), title, INK, large)
        for column, cell in enumerate(cells):
            left, line = MARGIN + column * (LEGIBLE + MARGIN), top + HEAD
            if cell.pixels is not None:
                sheet.paste(enlarged(cell.pixels), (left, line))
                pen.rectangle((left - 1, line - 1, left + LEGIBLE, line + LEGIBLE), outline=FAINT)
                line += LEGIBLE + 4
            words = [(text, ink) for text, ink in ((cell.given, FAINT), (cell.made, INK)) if text]
            lines = [(part, ink) for text, ink in words for part in wrap(text, LEGIBLE, font)]
            for number, (part, ink) in enumerate(lines[: LINES if cell.pixels is not None else LINES_ALONE]):
                pen.text((left, line + number * LINE), part, ink, font)
        top += height
    return sheet


def scenes_of_demo(count: int) -> list[Scene]:
    """Held-out scenes, spread over colours, shapes and places."""
    unseen = [scene for scene in all_scenes() if held_out(scene)]
    return [unseen[i] for i in np.random.default_rng(138).permutation(len(unseen))[:count]]


def run_tasks(pipeline: Pipeline, folder: Path, seed: int) -> Iterator[Section]:
    """Every task; the pictures that are given lie in the folder, as a user's would."""
    scenes = scenes_of_demo(COLUMNS)
    shown = [render(scene) for scene in scenes]
    files = [save(folder / f"given-{number}.png", pixels) for number, pixels in enumerate(shown)]

    prompts = [caption(scene) for scene in scenes]
    made = pipeline.generate(prompts, seed=seed)
    yield Section("text to picture", [Cell(r.picture, p) for r, p in zip(made, prompts, strict=True)], made)

    labels = [number % len(SHAPES) for number in range(COLUMNS)]
    made = pipeline.generate(label=labels, seed=seed, sample=list(range(COLUMNS)))
    cells = [Cell(r.picture, f"class {y}: {SHAPES[y]}") for r, y in zip(made, labels, strict=True)]
    yield Section("class to picture: the class tells the shape, and nothing else", cells, made)

    made = pipeline.caption(files, seed=seed)
    cells = [Cell(pixels, "", r.text or "") for r, pixels in zip(made, shown, strict=True)]
    yield Section("picture to text", cells, made)

    asked = [questions(scene)[number % 5][0] for number, scene in enumerate(scenes)]
    made = pipeline.ask(files, asked, seed=seed)
    cells = [Cell(pixels, q, r.text or "") for r, pixels, q in zip(made, shown, asked, strict=True)]
    yield Section("question about a picture", cells, made)

    told = [described_questions(scene)[number % 5][0] for number, scene in enumerate(scenes)]
    made = pipeline.complete(told, seed=seed)
    yield Section("text to text", [Cell(None, t, r.text or "") for r, t in zip(made, told, strict=True)], made)

    made = pipeline.joint(batch=COLUMNS, seed=seed)
    yield Section("picture and text together", [Cell(r.picture, "", r.text or "") for r in made], made)

    half = COLUMNS // 2
    turns = [dialogue_prompt(caption(scene), next_request(scene)) for scene in scenes[:half]]
    made = pipeline.turn(files[:half], turns, seed=seed)
    pairs = [(Cell(shown[n], turns[n]), Cell(made[n].picture, "", made[n].text or "")) for n in range(half)]
    yield Section("a turn of a dialogue: picture and request to new picture and text", [*sum(pairs, ())], made)


def next_request(scene: Scene) -> str:
    """What a turn asks for: a change to another scene that is held out too."""
    return next(request for request, new in changes(scene) if held_out(new))


def save(path: Path, pixels: Pixels) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def keep(results: Sequence[Result], folder: Path, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Save the pictures that were made; what stands in `results.jsonl` of each result."""
    for number, result in enumerate(results):
        record = record_of(result, manifest)
        if result.picture is not None:
            record["file"] = save(folder / f"{result.request.task}-{number}.png", result.picture).name
        yield record


@click.command()
@click.option("--out", type=FILE, default="out/demo.png", show_default=True, help="The sheet; the rest goes beside it.")
@click.option("--seed", default=0, show_default=True)
def command(out: Path, seed: int) -> None:
    """Export the shipped checkpoint, then run every task from the bundle."""
    if out.suffix != ".png":
        raise InputError(f"--out is '{out}', expected a file's name that ends in .png")
    bundle, folder = out.parent / "mdm-tiny.bundle", out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    begin = start = time.monotonic()
    export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", bundle, force=True)
    click.echo(f"{time.monotonic() - start:5.1f} s  export, validated against the PyTorch model")

    start = time.monotonic()
    pipeline = load(bundle)
    sections: list[Section] = []
    records: list[dict[str, Any]] = []
    for section in run_tasks(pipeline, folder, seed):
        click.echo(f"{time.monotonic() - start:5.1f} s  {section.title}")
        for cell in section.cells:
            click.echo(f"{'':9}{' -> '.join(text for text in (cell.given, cell.made) if text)}")
        sections.append(section)
        records += keep(section.results, folder, pipeline.model.manifest)
        start = time.monotonic()
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_sheet(sections).save(out)
    click.echo(f"{time.monotonic() - begin:5.1f} s  in all")
    click.echo(f"\n{out}: everything on one sheet\n{folder}: each picture, and results.jsonl\n{bundle}: the bundle")


if __name__ == "__main__":
    try:
        command(prog_name="tools/demo", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error, as_json=False))
