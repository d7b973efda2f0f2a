"""The commands that run a bundle, on tiny models with random weights: what each prints and writes, and refuses."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

from safetensors.torch import save_file  # noqa: E402

from mdm.export import export_bundle  # noqa: E402
from mdm.reference import SHIPPED_TOKENIZER, load_config  # noqa: E402
from mdm.reference.checkpoint import build_model  # noqa: E402
from mdm.runtime import load  # noqa: E402
from mdm.tools.main import main  # noqa: E402

Tiny = Callable[..., dict[str, Any]]
Out = pytest.CaptureFixture[str]
RED, BLUE = "two big red circles", "one small blue cross"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tiny_model: Callable[..., Any]) -> Path:
    """A folder with an MDM, and a DiM on latents that has no autoencoder."""
    folder = tmp_path_factory.mktemp("bundles")
    latent = tiny(family="dim", in_channels=4, sampler={"solver": "ddim", "steps": 3, "guidance": 0.4})
    for name, config in (("mdm", tiny()), ("latent", latent)):
        model = tiny_model() if name == "mdm" else build_model(load_config(config))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        tokenizer = SHIPPED_TOKENIZER if name == "mdm" else None
        export_bundle(
            folder / f"{name}.safetensors", config, folder / f"{name}.bundle", tokenizer=tokenizer, validate=False
        )
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder with the bundles and a picture."""
    monkeypatch.chdir(tmp_path)
    for name in ("mdm.bundle", "latent.bundle"):
        os.symlink(bundles / name, name)
    Image.new("RGB", (40, 30), "red").save("red.png")
    Image.new("RGB", (32, 32), "blue").save("blue.png")


INPUTS = {"mdm.bundle", "latent.bundle", "red.png", "blue.png"}


def entries(folder: str = ".") -> set[str]:
    return set(os.listdir(folder)) - INPUTS


def records(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def same(path: str, picture: Any) -> bool:
    return np.array_equal(pixels(path), picture)


def results(capsys: Out) -> list[dict[str, Any]]:
    """What --json printed."""
    out, err = capsys.readouterr()
    assert err == ""
    said = json.loads(out)
    assert said.keys() == {"results", "seconds"}
    return list(said["results"])


# ----------------------------------------------------------------------------------------------------- the verbs


def test_generate_writes_numbered_pictures_and_a_sheet(capsys: Out) -> None:
    assert main(["generate", "mdm.bundle", RED, BLUE, "--batch", "2", "--seed", "7"]) == 0
    assert capsys.readouterr() == (
        f"out/0000.png  {RED}\nout/0001.png  {RED}\nout/0002.png  {BLUE}\nout/0003.png  {BLUE}\n"
        "out/0000-0003-grid.png  4 pictures\n",
        "",
    )
    assert entries("out") == {*(f"000{i}.png" for i in range(4)), "0000-0003-grid.png", "results.jsonl"}
    expected = load("mdm.bundle").generate([RED, BLUE], batch=2, seed=7)
    assert all(same(f"out/000{i}.png", one.picture) for i, one in enumerate(expected))
    assert main(["generate", "mdm.bundle", RED]) == 0
    assert [record["file"] for record in records()] == [f"000{i}.png" for i in range(5)]


def test_classes_alone_and_with_a_prompt(capsys: Out) -> None:
    assert main(["generate", "mdm.bundle", "--label", "0", "--label", "3"]) == 0
    assert main(["generate", "mdm.bundle", RED, "--label", "1"]) == 0
    assert [(record["task"], record["label"]) for record in records()] == [
        ("class_to_image", 0), ("class_to_image", 3), ("text_to_image", 1),
    ]  # fmt: skip
    assert "out/0001.png  class 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["caption", "mdm.bundle", "red.png", "blue.png"], 2),
        (["ask", "mdm.bundle", "red.png", "what colour?", "--batch", "2"], 2),
        (["complete", "mdm.bundle", RED], 1),
    ],
)
def test_text_is_a_line_a_result_and_writes_nothing(words: list[str], count: int, capsys: Out) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err, entries()) == (count, "", set())
    assert main([*words, "--json", "--out", "out"]) == 0
    found = results(capsys)
    assert out == "".join(f"{one['text']}\n" for one in found)
    assert records() == found
    assert entries("out") == {"results.jsonl"}


@pytest.mark.parametrize("words", [["joint", "mdm.bundle"], ["turn", "mdm.bundle", "red.png", "now blue"]])
def test_picture_and_text_come_together(words: list[str], capsys: Out) -> None:
    assert main([*words, "--out", "x.png", "--json"]) == 0
    (one,) = results(capsys)
    assert one["file"] == "x.png"
    assert one.get("picture") == ("red.png" if words[0] == "turn" else None)
    assert isinstance(one["text"], str)
    assert main([*words, "--out", "x.png"]) == 0
    assert capsys.readouterr().out == f"x.png  {one['text']}".rstrip() + "\n"
    assert entries() == {"x.png"}


def test_settings_have_the_names_they_have_in_python(capsys: Out) -> None:
    settings: dict[str, Any] = {
        "solver": "dpmpp_2m", "steps": 2, "guidance": 0.5, "spacing": "logsnr", "t_start": 0.9, "t_end": 0.1,
        "final_zero": False, "order": 1, "predict_x0": True, "solver_type": "heun", "lower_order_final": False,
    }  # fmt: skip
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert main(["generate", "mdm.bundle", RED, "--negative", BLUE, "--size", "32", "--json", *words]) == 0
    (one,) = results(capsys)
    assert settings.items() <= one.items()
    assert (one["negative"], one["size"], one["file"]) == (BLUE, 32, "out/0000.png")
    (expected,) = load("mdm.bundle").generate(RED, negative=BLUE, **settings)
    assert same("out/0000.png", expected.picture)


def test_drafts_and_a_filmstrip(capsys: Out) -> None:
    assert main(["joint", "mdm.bundle", "--steps", "5", "--preview", "2", "--filmstrip"]) == 0
    assert entries("out") == {
        "0000.png", "0000-step02.png", "0000-step04.png", "0000-filmstrip.png", "results.jsonl",
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "out/0000-filmstrip.png  5 evaluations"
    assert [line[:11] for line in err.splitlines()] == ["0000-step02", "0000-step04"]
    assert [draft["step"] for draft in records()[0]["drafts"]] == [2, 4]
    assert not np.array_equal(pixels("out/0000-step02.png"), pixels("out/0000.png"))


def test_latents_without_autoencoder_are_kept_and_explained(capsys: Out) -> None:
    words = ["generate", "latent.bundle", "--label", "0", "--preview", "1", "--filmstrip"]
    assert main([*words, "--label", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "out/0000.npy  class 0\nout/0001.npy  class 1\n"
    assert "this bundle has no autoencoder" in err
    (_, expected) = load("latent.bundle").generate(label=[0, 1])
    assert np.array_equal(np.load("out/0001.npy"), expected.latents)
    assert entries("out") == {"0000.npy", "0001.npy", "results.jsonl"}
    assert main([*words, "--out", "x.png"]) == 0
    assert "x.npy  class 0\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ requests from files


def test_a_picture_made_here_can_be_made_again_and_varied(capsys: Out) -> None:
    assert main(["generate", "mdm.bundle", RED, "--seed", "5", "--steps", "2", "--batch", "2"]) == 0
    assert main(["generate", "mdm.bundle", "--from", "out/0001.png", "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("out/0001.png").read_bytes()
    assert main(["generate", "mdm.bundle", "--from", "out/0001.png", "--seed", "6", "--out", "other.png"]) == 0
    assert not np.array_equal(pixels("other.png"), pixels("out/0001.png"))
    assert capsys.readouterr().err == ""
    assert str(Path.cwd()).encode() not in Path("again.png").read_bytes()
    assert main(["generate", "latent.bundle", "--from", "again.png"]) == 2
    assert "no task 'text_to_image'" in capsys.readouterr().err


def test_another_checkpoints_picture_is_made_with_a_warning(capsys: Out) -> None:
    assert main(["generate", "mdm.bundle", "--label", "1", "--out", "x.png"]) == 0
    assert main(["generate", "latent.bundle", "--from", "x.png"]) == 0
    assert "x.png was made by another checkpoint than this bundle's: the result will differ" in capsys.readouterr().err


def test_lines_come_before_the_command_line(capsys: Out) -> None:
    lines = [{"prompt": RED, "steps": 2}, {"prompt": BLUE}, {"label": 2, "seed": 9}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "mdm.bundle", "--from", "in.jsonl", "--steps", "4", "--json"]) == 0
    found = results(capsys)
    assert [(one["task"], one["steps"], one["seed"]) for one in found] == [
        ("text_to_image", 2, 0), ("text_to_image", 4, 0), ("class_to_image", 4, 9),
    ]  # fmt: skip


def test_many_questions_about_one_picture_and_one_caption_a_line(capsys: Out) -> None:
    Path("questions.txt").write_text("what colour?\nhow many?\n")
    assert main(["ask", "mdm.bundle", "red.png", "--from", "questions.txt", "--json"]) == 0
    assert [(one["prompt"], one["picture"]) for one in results(capsys)] == [
        ("what colour?", "red.png"), ("how many?", "red.png"),
    ]  # fmt: skip
    Path("pictures.txt").write_text("red.png\nblue.png\n")
    assert main(["caption", "mdm.bundle", "--from", "pictures.txt", "--json"]) == 0
    assert [one["picture"] for one in results(capsys)] == ["red.png", "blue.png"]


# -------------------------------------------------------------------------------------------------------- wrong use

WRONG: dict[str, tuple[list[str], str]] = {
    "solver": (["generate", "mdm.bundle", RED, "--solver", "hune"], "did you mean 'heun'"),
    "spacing": (["generate", "mdm.bundle", RED, "--spacing", "karas"], "did you mean 'karras'"),
    "steps": (["generate", "mdm.bundle", RED, "--steps", "0"], "steps is 0, expected 1 to"),
    "steps in words": (["generate", "mdm.bundle", RED, "--steps", "ten"], "'ten' is not a valid integer"),
    "long prompt": (["generate", "mdm.bundle", " ".join([RED] * 9)], "shorten it"),
    "unknown word": (["complete", "mdm.bundle", "an elephant"], "does not know 'an', 'elephant'"),
    "no prompt": (["generate", "mdm.bundle"], "expected: mdm generate BUNDLE PROMPT, or --label N, or --from FILE"),
    "no picture": (["caption", "mdm.bundle"], "expected: mdm caption BUNDLE PICTURE..., or --from FILE"),
    "no question": (["ask", "mdm.bundle", "red.png"], "expected: mdm ask BUNDLE PICTURE PROMPT, or --from FILE"),
    "not a picture": (["caption", "mdm.bundle", "mdm.bundle/manifest.json"], "is not a picture"),
    "missing picture": (["caption", "mdm.bundle", "none.png"], "none.png"),
    "bomb": (["caption", "mdm.bundle", "bomb.png"], "expected at most"),
    "missing bundle": (["joint", "none.bundle"], "bundle 'none.bundle' is not a folder"),
    "task": (["caption", "latent.bundle", "red.png"], "this model has no task 'caption'"),
    "label": (["generate", "mdm.bundle", "--label", "4"], "label is 4, expected 0 to 3"),
    "negative": (["generate", "mdm.bundle", "--label", "1", "--negative", RED], "takes no negative prompt"),
    "no negative": (["complete", "mdm.bundle", RED, "--negative", BLUE], "--negative"),
    "preview": (["joint", "mdm.bundle", "--preview", "0"], "0 is not in the range"),
    "batch": (["joint", "mdm.bundle", "--batch", "0"], "0 is not in the range"),
    "seed": (["joint", "mdm.bundle", "--seed", "-1"], "seed is -1"),
    "size": (["joint", "mdm.bundle", "--size", "48"], "pictures are of 32"),
    "upsample": (["generate", "mdm.bundle", RED, "--upsample", "2"], "export it with --upsample 2"),
    "prompt for a picture": (["ask", "mdm.bundle", "what colour?", "red.png"], "does not know 'red.png'"),
    "backend": (["joint", "mdm.bundle", "--backend", "ort-gpu"], "did you mean 'ort-cpu'"),
    "threads": (["joint", "mdm.bundle", "--threads", "0"], "threads is 0"),
    "profile": (["joint", "mdm.bundle", "--profile", "edge"], "backend 'ort-cpu' has no profiles"),
    "memory": (["joint", "mdm.bundle", "--memory", "lots"], "is not a size of memory"),
    "option": (["joint", "mdm.bundle", "--order", "2", "--solver", "ddim"], "'ddim' has no option 'order'"),
    "out": (["joint", "mdm.bundle", "--batch", "2", "--out", "x.png"], "names one picture, but 2"),
    "from": (["generate", "mdm.bundle", RED, BLUE, "--from", "in.jsonl"], "2 more are given"),
    "line": (["generate", "mdm.bundle", "--from", "in.jsonl"], "file 'in.jsonl', line 2: label is 9, expected 0 to 3"),
    "foreign task": (["joint", "mdm.bundle", "--from", "in.jsonl"], "line 1: task is 'class_to_image', but mdm joint"),
}


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_2_in_three_lines_and_writes_nothing(case: str, capsys: Out) -> None:
    lines = [{"task": "class_to_image", "label": 0}, {"task": "class_to_image", "label": 9}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if case == "bomb":
        Image.new("1", (9000, 9000)).save("bomb.png")
    before = entries()
    words, said = WRONG[case]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert 1 <= len(err.splitlines()) <= 3
    assert entries() == before
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3, "'out/0001.png' cannot be written: No space left"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=["full", "interrupt"],
)
def test_what_was_finished_stays_when_a_run_is_stopped(
    error: BaseException, code: int, said: str, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def failing(path: Path, content: bytes) -> int:
        if "0001.png" in path.name:
            write(path, content[:9])
            raise error
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", failing)
    assert main(["generate", "mdm.bundle", RED, BLUE]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert entries("out") == {"0000.png", "results.jsonl"}
    assert [record["file"] for record in records()] == ["0000.png"]
