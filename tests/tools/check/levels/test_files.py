"""The level of the files: what was changed is found, also where it was signed anew."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.ort import OrtBackend
from mdm.runtime.solver import ROW
from mdm.tools.check.finding import Finding, Verdict
from mdm.tools.check.levels import files
from mdm.tools.check.levels.files import check_files, check_tables

# A DiM with upsample guidance; an MDM, whose weights.safetensors is the checkpoint; and one that was converted.
BUNDLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dim": ("dim", "fp32", {"upsample": [2]}),
    "mdm": ("mdm", "fp32", {}),
    "half": ("dim", "fp16", {}),
}
Manifest = dict[str, Any]
Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        import torch
        from safetensors.torch import save_file

        from mdm.export import export_bundle
        from mdm.reference import SHIPPED_TOKENIZER, build_model, load_config

        family, precision, options = BUNDLES[name]
        config, folder = tiny(family=family), tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(build_model(load_config(config)).state_dict(), folder / "model.safetensors")
        if family == "mdm":
            options = {"tokenizer": SHIPPED_TOKENIZER}
        return export_bundle(
            folder / "model.safetensors", config, folder / "made.bundle", precision=precision, validate=False, **options
        )

    return make


@pytest.fixture
def spoiled(bundle: Callable[[str], Path], tmp_path: Path) -> Copy:
    """spoiled("dim", change): a copy of that bundle, which the change may spoil; signed anew unless asked otherwise."""

    def made(name: str, change: Callable[[Manifest, Path], object], sign: bool = True) -> Path:
        folder = tmp_path / "spoiled.bundle"
        shutil.copytree(bundle(name), folder)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        change(manifest, folder)
        for file, signed in manifest["files"].items() if sign else ():
            content = (folder / file).read_bytes()
            signed |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return made


def check(folder: Path) -> list[Finding]:
    opened = open_bundle(folder)
    return list(check_files(opened, OrtBackend(opened, threads=1)))


def faults(found: list[Finding]) -> list[tuple[str, str]]:
    return [(one.subject, one.part) for one in found if one.verdict is Verdict.FAIL]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_sound_bundle_passes(name: str, bundle: Callable[[str], Path]) -> None:
    found = check(bundle(name))
    assert {one.verdict for one in found} <= {Verdict.PASS, Verdict.SKIPPED}
    said = {(one.subject, one.part) for one in found}
    manifest = open_bundle(bundle(name)).manifest
    assert {(graph, part) for graph in manifest["graphs"] for part in ("onnx.checker", "loads on ort-cpu")} <= said
    tables = {file for file in manifest["files"] if file.startswith("sampler/")}
    assert {(file, "rows") for file in tables} <= said
    assert (name == "dim") == ("sampler/image_guided_16_upsample2.json" in tables)
    (weights,) = (one for one in found if one.part == "the checkpoint")
    assert weights.verdict is (Verdict.SKIPPED if name == "half" else Verdict.PASS)


def flip(folder: Path, file: str, at: int = -1) -> None:
    content = bytearray((folder / file).read_bytes())
    content[at] ^= 1
    (folder / file).write_bytes(content)


def test_a_flipped_byte_is_found_and_its_file_named(spoiled: Copy) -> None:
    folder = spoiled("dim", lambda manifest, folder: flip(folder, "weights.safetensors"), sign=False)
    assert faults(check(folder)) == [("weights.safetensors", "SHA-256")]


def test_every_wrong_file_is_named_and_none_is_parsed(spoiled: Copy) -> None:
    def change(manifest: Manifest, folder: Path) -> None:
        flip(folder, "sampler/class_to_image.json", 40)
        flip(folder, "step_image.onnx", 200)

    found = check(spoiled("dim", change, sign=False))
    assert set(faults(found)) == {
        ("sampler/class_to_image.json", "SHA-256"), ("sampler/class_to_image.json", "rows"),
        ("step_image.onnx", "SHA-256"), ("step_image", "onnx.checker"), ("step_image", "loads on ort-cpu"),
    }  # fmt: skip
    assert all("not the file that the manifest signs" in one.said for one in found if one.subject == "step_image")


def test_weights_that_were_changed_and_signed_anew_are_not_the_checkpoint(spoiled: Copy) -> None:
    found = check(spoiled("dim", lambda manifest, folder: flip(folder, "weights.safetensors")))
    assert faults(found) == [("weights.safetensors", "the checkpoint")]
    assert "model.safetensors" in next(one.said for one in found if one.verdict is Verdict.FAIL)


def test_weights_of_another_size_are_not_the_checkpoint(spoiled: Copy) -> None:
    def change(manifest: Manifest, folder: Path) -> None:
        manifest["provenance"]["checkpoint"]["size"] += 1

    assert faults(check(spoiled("mdm", change))) == [("weights.safetensors", "the checkpoint")]


def test_graphs_of_another_checkpoint_do_not_go_with_new_weights(spoiled: Copy) -> None:
    """Weights and manifest changed together: the graphs still say what they were made of."""

    def change(manifest: Manifest, folder: Path) -> None:
        flip(folder, "weights.safetensors")
        content = (folder / "weights.safetensors").read_bytes()
        manifest["provenance"]["checkpoint"]["sha256"] = hashlib.sha256(content).hexdigest()

    found = check(spoiled("dim", change))
    assert {part for _, part in faults(found)} == {"loads on ort-cpu"}
    assert all("mdm.checkpoint.sha256" in one.said for one in found if one.verdict is Verdict.FAIL)


def change_graph(change: Callable[[onnx.ModelProto], object]) -> Callable[[Manifest, Path], None]:
    def changed(manifest: Manifest, folder: Path) -> None:
        model = onnx.load_model_from_string((folder / "step_image.onnx").read_bytes())
        change(model)
        (folder / "step_image.onnx").write_bytes(model.SerializeToString())

    return changed


def test_a_graph_under_another_name_is_told(spoiled: Copy) -> None:
    def swap(manifest: Manifest, folder: Path) -> None:
        entry = manifest["graphs"]["step_image"]
        shutil.copyfile(folder / "denoise_image.onnx", folder / "step_image.onnx")
        entry["inputs"], entry["outputs"] = (manifest["graphs"]["denoise_image"][k] for k in ("inputs", "outputs"))

    found = check(spoiled("dim", swap))
    said = {one.subject: one.said for one in found if one.verdict is Verdict.FAIL}
    assert "'mdm.graph' is 'denoise_image', the manifest has 'step_image'" in said["step_image"]


def test_a_graph_that_is_not_valid_fails_in_the_checker(spoiled: Copy) -> None:
    def mistyped(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64

    assert ("step_image", "onnx.checker") in faults(check(spoiled("dim", change_graph(mistyped))))


def test_a_graph_with_other_inputs_than_the_manifest_says_fails(spoiled: Copy) -> None:
    def change(manifest: Manifest, folder: Path) -> None:
        manifest["graphs"]["denoise_image"]["outputs"][0]["name"] = "noise"

    found = check(spoiled("dim", change))
    assert faults(found) == [("denoise_image", "loads on ort-cpu")]


def test_without_onnx_graphs_still_load(bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    found = check(bundle("dim"))
    assert [one.verdict for one in found if one.part == "onnx.checker"] == [Verdict.SKIPPED]
    assert sum(one.part == "loads on ort-cpu" for one in found) == len(open_bundle(bundle("dim")).manifest["graphs"])


def test_a_manifest_that_is_not_sound_fails_and_its_tables_are_not_tried(bundle: Callable[[str], Path]) -> None:
    opened = open_bundle(bundle("dim"))
    broken = Bundle(opened.path, opened.manifest | {"row": list(reversed(ROW))})
    found = list(check_files(broken, OrtBackend(broken, threads=1)))
    assert faults(found) == [("manifest.json", "its parts fit")]
    assert [one.verdict for one in found if one.part == "rows"] == [Verdict.SKIPPED]


def test_files_that_nobody_signed_are_mentioned(spoiled: Copy) -> None:
    found = check(spoiled("dim", lambda manifest, folder: (folder / "notes.txt").write_text("hello")))
    assert faults(found) == []
    assert any("'notes.txt'" in one.said for one in found)


# --------------------------------------------------------------------------------------------------------- tables


def change_table(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Manifest, Path], None]:
    def changed(manifest: Manifest, folder: Path) -> None:
        table = json.loads((folder / file).read_bytes())
        change(table)
        (folder / file).write_text(json.dumps(table))

    return changed


def table_faults(folder: Path) -> dict[str, str]:
    return {one.subject: one.said for one in check_tables(open_bundle(folder)) if one.verdict is Verdict.FAIL}


def test_every_coefficient_counts(bundle: Callable[[str], Path]) -> None:
    """Its fourth digit changed, whichever it is: the finding names row, column and modality."""
    table = json.loads((bundle("mdm") / "sampler/joint.json").read_bytes())
    truth = np.array(table["rows"])  # [S,2,22]
    for at in np.argwhere(truth != 0):
        wrong = truth.copy()
        wrong[tuple(at)] *= 1.0003
        error, said = files.compare_rows(wrong.tolist(), truth, ["text", "image"])
        row, modality, column = at
        assert error > files.TABLE_LIMIT
        assert said.startswith(f"row {row}, column {ROW[column]} of {['text', 'image'][modality]}: ")
    error, said = files.compare_rows((truth * (1 + 1e-12)).tolist(), truth, ["text", "image"])
    assert (error < files.TABLE_LIMIT, said) == (True, "")


@pytest.mark.parametrize(
    ("name", "file"),
    [("mdm", "joint"), ("mdm", "caption"), ("dim", "class_to_image"), ("dim", "image_guided_16_upsample2")],
)
def test_a_wrong_coefficient_in_a_file_is_found(name: str, file: str, spoiled: Copy) -> None:
    def change(table: dict[str, Any]) -> None:
        table["rows"][1][0][ROW.index("q")] *= 1.0003

    said = table_faults(spoiled(name, change_table(f"sampler/{file}.json", change)))
    assert list(said) == [f"sampler/{file}.json"]
    assert "row 1, column q of " in said[f"sampler/{file}.json"]


def test_a_wrong_time_of_upsample_guidance_is_found(spoiled: Copy) -> None:
    file = "sampler/image_guided_16_upsample2.json"

    def change(table: dict[str, Any]) -> None:
        table["rows"][0][0][ROW.index("tau")] += 1

    assert "row 0, column tau of image" in table_faults(spoiled("dim", change_table(file, change)))[file]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table["sampler"].update(steps=7), "'steps' is 7"),
        (lambda table: table.update(graph="step_image"), "'graph' is 'step_image'"),
        (lambda table: table.update(columns=table["columns"][::-1]), "'columns'"),
        (lambda table: table["rows"].pop(), "shape [49, 1, 22], expected [50, 1, 22]"),
        (lambda table: table["rows"][3][0].pop(), "not numbers"),
        (lambda table: table.pop("rows"), "shape []"),
        (lambda table: table.update(rows={"a": 1}), "not numbers"),
        (lambda table: table.clear(), "'task' is None"),
    ],
)
def test_a_table_of_another_kind_fails(change: Callable[[dict[str, Any]], object], said: str, spoiled: Copy) -> None:
    file = "sampler/class_to_image.json"
    found = table_faults(spoiled("dim", change_table(file, change)))
    assert list(found) == [file]
    assert said in found[file]


@pytest.mark.parametrize("content", ["[]", "nothing", '{"rows": NaN}', ""])
def test_a_table_that_is_none_fails(content: str, spoiled: Copy) -> None:
    file = "sampler/image_guided_16_upsample2.json"
    folder = spoiled("dim", lambda manifest, folder: (folder / file).write_text(content))
    assert list(table_faults(folder)) == [file]


def test_a_table_of_a_changed_schedule_fails(spoiled: Copy) -> None:
    """The manifest and its signatures agree; what the runtime would compute is not in the files any more."""

    def change(manifest: Manifest, folder: Path) -> None:
        manifest["schedules"]["image"]["shift"] *= 1.01

    assert {"sampler/joint.json", "sampler/class_to_image.json"} <= set(table_faults(spoiled("mdm", change)))
