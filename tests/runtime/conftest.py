"""For the bundle reader: a small sound bundle, and `refusal`, which uses one up and says how it was refused.

    def test_cut(folder, refusal):
        os.truncate(folder / "step_image.onnx", 5)
        assert "has 5 bytes" in refusal(folder)

The reader parses no graph, so the graphs hold any bytes. For the pipelines: `deployed`, real bundles beside the models
they were made from, and `spoil`, a copy of one with something changed.

    def test_shape(deployed, spoil):
        assert deployed("mdm").pipeline.joint()[0].latents.shape == (24, 12)
        load(spoil("mdm", lambda manifest, folder: manifest["graphs"].pop("decode_text")))
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from mdm.plugins.errors import MdmError
from mdm.runtime.bundle import manifest_schema, open_bundle

if TYPE_CHECKING:
    from mdm.runtime import Pipeline

CONTENT: dict[str, bytes] = {
    "step_image.onnx": b"not really a graph" * 20,
    "decode_image.onnx": b"nor this",
    "weights.safetensors": save({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float16)}),
    "tokenizer.model": b"pieces",
    "golden/joint.safetensors": save({"x": np.zeros(2)}, {"mdm": "1"}),
    "sampler/table.json": b"[]",
}

TENSOR = {"name": "point", "dtype": "float32", "shape": ["B", "L", 16]}


def graph(file: str, role: str) -> dict[str, Any]:
    return {
        "file": file, "role": role, "modalities": ["image"], "pictures": 1, "guided": True, "upsample": 0,
        "image_size": None, "inputs": [TENSOR, {"name": "row", "dtype": "bool", "shape": []}], "outputs": [TENSOR],
        "nodes": 12, "operators": {"mdm::MambaSsdScan": 2, "MatMul": 10}, "weights": ["weights.safetensors"],
    }  # fmt: skip


SAMPLER = {
    "solver": "dpmpp_2m", "steps": 20, "guidance": 2.0, "spacing": "logsnr", "t_start": 0.997, "t_end": 0.001,
    "final_zero": False, "eta": 0.5, "order": None,
}  # fmt: skip


def manifest_of(content: dict[str, bytes]) -> dict[str, Any]:
    return {
        "schema": 1, "name": "tiny", "created": "2026-01-31T12:00:00+00:00", "config": {"family": "mdm"},
        "precision": "fp16", "fp32_layers": ["*.norm"], "opset": 21, "parameters": 9,
        "graphs": {
            "step_image": graph("step_image.onnx", "step"), "decode_image": graph("decode_image.onnx", "decode"),
        },
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
        },
        "tasks": {"class_to_image": {"text": "", "image": "made", "drops": "class", "set": "image",
                                     "step": "step_image", "table": "sampler/table.json"}},
        "null_class": 4,
        "row": ["t", "alpha"], "schedules": {"image": {"kind": "cosine"}}, "sampler": SAMPLER,
        "sampler_for": {"joint": SAMPLER},
        "picture": {"channels": 3, "size": 32, "range": [-1, 1], "patch": 4, "latent_scale": None, "factor": 1},
        "text": {"lengths": [8, 20], "vocabulary": 40, "tokenizer": "tokenizer.model", "pad": 0},
        "provenance": {
            "checkpoint": {
                "file": "a b.safetensors", "size": 5, "sha256": "0" * 64, "format": "safetensors", "dtype": "F32"
            },
            "tools": {"torch": "2.13.0+cpu"},
        },
        "validation": {"state": "passed", "limit": 1e-4}, "golden": {"joint": "golden/joint.safetensors"},
    }  # fmt: skip


MANIFEST = manifest_of(CONTENT)


@pytest.fixture
def manifest() -> dict[str, Any]:
    """The sound bundle's manifest, to be changed at will."""
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound bundle, which a test may spoil. Beside it lies a file that no bundle may reach."""
    made = tmp_path / "tiny.bundle"
    for name, data in CONTENT.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    (made / "manifest.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "secret").write_bytes(b"secret")
    return made


OPENED: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir") and not isinstance(arguments[0], int):
        OPENED.append(os.fsdecode(arguments[0] or "."))


sys.addaudithook(note_opened)  # for good: a hook cannot be taken away


@contextlib.contextmanager
def opened_inside(folder: Path) -> Iterator[list[str]]:
    """What is opened meanwhile; anything outside of the folder is a failure."""
    global OPENED
    manifest_schema()  # read once, from the package
    opened: list[str] = []
    OPENED = opened
    try:
        yield opened
    finally:
        OPENED = None
    root = folder.resolve()
    assert [path for path in set(opened) if not Path(path).resolve().is_relative_to(root)] == []


@pytest.fixture
def inside() -> Callable[[Path], contextlib.AbstractContextManager[list[str]]]:
    return opened_inside


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """Opens a bundle and asks for everything: "" if all is as signed, else what the MdmError says."""

    def use_all(folder: Path) -> str:
        said = ""
        with opened_inside(folder):
            try:
                bundle = open_bundle(folder)
                bundle.extra_files()
                for name in bundle.manifest["graphs"]:
                    content = bundle.graph_bytes(name)
                    assert hashlib.sha256(content).hexdigest() == bundle.manifest["files"][f"{name}.onnx"]["sha256"]
                for name in bundle.manifest["files"]:
                    assert bundle.file(name).resolve().is_relative_to(folder.resolve())
                bundle.verify()
            except MdmError as error:
                said = str(error) or repr(error)
        assert len(said.splitlines()) <= 3
        if not said:  # parsed strictly, it is still what any reader of JSON sees
            assert bundle.manifest == json.loads((folder / "manifest.json").read_bytes())
        return said

    return use_all


# ------------------------------------------------------------------------------------------------- real bundles


@dataclass(frozen=True)
class Deployed:
    """A bundle, and what it was exported from."""

    bundle: Path
    checkpoint: Path
    config: Any  # a preset's name, or a dict

    def model(self, size: int | None = None) -> Any:
        """The PyTorch model, at another picture size if asked: in pixels, or in an external autoencoder's latents."""
        from dataclasses import replace

        from mdm.reference import load_config, load_model

        config = load_config(self.config)
        return load_model(self.checkpoint, config if size is None else replace(config, image_size=size))

    @cached_property
    def truth(self) -> Any:
        return self.model()

    def load(self, **options: Any) -> Pipeline:
        from mdm.runtime import load

        return load(self.bundle, **{"threads": 1, **options})

    @cached_property
    def pipeline(self) -> Pipeline:
        return self.load()


# Of each bundle: what differs from the tiny config, and what is exported beside.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mdm": ({}, {"image_sizes": [48]}),
    "keep": ({"keep": 0.5, "schedule_text": {"kind": "sd"}}, {}),
    "dim": ({"family": "dim"}, {"image_sizes": [12], "upsample": [2]}),
    "latent": ({"family": "dim", "in_channels": 4}, {"image_sizes": [12]}),
}


@pytest.fixture(scope="session")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]], tiny_model: Callable[..., Any]
) -> Callable[[str], Deployed]:
    """deployed("mdm"): each bundle is exported once a session, when first asked for, and only to be read.

    "shipped" is the shipped checkpoint; the others have random weights: "mdm" at 32 and 48 pixels, "keep", which
    selects tokens and whose two schedules differ in kind, "dim" at 8 and 12 pixels and with upsample guidance at 16,
    "latent" with an external autoencoder (`vae.safetensors` beside its checkpoint) at 16 and 24 pixels.
    """

    @cache
    def make(name: str) -> Deployed:
        import torch
        from safetensors.torch import save_file

        from mdm.export import export_bundle
        from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER, build_model, load_config
        from mdm.reference.autoencoder import Autoencoder, AutoencoderShape

        folder = tmp_path_factory.mktemp(name)
        if name == "shipped":
            bundle = export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", folder / "shipped.bundle", validate=False)
            return Deployed(bundle, SHIPPED_CHECKPOINT, "mdm-tiny")
        changes, options = CASES[name]
        config, checkpoint = tiny(**changes), folder / f"{name}.safetensors"
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = build_model(load_config(config)) if config["family"] == "dim" else tiny_model(**changes)
            save_file(model.state_dict(), checkpoint)
            if name == "latent":
                autoencoder = Autoencoder(AutoencoderShape(channels=(32, 32), blocks=1))
                save_file(autoencoder.state_dict(), folder / "vae.safetensors")
                options = options | {"autoencoder": folder / "vae.safetensors"}
        if config["family"] == "mdm":
            options = options | {"tokenizer": SHIPPED_TOKENIZER}
        bundle = export_bundle(checkpoint, config, folder / f"{name}.bundle", validate=False, **options)
        return Deployed(bundle, checkpoint, config)

    return make


@pytest.fixture
def spoil(deployed: Callable[[str], Deployed], tmp_path: Path) -> Callable[..., Path]:
    """spoil("mdm", change): a copy of that bundle. The change is given its manifest and folder; all is signed anew."""

    def made(name: str, change: Callable[[dict[str, Any], Path], object]) -> Path:
        folder = tmp_path / "spoiled.bundle"
        shutil.copytree(deployed(name).bundle, folder)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        change(manifest, folder)
        for file, signed in manifest["files"].items():
            content = (folder / file).read_bytes()
            signed |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return made
