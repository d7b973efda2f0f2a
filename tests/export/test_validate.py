"""Validation of what cannot be run whole, or not at all: large models as three blocks, bfloat16 by its twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mdm.export import export_bundle, validate
from mdm.plugins.errors import InputError, ParityError
from mdm.reference import SHIPPED_TOKENIZER
from mdm.reference.checkpoint import build_model, save_checkpoint
from mdm.reference.config import load_config

Tiny = Callable[..., dict[str, Any]]
Figure = Callable[[str, float, float], None]


@pytest.fixture
def export(tmp_path: Path, tiny: Tiny) -> Callable[..., dict[str, Any]]:
    """export(precision=..., blocks=...): exports a tiny model -> the manifest."""

    def run(precision: str = "fp32", **changes: Any) -> dict[str, Any]:
        config = load_config(tiny(blocks=7, **changes))
        save_checkpoint(tmp_path / "tiny.safetensors", build_model(config).state_dict(), config)
        tokenizer = None if config.family == "dim" else SHIPPED_TOKENIZER
        out = export_bundle(
            tmp_path / "tiny.safetensors", config, tmp_path / "out.bundle", precision=precision, tokenizer=tokenizer
        )
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        return manifest

    return run


def test_a_small_model_is_run_whole_at_three_points(export: Callable[..., dict[str, Any]]) -> None:
    record = export(family="dim")["validation"]
    assert (record["state"], record["model"]) == ("passed", "whole")
    assert {name: graph["points"] for name, graph in record["graphs"].items()} == {
        "denoise_image": 3, "step_image": 3, "step_image_guided": 3
    }  # fmt: skip
    assert record["runs"].keys() == {"class_to_image"}


def test_a_large_model_is_run_as_three_blocks_and_whole_once(
    export: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "CUT_ABOVE", 0)
    manifest = export(family="dim")
    record = manifest["validation"]
    assert record["model"] == "3 of 7 blocks"
    assert {graph["points"] for graph in record["graphs"].values()} == {3}
    assert {graph["points"] for graph in record["whole"].values()} == {1}
    assert not any("/" not in name and name.startswith("tmp") for name in manifest["files"])


def test_what_does_not_fit_into_memory_is_not_run_and_says_so(
    export: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "CUT_ABOVE", 0)
    monkeypatch.setattr(validate, "free_memory", lambda: 0)
    manifest = export(family="dim")
    assert manifest["validation"]["whole"] == "not run: it does not fit into this machine's memory"
    assert manifest["golden"] == {}
    assert "golden/" not in "".join(manifest["files"])


def test_a_fault_behind_the_third_block_is_seen_by_the_whole_model(
    export: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut model has blocks 0, 1 and the last: a wrong order in block 3 shows only in the whole one."""
    from mdm.export.backbone import Backbone

    plain = Backbone.order_of
    monkeypatch.setattr(validate, "CUT_ABOVE", 0)
    monkeypatch.setattr(Backbone, "order_of", lambda self, index: 2 if index == 3 else plain(self, index))
    with pytest.raises(ParityError, match="computes something else"):
        export(family="dim")


def test_bfloat16_is_validated_by_its_twin(export: Callable[..., dict[str, Any]], figure: Figure) -> None:
    manifest = export("bf16")
    record = manifest["validation"]
    assert manifest["opset"] == 22
    figure("bf16 by its float32 twin", max(graph["error"] for graph in record["graphs"].values()), 2e-5)
    assert record["runs"] == {"skipped": "ONNX Runtime's CPU has no bfloat16"}
    assert "golden/step_joint.safetensors" in manifest["files"]


def test_golden_outputs_are_the_models(export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    manifest = export(family="dim")
    for name, graph in manifest["graphs"].items():
        golden = load_file(tmp_path / "out.bundle" / manifest["golden"][name])
        names = {f"in.{i['name']}" for i in graph["inputs"]} | {f"out.{o['name']}" for o in graph["outputs"]}
        assert golden.keys() == names


def test_weights_that_are_not_numbers_are_the_checkpoints_fault(tmp_path: Path, tiny: Tiny) -> None:
    config = load_config(tiny(family="dim"))
    model = build_model(config)
    model.state_dict()["backbone.blocks.1.norm.weight"][3] = float("nan")
    save_checkpoint(tmp_path / "tiny.safetensors", model.state_dict(), config)
    with pytest.raises(InputError, match="not finite"):
        export_bundle(tmp_path / "tiny.safetensors", config, tmp_path / "out.bundle")
    assert not (tmp_path / "out.bundle").exists()
