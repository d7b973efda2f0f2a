"""What `mdm check` is for: faults planted in copies of the shipped bundle, each reported, and placed at its node.

Every file that a fault touches is signed again, as whoever changed it on purpose would.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER
from mdm.runtime.safetensors_header import read_header
from mdm.runtime.solver import ROW, SOLVERS, Solver
from mdm.runtime.solver_rules import Walk
from mdm.tools.main import main

Run = Callable[..., tuple[int, dict[str, Any]]]
BLOCK = "backbone.blocks.3.mixers.0"
GRAPH = "step_image_guided"  # of class_to_image


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", tmp_path_factory.mktemp("faults") / "mdm-tiny.bundle")


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "mdm-tiny.bundle"))


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Run:
    """check(bundle, "--level", "steps") -> exit code and report"""

    def run(bundle: Path, *arguments: str, checkpoint: Path = SHIPPED_CHECKPOINT) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["check", str(bundle), "--checkpoint", str(checkpoint), "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def sign(bundle: Path, *names: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in names:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def change_weight(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = bundle / "weights.safetensors"
    entry = read_header(file).tensors[name]
    values = np.fromfile(file, np.float32, int(np.prod(entry.shape)), offset=entry.offset).reshape(entry.shape)
    with file.open("r+b") as opened:
        opened.seek(entry.offset)
        opened.write(np.ascontiguousarray(change(values), np.float32).tobytes())
    sign(bundle, file.name)


def change_graphs(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """In each graph with the network."""
    names = [path.name for path in bundle.glob("*.onnx") if path.name.startswith(("step", "denoise"))]
    for name in names:
        model = onnx.load(str(bundle / name), load_external_data=False)
        change(model)
        (bundle / name).write_bytes(model.SerializeToString())
    sign(bundle, *names)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def scaled_weight(bundle: Path) -> None:
    change_weight(bundle, f"{BLOCK}.in_proj.weight", lambda weight: weight * 1.01)


def turned_taps(bundle: Path) -> None:
    """The convolution of block 3 has its taps from the last to the first."""
    change_weight(bundle, f"{BLOCK}.conv1d.weight", lambda weight: weight[..., ::-1])


def swapped_order(bundle: Path) -> None:
    """Block 2 goes through the picture as block 1 does."""

    def change(model: onnx.ModelProto) -> None:
        node_of(model, "backbone.blocks.2.reorder").input[1] = node_of(model, "backbone.blocks.1.reorder").input[1]

    change_graphs(bundle, change)


def dropped_term(bundle: Path) -> None:
    """Without D, in block 3 alone."""

    def change(model: onnx.ModelProto) -> None:
        scan = node_of(model, f"{BLOCK}.scan")
        scan.input.remove(f"{BLOCK}.D")
        has = next(attribute for attribute in scan.attribute if attribute.name == "has")
        has.i &= ~1

    change_graphs(bundle, change)


def swapped_rows(bundle: Path) -> None:
    """Two pieces of text change places."""

    def change(weight: np.ndarray) -> np.ndarray:
        swapped = weight.copy()
        swapped[[10, 11]] = weight[[11, 10]]
        return swapped

    change_weight(bundle, "vae.text_out.weight", change)


PLACES = {
    scaled_weight: (GRAPH, f"{BLOCK}.in_proj.MatMul", "MatMul"),
    turned_taps: (GRAPH, f"{BLOCK}.conv1d.conv", "mdm.MambaShortConv"),
    swapped_order: (GRAPH, "backbone.blocks.2.reorder", "Gather"),
    dropped_term: (GRAPH, f"{BLOCK}.scan", "mdm.MambaSsdScan"),
    swapped_rows: ("decode_text", "vae.text_out.MatMul", "MatMul"),
}


@pytest.mark.parametrize("plant", PLACES, ids=lambda plant: plant.__name__)
def test_a_fault_in_the_network_is_placed_at_its_node(
    plant: Callable[[Path], None], bundle: Path, check: Run, tmp_path: Path
) -> None:
    plant(bundle)
    graph, node, op = PLACES[plant]
    code, report = check(bundle, "--level", "blocks", "--task", "class_to_image", "--report", str(tmp_path / "report"))
    assert (code, report["verdict"]) == (1, "FAIL")
    assert [(one["graph"], one["node"], one["op"]) for one in report["divergences"]] == [(graph, node, op)]
    assert report["divergences"][0]["error"] > 100 * report["divergences"][0]["floor"]
    folder = tmp_path / "report" / "divergence" / graph
    assert main(["check", "--replay", str(folder)]) == 1


@pytest.mark.parametrize("plant", PLACES, ids=lambda plant: plant.__name__)
def test_the_golden_files_tell_a_fault_too(plant: Callable[[Path], None], bundle: Path, check: Run) -> None:
    plant(bundle)
    code, report = check(bundle, "--against", "golden", "--level", "steps")
    assert (code, report["verdict"]) == (1, "FAIL")
    failed = {finding["subject"] for finding in report["findings"] if finding["verdict"] == "FAIL"}
    assert PLACES[plant][0] in failed


@pytest.mark.parametrize("plant", [scaled_weight, turned_taps, swapped_rows], ids=lambda plant: plant.__name__)
def test_weights_that_are_not_the_checkpoints_are_told_without_running(
    plant: Callable[[Path], None], bundle: Path, check: Run
) -> None:
    plant(bundle)
    assert check(bundle, "--level", "files")[0] == 1


def test_a_wrong_coefficient_in_the_bundles_table(bundle: Path, check: Run) -> None:
    path = bundle / "sampler" / "class_to_image.json"
    table = json.loads(path.read_text())
    place = table["columns"].index("base_h0")
    table["rows"][7][0][place] *= 1.0003
    path.write_text(json.dumps(table))
    sign(bundle, "sampler/class_to_image.json")
    for against in ("golden", "reference"):
        code, report = check(bundle, "--level", "files", "--against", against)
        [failed] = [finding for finding in report["findings"] if finding["verdict"] == "FAIL"]
        assert code == 1
        assert "base_h0" in failed["said"]


@pytest.mark.parametrize("against", ["golden", "reference"])
def test_a_wrong_coefficient_in_the_table_that_runs(
    against: str, sound: Path, check: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its fourth digit, in one of 20 rows. The bundle's own tables tell the difference, and so does the path."""
    sound_rule, options = SOLVERS["dpmpp_2m"]

    def off(walk: Walk, **options: Any) -> None:
        sound_rule(walk, **options)
        if len(walk.rows) > 7:
            walk.rows[7][ROW.index("base_base")] *= 1.0003

    monkeypatch.setitem(SOLVERS, "dpmpp_2m", Solver(off, options))
    task = ("--task", "class_to_image", "--against", against)
    code, report = check(sound, "--level", "trajectories", *task)
    failed = [finding["part"] for finding in report["findings"] if finding["verdict"] == "FAIL"]
    assert code == 1
    assert "table" in failed
    assert check(sound, "--level", "files", *task)[0] == 1


def test_an_overflow_in_half_precision_is_placed_at_its_node(check: Run, tmp_path: Path) -> None:
    """One block whose product leaves float16's range, from a checkpoint that is sound in float32."""
    weights = load_file(SHIPPED_CHECKPOINT)
    weights[f"{BLOCK}.in_proj.weight"] *= 1e5
    save_file(weights, tmp_path / "loud.safetensors")
    made = export_bundle(
        tmp_path / "loud.safetensors", "mdm-tiny", tmp_path / "loud.bundle", precision="fp16", validate=False,
        tokenizer=SHIPPED_TOKENIZER,
    )  # fmt: skip
    code, report = check(
        made, "--level", "blocks", "--task", "class_to_image", checkpoint=tmp_path / "loud.safetensors"
    )
    assert (code, report["verdict"]) == (1, "FAIL")
    [divergence] = report["divergences"]
    assert (divergence["node"], divergence["dtype"]) == (f"{BLOCK}.in_proj.MatMul", "float16")
    assert "not finite" in divergence["said"]


def test_the_sound_bundle_passes_every_level(sound: Path, check: Run) -> None:
    code, report = check(sound, "--task", "caption", "--task", "class_to_image")
    assert (code, report["verdict"]) == (0, "PASS"), [f for f in report["findings"] if f["verdict"] == "FAIL"]
    assert not report["divergences"]
    assert {finding["level"] for finding in report["findings"]} == {
        "files", "operators", "blocks", "steps", "trajectories", "decoded",
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_twenty_seeds_of_a_sound_bundle_pass(
    precision: str, sound: Path, check: Run, tmp_path: Path, figure: Callable[[str, float, float], None]
) -> None:
    """All tasks with all steps, and what they decode to, take a quarter of an hour: by the command in the README. With
    three steps a piece of text or two is a near tie in fp16, so texts are left out here."""
    bundle = sound
    if precision == "fp16":
        bundle = export_bundle(
            SHIPPED_CHECKPOINT, "mdm-tiny", tmp_path / "half.bundle", precision="fp16", validate=False
        )
    levels = ["--level", "operators", "--level", "steps", "--level", "trajectories"]
    code, report = check(bundle, *levels, "--task", "complete", "--steps", "3", "--seeds", "20")
    assert (code, report["verdict"]) == (0, "PASS"), [f for f in report["findings"] if f["verdict"] != "PASS"]
    assert report["counts"]["SKIPPED"] == 0
    used = max(finding["used"] for finding in report["findings"] if finding["used"] is not None)
    figure(f"20 seeds in {precision}, largest share of a limit", used, 1.0)
