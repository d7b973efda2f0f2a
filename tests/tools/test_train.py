"""`mdm train` from end to end on a tiny config, in this process; and that a wrong call writes nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch (extra export) is not installed")

from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from mdm.reference import PRESETS, SHIPPED_TOKENIZER, load_config, load_model  # noqa: E402
from mdm.reference.checkpoint import build_model  # noqa: E402
from mdm.tools.main import main  # noqa: E402

Tiny = Callable[..., dict[str, Any]]
Out = pytest.CaptureFixture[str]
SHORT = ["--steps", "2", "--vae-steps", "3", "--batch", "4"]
CAPTIONS = ("two big red circles", "one small blue cross", "three green squares at the top", "one black triangle")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def world(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mdm-tiny`, the preset that has the picture world, is tiny."""
    monkeypatch.setitem(PRESETS, "mdm-tiny", tiny())


@pytest.fixture
def config(tmp_path: Path, tiny: Tiny) -> Callable[..., str]:
    """config(name, keep=0.5, ...): writes a tiny config as JSON and gives its path."""

    def written(name: str = "tiny.json", **changes: Any) -> str:
        (tmp_path / name).write_text(json.dumps(tiny(**changes)))
        return name

    return written


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """A folder of 8 pictures with captions and classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": CAPTIONS[i % 4], "class": i % 4}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return "pictures"


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


def test_a_world_is_trained_on_and_the_result_loads(world: None, capsys: Out) -> None:
    assert main(["train", "-o", "out/a.safetensors", "--json", *SHORT]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["checkpoint"], result["steps"], err) == ("out/a.safetensors", 2, "")
    assert result["psnr"] > 0
    assert 0 <= result["pieces"] <= 1
    load_model("out/a.safetensors", "mdm-tiny")
    with safe_open("out/a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mdm"])["config"]["width"] == 32
    assert files() == {"out/a.safetensors", "out/a.state"}


def test_a_person_sees_a_bar_and_one_line(world: None, capsys: Out) -> None:
    assert main(["train", "-o", "a.safetensors", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == "a.safetensors: 2 steps (training state in a.state, no longer needed)\n"
    assert "vae" in err
    assert "diffusion" in err


def test_the_seed_decides_the_weights(world: None) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["train", "-o", f"{name}.safetensors", "--seed", seed, *SHORT]) == 0
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["latent_out.weight"], c["latent_out.weight"])


def test_a_run_goes_on_from_the_state_beside_it(world: None, capsys: Out) -> None:
    assert main(["train", "-o", "a.safetensors", *SHORT]) == 0
    vae = load_file("a.safetensors")["vae.latent_mean"]
    capsys.readouterr()
    again = ["train", "-o", "a.safetensors", "--json", *SHORT, "--steps", "4"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert torch.equal(load_file("a.safetensors")["vae.latent_mean"], vae)


def test_a_folder_trains_an_mdm_and_its_tokenizer(config: Callable[..., str], pictures: str, capsys: Out) -> None:
    preset = config(vocabulary=30, text_lengths=[32, 40])
    call = ["train", "--preset", preset, "--data", pictures, "-o", "a.safetensors", "--json", *SHORT]
    assert main(call) == 0
    load_model("a.safetensors", preset)
    assert Path("a.tokenizer.model").is_file()


def test_a_folder_trains_a_dim(config: Callable[..., str], pictures: str, capsys: Out) -> None:
    preset = config(family="dim")
    assert main(["train", "--preset", preset, "--data", pictures, "-o", "a.safetensors", "--json", *SHORT]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"checkpoint", "steps", "state"}
    load_model("a.safetensors", preset)


@pytest.mark.parametrize("family", ["mdm", "dim"])
def test_a_checkpoint_goes_on_at_a_higher_resolution(
    config: Callable[..., str], pictures: str, tiny: Tiny, family: str
) -> None:
    preset = config(family=family)
    start = build_model(load_config(tiny(family=family)))
    save_file(start.state_dict(), "start.safetensors")
    size = {"mdm": 64, "dim": 16}[family]
    call = ["train", "--preset", preset, "--init", "start.safetensors", "--image-size", str(size), "--data", pictures]
    assert main([*call, "-o", "a.safetensors", "--tokenizer", str(SHIPPED_TOKENIZER), "--lr", "1e-4", *SHORT]) == 0
    load_model("a.safetensors", tiny(family=family, image_size=size))
    before, after = load_file("start.safetensors"), load_file("a.safetensors")
    assert after["backbone.position"].shape[1] - 2 == 4 * (before["backbone.position"].shape[1] - 2)
    frozen = [name for name in before if name.startswith("vae.")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    # Two steps from where it was, not from scratch.
    name = "backbone.blocks.0.mixers.0.in_proj.weight"
    assert 0 < float((before[name] - after[name]).norm() / before[name].norm()) < 0.01


# ---------------------------------------------------------------------------------------- wrong calls


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("evil"),)  # type: ignore[return-value]


WRONG: dict[str, tuple[list[str], str]] = {
    "preset": (["--preset", "mdm-tny"], "did you mean 'mdm-tiny'"),
    "preset file": (["--preset", "text.json"], "is not JSON"),
    "suffix": (["-o", "a.pth"], "ends in .safetensors"),
    "no data": (["--preset", "dim-small"], "give --data FOLDER"),
    "latents": (["--preset", "mdm-49x2048"], "give --data FOLDER"),
    "no folder": (["--data", "none"], "has no captions.jsonl"),
    "no listing": (["--data", "empty"], "has no captions.jsonl"),
    "listing": (["--data", "broken"], "line 1"),
    "not a picture": (["--preset", "folder.json", "--data", "unsound"], "is not a picture"),
    "few captions": (["--data", "pictures", "--preset", "large.json"], "no tokenizer of 3000 pieces"),
    "long captions": (["--preset", "folder.json", "--data", "long"], "expected at most"),
    "truncated": (["--init", "cut.safetensors"], "is not a sound safetensors file"),
    "no data, json": (["--preset", "tiny.json"], "give --data FOLDER"),
    "no tokenizer beside": (
        ["--preset", "tiny.json", "--init", "cut.safetensors", "--data", "pictures"],
        "--tokenizer",
    ),
    "foreign tokenizer": (["--preset", "folder.json", "--data", "pictures", "--tokenizer", "world.model"], "40 pieces"),
    "other model": (["--init", "dim.safetensors"], "lacks the tensor"),
    "code": (["--init", "evil.pth"], "cannot be read as plain tensors"),
    "no checkpoint": (["--init", "none.pt"], "is not a file"),
    "no tokenizer": (["--tokenizer", "none.model"], "not a SentencePiece model"),
    "tokenizer": (["--tokenizer", "text.json"], "not a SentencePiece model"),
    "size": (["--image-size", "30"], "not a multiple of patch 8"),
    "world size": (["--image-size", "64"], "32"),
    "steps": (["--steps", "0"], "0 is not in the range"),
    "batch": (["--batch", "many"], "'many' is not a valid integer"),
    "option": (["--step", "3"], "--step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_2_and_writes_nothing(
    world: None, config: Callable[..., str], pictures: str, tiny: Tiny, capsys: Out, case: str
) -> None:
    config()
    config("large.json", vocabulary=3000)
    config("folder.json", vocabulary=30, text_lengths=[32, 40])
    Path("text.json").write_text("not JSON")
    for name, lines in {
        "broken": ["{"],
        "unsound": [json.dumps({"file": "x.png", "caption": text}) for text in CAPTIONS],
        "long": [json.dumps({"file": "x.png", "caption": text * 9}) for text in CAPTIONS],
    }.items():
        Path(name).mkdir()
        Path(name, "captions.jsonl").write_text("\n".join(lines))
        Path(name, "x.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save("long/x.png")
    Path("empty").mkdir()
    Path("world.model").write_bytes(SHIPPED_TOKENIZER.read_bytes())
    save_file(build_model(load_config(tiny())).state_dict(), "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-100])
    save_file(build_model(load_config(tiny(family="dim"))).state_dict(), "dim.safetensors")
    Path("evil.pth").write_bytes(pickle.dumps(Evil(), 2))
    before = files()
    arguments, said = WRONG[case]
    code = main(["train", "-o", "a.safetensors", *SHORT, *arguments])
    out, err = capsys.readouterr()
    assert said in err
    assert code == 2
    assert len(err[err.index("Error: ") :].splitlines()) <= 3
    assert out == ""
    assert files() == before
