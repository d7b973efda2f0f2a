"""Every command and every line of Python in the README runs, and every file it names exists.

Training runs with a recipe of two steps, benchmarks on one small point; `tools/test` is what runs this file.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT, build_model, load_config
from mdm.reference.autoencoder import Autoencoder, AutoencoderShape
from mdm.reference.train import RECIPES, Phase, Recipe
from mdm.tools.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


SMALL_DIM = {"family": "dim", "width": 16, "blocks": 3, "image_size": 8}  # stands in for presets of 50M and 862M
QUICK = {  # what benchmarks are given besides, to be done in a second or two
    "bench export": ["--preset", "mdm-tiny"],
    "bench ops": ["--batch", "1", "--length", "20", "--width", "64", "--threads", "1", "--seconds", "0.001"],
    "bench scaling": ["--tokens", "16", "--tokens", "36", "--width", "64", "--blocks", "3", "--seconds", "0.001"],
    "bench step": ["--preset", "mdm-1024", "--tokens", "16", "--blocks", "3", "--no-compile", "--seconds", "0.001"],
    "check half.bundle": ["--level", "files"],
    "check tiny.bundle": ["--level", "files", "--task", "class_to_image", "--steps", "2"],
    "bench tiny.bundle": ["--steps", "2", "--no-compile", "--seconds", "0.001"],
    "bench soak": ["--task", "class_to_image", "--runs", "3", "--changes", "3"],
}
ON_TENSORRT = ("mdm build", "mdm bench soak")  # and all that say so
COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the README's relative names exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (48, 40), "red").save(tmp_path / "pictures" / "a.png")
    line = {"file": "a.png", "caption": "two big red circles on the left", "class": 0}
    (tmp_path / "pictures" / "captions.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_every_command_is_known() -> None:
    known = (
        "tools/demo", "tools/test", "mdm evaluate", "mdm train", "mdm doctor", "mdm bench", "mdm export", "mdm inspect",
        "mdm generate", "mdm caption", "mdm ask", "mdm complete", "mdm joint", "mdm turn", "mdm check", "mdm plugin",
        "mdm plan", "mdm build", "pip install", "python tools/gpu_check",
    )  # fmt: skip
    assert [command for command in COMMANDS if not command.startswith(known)] == []


def test_scripts_can_be_started() -> None:
    for command in ("tools/demo", "tools/test"):
        assert command in COMMANDS
        assert os.access(ROOT / command, os.X_OK)
    assert "tools/test" in (ROOT / ".ci" / "run").read_text()


def test_demo_writes_its_picture(tmp_path: Path) -> None:
    """What `tools/demo` starts once the environment is there."""
    started = re.search(r"python -m (\S+)", (ROOT / "tools" / "demo").read_text())
    assert started is not None
    picture = tmp_path / "demo.png"
    done = subprocess.run(
        [sys.executable, "-m", started[1], "--out", picture], capture_output=True, text=True, check=True
    )
    assert str(picture) in done.stdout
    with Image.open(picture) as image, Image.open(ROOT / "reference" / "assets" / "demo.png") as shown:
        assert image.size == shown.size


def test_scripts_in_python_run() -> None:
    for command in COMMANDS:
        if command.startswith("python "):
            words = shlex.split(command)[1:]
            run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr


def test_mdm_commands_run(
    folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """Those that want TensorRT and a GPU run with the stand-in for both."""
    monkeypatch.setitem(stand_in, "XDG_CACHE_HOME", str(tmp_path / "caches"))
    quick = Recipe(phases=(Phase(2),), batch=4, vae_steps=2)
    monkeypatch.setitem(RECIPES, "mdm-tiny", quick)
    monkeypatch.setitem(RECIPES, "small.json", quick)
    (folder_of_pictures / "small.json").write_text(json.dumps(SMALL_DIM | {"in_channels": 3, "classes": 10}))
    write_stand_ins(folder_of_pictures)
    small = {"dim-small": "small.json", "dim-huge-256": "latent.json", "dim-huge-512": "latent.json"}
    small |= {" 96": " 12", ".48.": ".2."}
    for command in COMMANDS:
        if command.startswith("mdm "):
            words = shlex.split(functools.reduce(lambda text, pair: text.replace(*pair), small.items(), command))[1:]
            if words[0] == "evaluate":
                words[words.index("--count") + 1] = "2"
            words += QUICK.get(" ".join(words[:2]), [])
            if command.startswith(ON_TENSORRT) or "--backend tensorrt" in command:
                run = subprocess.run([sys.executable, "-m", "mdm.tools.main", *words], env=stand_in, check=False)
                assert run.returncode == 0, command
            else:
                assert main(words) == 0, command


def write_stand_ins(folder: Path) -> None:
    """Small files under the names of those that the README exports."""
    shutil.copytree(ROOT / "reference" / "assets", folder / "reference" / "assets")
    (folder / "latent.json").write_text(json.dumps(SMALL_DIM))
    weights = build_model(load_config(SMALL_DIM)).state_dict()
    torch.save(weights, folder / "nnet_ema.pth")
    save_file(weights, folder / "large.safetensors")
    autoencoder = Autoencoder(AutoencoderShape(channels=(32, 32, 32, 32), blocks=1))
    torch.save(autoencoder.state_dict(), folder / "autoencoder_kl_ema.pth")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files are small stand-ins under the same names."""
    monkeypatch.chdir(tmp_path)
    write_stand_ins(tmp_path)
    export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", "tiny.bundle", validate=False)
    for block in blocks("python"):
        exec(block.replace('"dim-huge-256"', repr(SMALL_DIM)), {})


def test_named_files_exist() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    folders = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    assert sorted(folders) == ["export", "plugins", "reference", "runtime", "tests", "tools"]
