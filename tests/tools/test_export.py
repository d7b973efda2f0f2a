"""The command `mdm export`: what it prints where, and the exit code and words of everything that can go wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

torch = pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from mdm.export import mixers  # noqa: E402
from mdm.reference import SHIPPED_TOKENIZER, load_config  # noqa: E402
from mdm.reference.autoencoder import Autoencoder, AutoencoderShape  # noqa: E402
from mdm.reference.checkpoint import build_model  # noqa: E402
from mdm.runtime.bundle import open_bundle  # noqa: E402
from mdm.tools import export as tool  # noqa: E402
from mdm.tools.main import main  # noqa: E402

Tiny = Callable[..., dict[str, Any]]
Out = pytest.CaptureFixture[str]
MDM, DIM = ["mdm.safetensors", "--config", "mdm.json"], ["dim.safetensors", "--config", "dim.json"]
LATENT = ["latent.safetensors", "--config", "latent.json"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tiny_model: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("source")
    short = {"solver": "dim", "steps": 4, "guidance": 0.4}
    configs = {
        "mdm": tiny(), "dim": tiny(family="dim", sampler=short), "latent": tiny(family="dim", in_channels=4),
    }  # fmt: skip
    for name, config in configs.items():
        model = tiny_model() if name == "mdm" else build_model(load_config(config))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(config))
    shutil.copyfile(SHIPPED_TOKENIZER, folder / "mdm.tokenizer.model")
    for latent in (4, 5):
        autoencoder = Autoencoder(AutoencoderShape(latent=latent, channels=(32, 32), blocks=1))
        save_file(autoencoder.state_dict(), folder / f"vae{latent}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder that holds links to the inputs and nothing else."""
    monkeypatch.chdir(tmp_path)
    for path in source.iterdir():
        os.link(path, path.name)


def made(source: Path) -> set[str]:
    """What there is now, beside the inputs."""
    return set(os.listdir()) - set(os.listdir(source))


def test_json_is_one_object_with_the_phases(capsys: Out) -> None:
    assert main(["export", *DIM, "-o", "a.bundle", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["bundle"] == "a.bundle"
    assert result["bytes"] == sum(f["size"] for f in open_bundle("a.bundle").manifest["files"].values())
    assert result["validation"]["state"] == "passed"
    assert list(result["phases"]) == [
        "build graphs", "copy weights", "derive weights", "hash checkpoint", "write graphs", "check graphs",
        "validate", "golden outputs", "validate runs", "sign",
    ]  # fmt: skip
    assert all(seconds >= 0 for seconds in result["phases"].values())


def test_a_person_sees_phases_and_one_line(capsys: Out) -> None:
    assert main(["export", *DIM, "-o", "a.bundle"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a.bundle: 3 graphs, 0.")
    assert "validated by ONNX Runtime's CPU: off by at most " in out
    assert len(out.splitlines()) == 1
    assert [line.rsplit(maxsplit=2)[0] for line in err.splitlines()][:3] == [
        "build graphs", "copy weights", "derive weights",
    ]  # fmt: skip


def test_without_validation_it_says_so(capsys: Out) -> None:
    assert main(["export", *MDM, "-o", "a.bundle", "--no-validate"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("not validated (--no-validate)")
    assert open_bundle("a.bundle").manifest["validation"]["state"] == "skipped"


def test_help_names_every_option(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["export", "--help"]) == 0
    out = capsys.readouterr().out
    options = [param for param in tool.command.params if isinstance(param, click.Option)]
    assert len(options) == 13
    for option in options:
        assert option.opts[-1] in out
        assert option.help
        assert " ".join(option.help.split()) in " ".join(out.split())


OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "opset": ([*DIM, "--opset", "25"], {"opset": 25}),
    "bf16": ([*DIM, "--precision", "bf16"], {"opset": 22, "precision": "bf16"}),
    "layers": ([*DIM, "--precision", "fp16", "--fp32-layers", "backbone.blocks.2.*"], {"precision": "fp16"}),
    "sizes": ([*DIM, "--image-size", "16", "--image-size", "16"], {}),
    "upsample": ([*DIM, "--upsample", "2"], {}),
    "tokenizer": ([*MDM, "--tokenizer", str(SHIPPED_TOKENIZER)], {}),
    "autoencoder": ([*LATENT, "--autoencoder", "vae4.safetensors", "--latent-scale", "0.5"], {}),
    "parents": ([*DIM, "-o", "deep/er/a.bundle"], {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_say(name: str, capsys: Out) -> None:
    words, facts = OPTIONS[name]
    assert main(["export", "-o", "a.bundle", *words, "--no-validate"]) == 0, capsys.readouterr().err
    manifest = open_bundle("deep/er/a.bundle" if name == "parents" else "a.bundle").manifest
    assert {key: manifest[key] for key in facts} == facts
    graphs = set(manifest["graphs"])
    assert ("step_image_guided_16" in graphs) == (name in ("sizes", "upsample"))
    assert ("step_image_guided_16_upsample2" in graphs) == (name == "upsample")
    assert manifest["fp32_layers"] == (["backbone.blocks.2.*"] if name == "layers" else [])
    assert manifest["picture"]["latent_scale"] == (0.5 if name == "autoencoder" else None)


# words beside the target -> what is said
WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "Missing argument 'CHECKPOINT'"),
    "no config": (["dim.safetensors"], "Missing option '--config'"),
    "no checkpoint": (["nix.safetensors", "--config", "dim.json"], "'nix.safetensors' is not a file"),
    "a folder": ([".", "--config", "dim.json"], "'.' is not a file"),
    "no such config": (["dim.safetensors", "--config", "dim-hug-256"], "did you mean 'dim-huge-256'"),
    "config of another": (["dim.safetensors", "--config", "mdm.json"], "is it a checkpoint of another config?"),
    "preset of another": (["dim.safetensors", "--config", "dim-small"], "is it a checkpoint of another config?"),
    "no json": (["dim.safetensors", "--config", "dim.safetensors"], "dim.safetensors"),
    "precision": ([*DIM, "--precision", "fp8"], "precision is 'fp8', expected one of: fp32, fp16, bf16"),
    "old opset": ([*DIM, "--opset", "19"], "opset 19 cannot be exported in fp32\nexpected 20 to 25"),
    "new opset": ([*DIM, "--opset", "26"], "opset 26 cannot be exported in fp32\nexpected 20 to 25"),
    "bf16 opset": ([*DIM, "--precision", "bf16", "--opset", "21"], "opset 21 cannot be exported in bf16\nexpected 22"),
    "opset word": ([*DIM, "--opset", "new"], "'new' is not a valid integer"),
    "size": ([*DIM, "--image-size", "9"], "image size 9 is not a multiple of the config's patch 2"),
    "no size": ([*DIM, "--image-size", "0"], "image size 0"),
    "less than no size": ([*DIM, "--image-size", "-8"], "image size -8"),
    "upsample": ([*MDM, "--upsample", "2"], "upsample guidance is DiM's"),
    "upsample 1": ([*DIM, "--upsample", "1"], "upsample factor is 1, expected 2 or more"),
    "autoencoder of an mdm": ([*MDM, "--autoencoder", "vae4.safetensors"], "belongs to a DiM"),
    "autoencoder of pixels": ([*DIM, "--autoencoder", "vae4.safetensors"], "belongs to a DiM"),
    "wrong autoencoder": ([*LATENT, "--autoencoder", "vae5.safetensors"], "has 5 latent channels, the config 4"),
    "no autoencoder": ([*LATENT, "--autoencoder", "dim.safetensors"], "is it an image autoencoder"),
    "scale 0": ([*LATENT, "--autoencoder", "vae4.safetensors", "--latent-scale", "0"], "scale"),
    "scale nan": ([*LATENT, "--autoencoder", "vae4.safetensors", "--latent-scale", "nan"], "scale"),
    "tokenizer of a dim": ([*DIM, "--tokenizer", "mdm.tokenizer.model"], "it takes no tokenizer"),
    "no such tokenizer": ([*MDM, "--tokenizer", "nix.model"], "nix.model: not a SentencePiece model"),
    "no tokenizer file": ([*MDM, "--tokenizer", "mdm.json"], "mdm.json: not a SentencePiece model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_2_and_writes_nothing(name: str, capsys: Out, source: Path) -> None:
    words, said = WRONG[name]
    assert main(["export", "-o", "new/a.bundle", *words, "--no-validate"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) <= 3
    assert made(source) == set()


def test_a_tokenizer_that_is_missing_or_of_another_vocabulary(capsys: Out, source: Path, tiny: Tiny) -> None:
    os.unlink("mdm.tokenizer.model")
    assert main(["export", *MDM, "-o", "a.bundle"]) == 2
    assert "name the SentencePiece model that the checkpoint was trained with" in capsys.readouterr().err
    Path("big.json").write_text(json.dumps(tiny(vocabulary=41)))
    save_file(build_model(load_config("big.json")).state_dict(), "big.safetensors")
    words = ["big.safetensors", "--config", "big.json", "--tokenizer", str(SHIPPED_TOKENIZER)]
    assert main(["export", *words, "-o", "a.bundle"]) == 2
    assert "the tokenizer has 40 pieces, the model's vocabulary 41" in capsys.readouterr().err
    assert made(source) == {"big.json", "big.safetensors"}


# target -> what is said; the first line of a test makes the things that stand there
TARGETS = {
    "file": "exists and is not a bundle",
    "folder": "exists and is not a bundle",
    "file/a.bundle": "file",
    "link/a.bundle": "link",
    "dim.safetensors": "exists and is not a bundle",
    ".": "exists and is not a bundle",
    "..": "exists and is not a bundle",
    "/proc/a.bundle": "/proc",
    "x" * 252: "File name too long",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda name: name[:20])
def test_a_target_that_cannot_be_is_2(target: str, capsys: Out, source: Path) -> None:
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    assert main(["export", *DIM, "-o", target, "--no-validate", "--force"]) == 2
    err = capsys.readouterr().err
    assert TARGETS[target] in err
    assert len(err.splitlines()) <= 3
    assert made(source) == {"file", "folder", "link"}


def test_an_existing_bundle_needs_force(capsys: Out, source: Path) -> None:
    words = ["export", *DIM, "-o", "a.bundle", "--no-validate"]
    assert [main(words), main(words), main([*words, "--force"])] == [0, 2, 0]
    assert "bundle 'a.bundle' exists\nto replace it, say --force" in capsys.readouterr().err
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
    assert made(source) == {"a.bundle"}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3, "not enough space for the bundle"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "not enough space for the bundle"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "/out: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("a fault of ours"), 4, "a fault of ours"),
    ],
    ids=["full", "quota", "denied", "interrupt", "fault"],
)
def test_what_fails_on_the_way_has_its_code(
    error: BaseException, code: int, said: str, capsys: Out, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, content: bytes) -> int:
        raise error

    monkeypatch.setattr(Path, "write_bytes", failing)
    assert main(["export", *DIM, "-o", "a.bundle", "--no-validate"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert made(source) == set()


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "not enough space"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_no_folder(
    number: int, said: str, capsys: Out, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any, **named: Any) -> str:
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr("tempfile.mkdtemp", failing)
    assert main(["export", *DIM, "-o", "a.bundle", "--no-validate"]) in (2, 3)
    assert said in capsys.readouterr().err
    assert made(source) == set()


def test_a_mismatch_is_1_and_names_graph_and_output(capsys: Out, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = mixers.own_node
    monkeypatch.setattr(
        mixers, "own_node", lambda g, op, needed, more, **n: scan(g, op, needed, more | {"D": None}, **n)
    )
    assert main(["export", *DIM, "-o", "a.bundle", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == "ParityError"
    assert "graph 'denoise_image' computes something else than the model: output 'eps'" in err
    assert "of its largest value, expected at most 0.0001" in err
    assert len(err.splitlines()) == 3
    assert made(source) == set()


def test_damaged_weights_are_2(capsys: Out, source: Path) -> None:
    tensors = load_file("dim.safetensors")
    tensors["backbone.blocks.0.norm.weight"][3] = torch.nan
    save_file(tensors, "bad.safetensors")
    assert main(["export", "bad.safetensors", "--config", "dim.json", "-o", "a.bundle"]) == 2
    assert "its weights are damaged" in capsys.readouterr().err
    Path("bad.safetensors").write_bytes(Path("dim.safetensors").read_bytes()[:-3])
    assert main(["export", "bad.safetensors", "--config", "dim.json", "-o", "a.bundle"]) == 2
    assert "bad.safetensors" in capsys.readouterr().err
    assert made(source) == {"bad.safetensors"}
