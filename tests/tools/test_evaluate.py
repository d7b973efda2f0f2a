"""`mdm evaluate` on a tiny random checkpoint: every figure is there, is a share, and a wrong call is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch (extra export) is not installed")

from safetensors.torch import save_file  # noqa: E402

from mdm.reference import Result, Tokenizer, load_config  # noqa: E402
from mdm.reference.checkpoint import build_model  # noqa: E402
from mdm.reference.multimodal import MDM  # noqa: E402
from mdm.reference.world import language, measure  # noqa: E402
from mdm.reference.world.detect import detect  # noqa: E402
from mdm.reference.world.render import render  # noqa: E402
from mdm.reference.world.scene import COLOURS, COUNTS, PLACES, SHAPES, SIZES, Scene, all_scenes, held_out  # noqa: E402
from mdm.tools.main import main  # noqa: E402

Tiny = Callable[..., dict[str, Any]]
Out = pytest.CaptureFixture[str]
VALUES: dict[str, tuple[Any, ...]] = dict(
    zip(("count", "size", "colour", "shape", "place"), (COUNTS, SIZES, COLOURS, SHAPES, PLACES), strict=True)
)
UNSEEN = [scene for scene in all_scenes() if held_out(scene)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(config: dict[str, Any]) -> None:
    Path("tiny.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(build_model(load_config(config)).state_dict(), "a.safetensors")


def evaluate(*words: str) -> int:
    return main(["evaluate", "a.safetensors", "--preset", "tiny.json", "--count", "3", "--steps", "2", *words])


def test_every_figure_is_a_share_and_a_seed_decides_it(tiny: Tiny, capsys: Out) -> None:
    checkpoint(tiny())
    outputs = []
    for _ in range(2):
        assert evaluate("--json") == 0
        out, err = capsys.readouterr()
        assert err == ""
        outputs.append(json.loads(out))
    assert outputs[0] == outputs[1]
    assert outputs[0]["count"] == 3
    figures = outputs[0]["figures"]
    assert all(0 <= value <= 1 for value in figures.values())
    for start in ("text to image", "caption", "question", "joint", "class to image", "dialogue turn"):
        assert any(name.startswith(start) for name in figures), start


def test_a_person_sees_a_table(tiny: Tiny, capsys: Out) -> None:
    checkpoint(tiny())
    assert evaluate("--solver", "dpmpp_2m", "--guidance", "0", "--seed", "3") == 0
    out, _ = capsys.readouterr()
    assert "caption: exact" in out
    assert "80%" in out


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"in_channels": 4}, [], "32, 32, 4]"),
        ({"image_size": 16}, [], "[16, 16, 3]"),
        ({"family": "dim"}, [], "family 'dim'"),
        ({}, ["--preset", "dim-small"], "lacks the tensor"),
        ({}, ["--preset", "mdm-tny"], "did you mean 'mdm-tiny'"),
        ({}, ["--solver", "dpmp_2m"], "did you mean 'dpmpp_2m'"),
        ({}, ["--tokenizer", "tiny.json"], "not a SentencePiece model"),
        ({}, ["--guidance", "-1"], "guidance"),
        ({}, ["--guidance", "nan"], "guidance"),
        ({}, ["--count", "0"], "count"),
        ({"vocabulary": 30}, [], "vocabulary 30"),
    ],
)
def test_a_wrong_call_is_2(tiny: Tiny, capsys: Out, changes: dict[str, Any], words: list[str], said: str) -> None:
    checkpoint(tiny(**changes))
    code = evaluate(*words)
    out, err = capsys.readouterr()
    assert said in err
    assert code == 2
    assert len(err[err.index("Error: ") :].splitlines()) <= 3
    assert out == ""


def fake(scenes: Callable[..., list[Scene]], texts: Callable[..., list[str]]) -> Callable[..., Result]:
    """A generator that draws and says what these functions make of a request."""

    def run(model: MDM, tokenizer: Tokenizer, task: str, **inputs: Any) -> Result:
        drawn = measure.to_picture(np.stack([render(scene) for scene in scenes(task, inputs)]))
        return Result(texts(task, inputs), drawn, drawn)

    return run


def seen(inputs: dict[str, Any]) -> list[Scene]:
    """The scenes of the given pictures, through the detector."""
    found = [detect(pixels).scene for pixels in measure.to_pixels(inputs["pictures"])]
    return [scene for scene in found if scene is not None]


def right_scenes(task: str, inputs: dict[str, Any]) -> list[Scene]:
    match task:
        case "text_to_image":
            return [scene for text in inputs["prompts"] if (scene := language.parse_caption(text))]
        case "class_to_image":
            return [next(s for s in UNSEEN if s.shape == SHAPES[y]) for y in inputs["classes"]]
        case "turn":
            asked = [prompt.split(". ")[1] for prompt in inputs["prompts"]]
            return [dict(language.changes(s))[ask] for s, ask in zip(seen(inputs), asked, strict=True)]
    return UNSEEN[: inputs.get("batch") or len(inputs.get("prompts") or inputs["pictures"])]


def right_texts(task: str, inputs: dict[str, Any]) -> list[str]:
    match task:
        case "ask":
            pairs = zip(seen(inputs), inputs["prompts"], strict=True)
            return [dict(language.questions(scene))[question] for scene, question in pairs]
        case "complete":
            items = dict(item for scene in all_scenes() for item in language.described_questions(scene))
            return [items[prompt] for prompt in inputs["prompts"]]
        case "caption":
            return [language.caption(scene) for scene in seen(inputs)]
    return [language.caption(scene) for scene in right_scenes(task, inputs)]


def test_a_perfect_model_has_all_and_a_wrong_one_nothing(
    tiny_model: Callable[..., MDM], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure measured: also that all it asks for is held out of training."""
    asked: list[Scene] = []

    def noting(task: str, inputs: dict[str, Any]) -> list[Scene]:
        scenes = right_scenes(task, inputs)
        asked.extend(scenes if "pictures" not in inputs else [*scenes, *seen(inputs)])
        return scenes

    monkeypatch.setattr(measure, "generate", fake(noting, right_texts))
    figures = measure.measure(tiny_model(), tokenizer, count=120)
    assert {figure.name: figure.value for figure in figures} == dict.fromkeys((f.name for f in figures), 1.0)
    assert all(map(held_out, asked))
    assert len(set(asked)) == len(UNSEEN)

    def wrong(task: str, inputs: dict[str, Any]) -> list[Scene]:
        return [
            Scene(*(other(values, getattr(scene, name)) for name, values in VALUES.items()))
            for scene in right_scenes(task, inputs)
        ]

    monkeypatch.setattr(measure, "generate", fake(wrong, lambda *a: [f"{text} red" for text in right_texts(*a)]))
    figures = measure.measure(tiny_model(), tokenizer, count=60)
    assert [figure for figure in figures if figure.value] == []


def other(values: tuple[Any, ...], value: Any) -> Any:
    return values[(values.index(value) + 1) % len(values)]
