"""The demo: every task runs from a bundle, all scenes are unseen, every picture stands in its cell on the sheet, and no
text runs into what is beside or below it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont

pytest.importorskip("torch", reason="torch (extra export) is not installed")

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT
from mdm.reference.world.language import caption, changes, described_questions, dialogue_prompt, questions
from mdm.reference.world.scene import COLOURS, PLACES, SHAPES, all_scenes, held_out
from mdm.runtime import Pipeline, load
from mdm.tools import demo_run as demo
from mdm.tools.demo_run import Cell, Section
from mdm.tools.sheet import LEGIBLE, LINE, MARGIN, Pixels

TOP = 2 * MARGIN + LINE + demo.HEAD  # of the first section's pictures


def picture(value: int) -> Pixels:
    return np.full((32, 32, 3), value, np.uint8)


def sections(rows: int, columns: int) -> list[Section]:
    cells = [[Cell(picture(20 + 30 * row + 4 * column)) for column in range(columns)] for row in range(rows)]
    return [Section(f"section {row}", cells[row]) for row in range(rows)]


def corner(row: int, column: int) -> tuple[int, int]:
    """Left and top of a picture."""
    height = MARGIN + demo.HEAD + LEGIBLE + demo.LINES * LINE
    return MARGIN + column * (LEGIBLE + MARGIN), TOP + row * height


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("columns", [1, demo.COLUMNS])
def test_every_picture_stands_whole_in_its_cell(rows: int, columns: int) -> None:
    sheet = demo.draw_sheet(sections(rows, columns))
    assert sheet.mode == "RGB"
    assert sheet.width == MARGIN + demo.COLUMNS * (LEGIBLE + MARGIN)
    for row in range(rows):
        for column in range(columns):
            x, y = corner(row, column)
            assert x + LEGIBLE < sheet.width
            assert y + LEGIBLE < sheet.height
            part = np.asarray(sheet.crop((x, y, x + LEGIBLE, y + LEGIBLE)))
            assert (part == 20 + 30 * row + 4 * column).all()


def ink(cell: Cell) -> tuple[int, int, int, int]:
    """Where the text of a cell in the middle of a sheet of two rows leaves ink."""
    with_text, without = sections(2, 3), sections(2, 3)
    with_text[0].cells[1] = without[0].cells[1]._replace(given=cell.given, made=cell.made)
    box = ImageChops.difference(demo.draw_sheet(with_text), demo.draw_sheet(without)).getbbox()
    assert box is not None
    return box


def longest(texts: list[Cell]) -> Cell:
    return max(texts, key=lambda cell: len(cell.given) + len(cell.made))


SCENES = all_scenes()
TEXTS = {
    "caption": longest([Cell(None, "", caption(scene)) for scene in SCENES]),
    "answer": longest([Cell(None, *pair) for scene in SCENES for pair in questions(scene)]),
    "request": longest([Cell(None, dialogue_prompt(caption(s), ask)) for s in SCENES for ask, _ in changes(s)]),
    "garbled": Cell(None, "", " ".join(["triangles"] * 8)),  # what a bad run might say: a text of 8 tokens
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_stays_below_its_picture_and_above_the_next_row(name: str) -> None:
    left, top, right, bottom = ink(TEXTS[name])
    x, y = corner(0, 1)
    assert left >= x
    assert top > y + LEGIBLE
    assert right <= x + LEGIBLE + MARGIN, f"runs {right - x - LEGIBLE} pixels into its neighbour"
    assert bottom <= corner(1, 1)[1] - demo.HEAD, "runs into the next title"


def test_questions_on_texts_are_shown_whole() -> None:
    """Text alone has a line for everything, and its section is lower."""
    given, made = max((pair for scene in SCENES for pair in described_questions(scene)), key=lambda pair: len(pair[0]))
    sheet = demo.draw_sheet([Section("text", [Cell(None, given, made)]), *sections(1, 1)])
    assert sheet.height < demo.draw_sheet(sections(2, 1)).height
    font = ImageFont.load_default(demo.TEXT)
    lines = demo.wrap(given, LEGIBLE, font) + demo.wrap(made, LEGIBLE, font)
    assert " ".join(lines) == f"{given} {made}"
    assert len(lines) <= demo.LINES_ALONE


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    out = tmp_path_factory.mktemp("demo") / "tiny.bundle"
    return load(export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", out, validate=False), threads=1)


def test_every_task_is_run_and_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    made = list(demo.run_tasks(pipeline, tmp_path, seed=0))
    assert {result.request.task for section in made for result in section.results} == set(pipeline.tasks)
    pen, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(demo.TEXT + 4)
    sheet = demo.draw_sheet(made)
    for section in made:
        assert len(section.cells) == demo.COLUMNS
        assert pen.textlength(section.title, font) < sheet.width
        assert all(cell.given or cell.made for cell in section.cells)
    assert [cell.given for cell in made[0].cells] == [caption(scene) for scene in demo.scenes_of_demo(demo.COLUMNS)]
    for section in made:
        for record in demo.keep(section.results, tmp_path, pipeline.model.manifest):
            assert ("text" in record) == any(cell.made for cell in section.cells)
            for key in {"picture", "file"} & set(record):
                with Image.open(tmp_path / str(record[key])) as image:
                    assert image.size == (32, 32)


def test_the_demos_scenes_are_unseen_different_and_varied() -> None:
    scenes = demo.scenes_of_demo(demo.COLUMNS)
    assert len(set(scenes)) == demo.COLUMNS
    assert all(map(held_out, scenes))
    assert demo.scenes_of_demo(demo.COLUMNS) == scenes
    values = [len({getattr(s, name) for s in scenes}) for name in ("colour", "shape", "place")]
    print(f"of {len(COLOURS)} colours, {len(SHAPES)} shapes, {len(PLACES)} places the demo shows {values}")
    assert min(values) >= 3
    asked = {scene: demo.next_request(scene) for scene in scenes}
    assert all(held_out(dict(changes(scene))[request]) for scene, request in asked.items())


def test_it_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the validation and the tasks, which the README's test runs."""
    monkeypatch.setattr(demo, "export_bundle", lambda *given, force: export_bundle(*given, force=force, validate=False))
    first = demo.scenes_of_demo(1)
    section = Section("one", [Cell(picture(9), caption(first[0]))])
    monkeypatch.setattr(demo, "run_tasks", lambda *given: iter([section]))
    for _ in range(2):
        demo.command(["--out", str(tmp_path / "sheet.png")], standalone_mode=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sheet.png", "sheet", "mdm-tiny.bundle"}
    assert [json.loads(line) for line in (tmp_path / "sheet" / "results.jsonl").read_text().splitlines()] == []


@pytest.mark.parametrize("out", ["sheet.jpg", "sheet"])
def test_a_sheet_of_another_kind_is_refused_in_a_line(out: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mdm.tools.demo_run", "--out", out]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == f"Error: --out is '{out}', expected a file's name that ends in .png\n"
    assert list(tmp_path.iterdir()) == []
