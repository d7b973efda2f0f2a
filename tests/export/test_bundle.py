"""Exports from end to end on tiny models: what a bundle holds, that it is the same each time, and which checkpoints and
types go in.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from mdm.export import export_bundle
from mdm.export.validate import session
from mdm.plugins.contract import DOMAIN, OPERATORS, VERSION
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.autoencoder import Autoencoder, AutoencoderShape
from mdm.reference.checkpoint import build_model, published_name
from mdm.runtime.bundle import open_bundle, sha256_of
from mdm.runtime.safetensors_header import Entry, read_header, write_header

Tiny = Callable[..., dict[str, Any]]
Contents = Callable[[Path], dict[str, bytes | None]]
OURS = {f"{DOMAIN}.{name}" for name in OPERATORS}
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
WHOLE = ("mdm", "dim")
STABLE = ("weights.safetensors", "derived.safetensors")


@pytest.fixture(scope="module")
def wholes(export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with validated bundles, to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    for name in WHOLE:
        export(folder / f"{name}.bundle", name, validate=True)
    return folder


@pytest.fixture(scope="module", params=WHOLE)
def whole(request: pytest.FixtureRequest, wholes: Path) -> Path:
    return wholes / f"{request.param}.bundle"


def manifest_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


def graphs_of(bundle: Path) -> dict[str, ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(bundle.glob("*.onnx"))}


def places(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


# ------------------------------------------------------------------------------------------------ what a bundle holds


def test_the_manifest_agrees_with_the_graphs(whole: Path) -> None:
    manifest = manifest_of(whole)
    graphs = graphs_of(whole)
    assert manifest["graphs"].keys() == graphs.keys()
    for name, model in graphs.items():
        entry, graph = manifest["graphs"][name], model.graph
        for told, infos in ((entry["inputs"], graph.input), (entry["outputs"], graph.output)):
            found = [
                (
                    i.name,
                    i.type.tensor_type.elem_type,
                    [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim],
                )
                for i in infos
            ]
            assert found == [(t["name"], TYPES[t["dtype"]], t["shape"]) for t in told]
        assert entry["nodes"] == len(graph.node)
        assert entry["operators"] == Counter(".".join(filter(None, (n.domain, n.op_type))) for n in graph.node)
        assert entry["weights"] == sorted({places(t)["location"] for t in graph.initializer if t.external_data})
        assert graph.name == name


def test_every_file_is_signed_and_none_is_a_link(whole: Path) -> None:
    bundle = open_bundle(whole)
    bundle.verify()
    assert bundle.extra_files() == []
    assert not any(path.is_symlink() for path in whole.rglob("*"))


def test_all_files_can_be_read_by_the_same_people(whole: Path) -> None:
    """A bundle made by one user is served by another."""
    modes = {path.relative_to(whole).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in whole.rglob("*.*")}
    assert {name: oct(mode) for name, mode in modes.items() if mode != modes["manifest.json"]} == {}


def test_weights_lie_outside_the_graphs_where_they_are_said_to(whole: Path) -> None:
    headers = {name: read_header(whole / name) for name in STABLE}
    for model in graphs_of(whole).values():
        stored = [t for t in model.graph.initializer if t.external_data]
        assert stored
        for tensor in stored:
            at = places(tensor)
            assert at.keys() == {"location", "offset", "length"}
            assert not tensor.raw_data
            start, length = int(at["offset"]), int(at["length"])
            assert length == np.prod(tensor.dims, dtype=int) * (2 if tensor.data_type == TensorProto.FLOAT16 else 4)
            holding = [
                name for name, entry in headers[at["location"]].tensors.items()
                if entry.offset <= start and start + length <= entry.offset + entry.length
            ]  # fmt: skip
            assert len(holding) == 1
            assert tensor.name.startswith(holding[0])
        assert all(len(t.raw_data) <= 8192 for t in model.graph.initializer if not t.external_data)


def test_names_follow_the_modules_and_are_unique(whole: Path) -> None:
    for name, model in graphs_of(whole).items():
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        outputs = [output for node in model.graph.node for output in node.output]
        assert len(set(outputs)) == len(outputs)
        if name.startswith(("denoise", "step")):
            ours = [n for n in model.graph.node if n.domain == DOMAIN]
            mixers = [f"backbone.blocks.{i}.mixers.0" for i in range(3)]
            assert [n.name for n in ours] == [f"{at}.{node}" for at in mixers for node in ("conv1d.conv", "scan")]
            assert all(n.input and all(n.input) for n in ours)


def test_graphs_say_where_they_come_from(whole: Path) -> None:
    manifest = manifest_of(whole)
    for name, model in graphs_of(whole).items():
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert (facts["mdm.graph"], facts["mdm.opset"], facts["mdm.precision"]) == (name, "20", "fp32")
        assert facts["mdm.checkpoint.sha256"] == manifest["provenance"]["checkpoint"]["sha256"]
        assert json.loads(facts["mdm.config"]) == manifest["config"]
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets == ({"": 20, DOMAIN: VERSION} if model.functions else {"": 20})
        assert {f"{f.domain}.{f.name}" for f in model.functions} == OURS & manifest["graphs"][name]["operators"].keys()


def test_nothing_tells_of_the_machine(whole: Path, source: Path) -> None:
    places = [str(whole.parent), str(source), str(Path.home()), os.getcwd(), "/tmp", "/home/", "/work/"]
    for path in whole.rglob("*.*"):
        content = path.read_bytes()
        assert [place for place in places if len(place) > 3 and place.encode() in content] == [], path.name
    for model in graphs_of(whole).values():
        assert not re.search(r"doc_string: \"[^\"]", str(model))


def test_graphs_run_without_the_native_library(whole: Path, figure: Callable[[str, float, float], None]) -> None:
    """By the function bodies in the file: the same numbers, up to rounding."""
    worst, options = 0.0, ort.SessionOptions()
    options.intra_op_num_threads = 1
    for name, file in manifest_of(whole)["golden"].items():
        if name.startswith("task_"):
            continue
        arrays = load_arrays(whole / file)
        given = {key.removeprefix("in."): array for key, array in arrays.items() if key.startswith("in.")}
        plain = ort.InferenceSession(whole / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        native = session(whole / f"{name}.onnx")
        labels = [output.name for output in plain.get_outputs()]
        for label, found, other in zip(labels, plain.run(None, given), native.run(None, given), strict=True):
            truth = arrays[f"out.{label}"]
            scale = max(float(np.abs(truth).max()), 1e-30)
            worst = max(worst, *(float(np.abs(a - b).max()) / scale for a, b in ((found, truth), (found, other))))
    figure(f"{whole.stem} bundle by function bodies, relative", worst, 1e-5)


def test_every_graph_and_task_has_its_golden_file(whole: Path) -> None:
    manifest = manifest_of(whole)
    assert manifest["golden"].keys() == {*manifest["graphs"], *(f"task_{task}" for task in manifest["tasks"])}
    for name, graph in manifest["graphs"].items():
        arrays = load_arrays(whole / manifest["golden"][name])
        named = {f"in.{t['name']}" for t in graph["inputs"]} | {f"out.{t['name']}" for t in graph["outputs"]}
        assert set(arrays) == named
    assert manifest["validation"]["state"] == "passed"
    assert manifest["validation"]["graphs"].keys() == manifest["graphs"].keys()
    assert manifest["validation"]["runs"].keys() == manifest["tasks"].keys()
    assert {path.stem for path in (whole / "sampler").iterdir()} == set(manifest["tasks"])


def test_without_validation_the_manifest_says_so(export: Callable[..., Path], tmp_path: Path) -> None:
    manifest = manifest_of(export(tmp_path / "a.bundle", "dim"))
    assert manifest["validation"] == {"state": "skipped", "reason": "--no-validate"}
    assert manifest["golden"] == {}
    assert not (tmp_path / "a.bundle" / "golden").exists()


# ---------------------------------------------------------------------------------------------------- the same again

AGAIN = """
import sys
from mdm.export import export_bundle
folder = sys.argv[1]
for name in sys.argv[2:]:
    export_bundle(f"{folder}/{name}.safetensors", f"{folder}/{name}.json", f"{name}.bundle")
"""


def test_two_exports_are_the_same_bytes(wholes: Path, source: Path, tmp_path: Path, contents: Contents) -> None:
    """In another process, from another folder, by relative paths, with another hash seed; `created` apart."""
    run = subprocess.run(
        [sys.executable, "-c", AGAIN, os.path.relpath(source, tmp_path), *WHOLE], cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = contents(wholes), contents(tmp_path)
    created = re.compile(rb'"created": "[^"]*"')
    for made in (first, second):
        for name in WHOLE:
            text = made[f"{name}.bundle/manifest.json"]
            assert text is not None
            made[f"{name}.bundle/manifest.json"], count = created.subn(b"", text)
            assert count == 1
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []


# --------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize(
    ("given", "precision"),
    [
        *itertools.product((torch.float32, torch.float16, torch.bfloat16), ("fp32", "fp16", "bf16")),
        (torch.float64, "fp32"),
    ],
    ids=str,
)
def test_a_checkpoint_of_any_type_is_exported_in_any(
    given: torch.dtype, precision: str, export: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    """Where the types agree the weights are the checkpoint's own bytes, else all are derived."""
    checkpoint = tmp_path / "other.safetensors"
    save_file({name: t.to(given) for name, t in load_file(source / "dim.safetensors").items()}, checkpoint)
    bundle = export(tmp_path / "a.bundle", "dim", checkpoint, precision=precision, validate=True)
    manifest, weights = manifest_of(bundle), bundle / "weights.safetensors"
    agree = (given, precision) in {
        (torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16"),
    }  # fmt: skip
    assert weights.exists() == agree
    assert not agree or weights.read_bytes() == checkpoint.read_bytes()
    found = manifest["provenance"]["checkpoint"]
    assert found["dtype"] == str(given).removeprefix("torch.")
    assert found["sha256"] == sha256_of(checkpoint)
    kinds = {t.data_type for model in graphs_of(bundle).values() for t in model.graph.initializer if t.external_data}
    half = {"fp32": set(), "fp16": {TensorProto.FLOAT16}, "bf16": {TensorProto.BFLOAT16}}[precision]
    assert kinds == {TensorProto.FLOAT} | half


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_released_files_are_understood(
    suffix: str, export: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    tensors = {published_name(name): t for name, t in load_file(source / "dim.safetensors").items()}
    checkpoint = tmp_path / f"released{suffix}"
    torch.save(tensors, checkpoint) if suffix == ".pth" else save_file(tensors, checkpoint)
    bundle = export(tmp_path / "a.bundle", "dim", checkpoint, validate=True)
    assert (bundle / "weights.safetensors").exists() == (suffix == ".safetensors")
    assert manifest_of(bundle)["provenance"]["checkpoint"]["format"] == suffix[1:]
    stored = {t.name for t in graphs_of(bundle)["denoise_image"].graph.initializer if t.external_data}
    assert "backbone.blocks.0.mixers.0.in_proj.weight" in stored


def test_a_hugging_face_cache_is_read_through_its_links(
    export: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for suffix in (".safetensors", ".tokenizer.model"):
        shutil.copyfile(source / f"mdm{suffix}", blobs / f"abc{len(suffix)}")
        (snapshot / f"model{suffix}").symlink_to(f"../../blobs/abc{len(suffix)}")
    bundle = export(tmp_path / "a.bundle", checkpoint=snapshot / "model.safetensors", precision="fp32")
    assert not any(path.is_symlink() for path in bundle.rglob("*"))
    blob, weights = blobs / "abc12", bundle / "weights.safetensors"
    assert weights.stat().st_ino != blob.stat().st_ino
    assert manifest_of(bundle)["provenance"]["checkpoint"]["file"] == "model.safetensors"
    blob.write_bytes(b"another revision")
    open_bundle(bundle).verify()


def test_holes_stay_holes(export: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    """Values here and there, each in blocks of its own, and nothing at the end."""
    checkpoint, entries, end = tmp_path / "sparse.safetensors", {}, 0
    for name, tensor in load_file(source / "mdm.safetensors").items():
        entries[name] = Entry("F32", tuple(tensor.shape), end, 4 * tensor.numel())
        end += 4 * tensor.numel()
    with open(checkpoint, "wb") as file:
        header = write_header(entries)
        file.write(header)
        file.truncate(len(header) + end)
        for start in (50_000, 120_000):
            file.seek(start)
            file.write(b"\0\0\x80\x3f" * 100)
    if 512 * checkpoint.stat().st_blocks > end / 2:
        pytest.skip("this file system has no holes")
    shutil.copyfile(SHIPPED_TOKENIZER, tmp_path / "sparse.tokenizer.model")
    weights = export(tmp_path / "a.bundle", checkpoint=checkpoint) / "weights.safetensors"
    assert weights.read_bytes() == checkpoint.read_bytes()
    assert weights.stat().st_blocks <= checkpoint.stat().st_blocks
    assert weights.stat().st_ino != checkpoint.stat().st_ino


def test_the_autoencoder_comes_along(export: Callable[..., Path], source: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = load_config(tiny(family="dim", in_channels=4))
    save_file(build_model(config).state_dict(), tmp_path / "latent.safetensors")
    save_file(Autoencoder(AutoencoderShape(channels=(32, 32), blocks=1)).state_dict(), tmp_path / "vae.safetensors")
    bundle = export_bundle(
        tmp_path / "latent.safetensors", config, tmp_path / "a.bundle", autoencoder=tmp_path / "vae.safetensors"
    )
    manifest = manifest_of(bundle)
    assert {"encode_image", "decode_image"} < manifest["graphs"].keys()
    assert {"encode_image", "decode_image"} < manifest["validation"]["graphs"].keys()
    assert (manifest["picture"]["channels"], manifest["picture"]["size"], manifest["picture"]["factor"]) == (3, 16, 2)
