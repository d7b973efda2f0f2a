"""Every exported graph in TensorRT's own parser and builder, on a machine with no GPU: with the plugins each of our
nodes is one plugin, without them the function bodies are taken. What an engine computes is not seen here."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.plugins.contract import DOMAIN
from mdm.plugins.functions import attributes_of, operator_nodes
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.checkpoint import build_model
from mdm.reference.config import PRESETS

InRig = Callable[..., list[dict[str, Any]]]
Profiles = list[dict[str, list[int]]]
BATCHES = ([1, 1, 1], [1, 2, 4], [1, 8, 16])
# Said of every graph with class or text inputs; the binding is what the graph says.
HARMLESS = ("Int64 binding", "already exists, the output tensors")


def profiles(manifest: Mapping[str, Any], graph: str) -> Profiles:
    """Three, up to 16 samples, over the text lengths that the model has."""
    described, text = manifest["graphs"][graph], manifest["text"]
    if not text:
        return [{"batch": batch} for batch in BATCHES]
    runs = described["role"] in ("denoise", "step")
    side = (described["image_size"] or 0) // manifest["picture"]["patch"]
    M = side**2 * described["pictures"] if runs else 0
    least, most = min(text["lengths"]), max(text["lengths"])
    return [{"batch": batch, "tokens": [M + least, M + most, M + most]} for batch in BATCHES]


def jobs(bundle: Path, names: Callable[[str], bool] = lambda name: True, build: bool = True) -> list[dict[str, Any]]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return [
        {"model": str(bundle / described["file"]), "profiles": profiles(manifest, name) if build else []}
        for name, described in sorted(manifest["graphs"].items())
        if names(name)
    ]


def hold(asked: list[dict[str, Any]], told: list[dict[str, Any]], plugins: bool) -> None:
    assert len(asked) == len(told) > 0
    for job, said in zip(asked, told, strict=True):
        name, model = Path(job["model"]).name, onnx.load(job["model"], load_external_data=False)
        nodes = sum(node.domain == DOMAIN for node in model.graph.node)
        assert said["errors"] == [], name
        assert said["parsed"], name
        assert said["plugins"] == (nodes if plugins else 0), name
        assert not plugins or said["loops"] == 0, name
        assert [text for text in said["said"] if not any(known in text for known in HARMLESS)] == [], name
        if job["profiles"]:
            assert said["bytes"] > 0, name
            # The plan holds what each plugin is made from, for each profile.
            has = [attributes_of(node)["has"] for node in operator_nodes(model)] * len(job["profiles"])
            assert said["has"] == (sorted(has) if plugins else []), name


def write_model(folder: Path, fields: Mapping[str, Any]) -> Path:
    """A random checkpoint, its config and tokenizer beside it."""
    folder.mkdir()
    config = load_config(fields)
    torch.manual_seed(0)
    save_file(build_model(config).state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(dict(fields)))
    if config.vocabulary:
        shutil.copyfile(SHIPPED_TOKENIZER, folder / "model.tokenizer.model")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    cases = {
        "mdm": tiny(state=16, head=32, keep=0.5),
        "mdm-parallel": tiny(state=16, head=32, scan="parallel", width=64, groups=2),
        "dim": tiny(family="dim", state=16),
    }
    return {name: write_model(folder / name, fields) for name, fields in cases.items()}


def exported(checkpoint: Path, out: Path, precision: str) -> Path:
    return export_bundle(checkpoint, checkpoint.with_suffix(".json"), out, precision=precision, validate=False)


@pytest.mark.parametrize(
    ("name", "precision"), [*itertools.product(("mdm", "dim"), ("fp32", "fp16", "bf16")), ("mdm-parallel", "fp16")]
)
def test_every_graph_parses(models: dict[str, Path], name: str, precision: str, in_rig: InRig, tmp_path: Path) -> None:
    """With plugins and without; those that differ most are built, with three profiles."""
    bundle = exported(models[name], tmp_path / "bundle", precision)
    built = {"mdm": "step_joint_guided", "mdm-parallel": "denoise_text", "dim": "step_image_guided"}[name]
    for plugins in (True, False):
        parsed = jobs(bundle, build=False)
        hold(parsed, in_rig(parsed, plugins=plugins), plugins)
    whole = jobs(bundle, lambda graph: graph == built)
    hold(whole, in_rig(whole), True)


@pytest.mark.parametrize("name", ["mdm", "dim"])
def test_without_plugins_the_bodies_build(models: dict[str, Path], name: str, in_rig: InRig, tmp_path: Path) -> None:
    bundle = exported(models[name], tmp_path / "bundle", "fp16")
    whole = jobs(bundle, lambda graph: graph == "denoise_image")
    hold(whole, in_rig(whole, plugins=False), False)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("preset", ["dim-huge-512", "mdm-49x2048", "mdm-tiny"])
def test_three_blocks_of_real_width_build(preset: str, precision: str, in_rig: InRig, tmp_path: Path) -> None:
    fields = {**PRESETS[preset], "blocks": 3} | ({"vocabulary": 40} if PRESETS[preset]["family"] == "mdm" else {})
    bundle = exported(write_model(tmp_path / "model", fields), tmp_path / "bundle", precision)
    graph = "step_image_guided" if preset.startswith("dim") else "step_joint_guided"
    whole = jobs(bundle, lambda name: name == graph)
    hold(whole, in_rig(whole), True)


def test_a_build_that_fails_says_why_and_harms_nothing(models: dict[str, Path], in_rig: InRig, tmp_path: Path) -> None:
    """A text longer than the model's positions. Without `Plugin.destroy` the bindings then free the plugins twice."""
    bundle = exported(models["mdm"], tmp_path / "bundle", "fp16")
    model = str(bundle / "denoise_text.onnx")
    long, right = ({"model": model, "profiles": [{"batch": [1, 2, 4], "tokens": [8, t, t]}]} for t in (24, 20))
    told = in_rig([long, right, long, long, right])
    assert [said["bytes"] > 0 for said in told] == [False, True, False, False, True]
    assert "24 != 20" in told[0]["said"][-1]


def test_what_no_kernel_serves_stops_the_build(tiny: Any, in_rig: InRig, tmp_path: Path) -> None:
    """A state of 8, in our words. TensorRT-RTX then ends the process, so a build has one of its own."""
    bundle = exported(write_model(tmp_path / "model", tiny()), tmp_path / "bundle", "fp16")
    in_rig(
        jobs(bundle, lambda name: name == "denoise_image"),
        fails="MambaSsdScan: no GPU kernel for N = 8\nexpected one of 16, 32, 64, 128",
    )
