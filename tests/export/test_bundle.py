"""Exports from end to end on tiny models: what a bundle holds, that it is the same each time, and that whatever goes
wrong publishes nothing: no target, no leftovers beside it, and an earlier bundle stays whole.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from mdm.export import export_bundle, mixers
from mdm.export.graph import Graph, Value
from mdm.export.orders import Orders
from mdm.export.step import Step
from mdm.export.validate import session
from mdm.export.weights import Weights
from mdm.plugins.contract import DOMAIN, VERSION
from mdm.plugins.errors import EnvironmentLackError, InputError, ParityError
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.autoencoder import Autoencoder, AutoencoderShape
from mdm.reference.checkpoint import build_model, published_name
from mdm.runtime.bundle import open_bundle, sha256_of
from mdm.runtime.safetensors_header import Entry, read_header, write_header

Tiny = Callable[..., dict[str, Any]]
SCANS = {f"{DOMAIN}.MambaSsdScan", f"{DOMAIN}.MambaSelectiveScan"}
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
WHOLE = ("mdm", "dim")
STABLE = ("weights.safetensors", "derived.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tiny_model: Callable[..., Any]) -> Path:
    """A folder with the checkpoints mdm, keep (which selects tokens) and dim, the tokenizers and configs beside."""
    folder = tmp_path_factory.mktemp("source")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        dim = build_model(load_config(tiny(family="dim")))
    short = {"solver": "dim", "steps": 4, "guidance": 0.4}
    changes: dict[str, dict[str, Any]] = {
        "mdm": {}, "keep": {"keep": 0.5}, "dim": {"family": "dim", "sampler": short},
    }  # fmt: skip
    for name, change in changes.items():
        model = dim if name == "dim" else tiny_model(**change)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(tiny(**change)))
        if name != "dim":
            shutil.copyfile(SHIPPED_TOKENIZER, folder / f"{name}.tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def export(source: Path) -> Callable[..., Path]:
    """export(out, "dim", ...): of that checkpoint, without running the model unless asked."""

    def made(out: Path, name: str = "mdm", checkpoint: Path | None = None, **options: Any) -> Path:
        path = checkpoint or source / f"{name}.safetensors"
        return export_bundle(path, source / f"{name}.json", out, **({"validate": False} | options))

    return made


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


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[None]:
    """Nothing in the test's folder is another at the end, no file more and none less."""
    before = contents(tmp_path)
    yield
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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
            scans = [n for n in model.graph.node if n.domain == DOMAIN]
            assert [n.name for n in scans] == [f"backbone.blocks.{i}.mixers.0.scan" for i in range(3)]
            assert all(n.input and all(n.input) for n in scans)


def test_graphs_say_where_they_come_from(whole: Path) -> None:
    manifest = manifest_of(whole)
    for name, model in graphs_of(whole).items():
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert (facts["mdm.graph"], facts["mdm.opset"], facts["mdm.precision"]) == (name, "20", "fp32")
        assert facts["mdm.checkpoint.sha256"] == manifest["provenance"]["checkpoint"]["sha256"]
        assert json.loads(facts["mdm.config"]) == manifest["config"]
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets == ({"": 20, DOMAIN: VERSION} if model.functions else {"": 20})
        assert {f"{f.domain}.{f.name}" for f in model.functions} == SCANS & manifest["graphs"][name]["operators"].keys()


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


def test_two_exports_are_the_same_bytes(wholes: Path, source: Path, tmp_path: Path) -> None:
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


# -------------------------------------------------------------------------------------------------------- bad input


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    target.mkdir()
    tensors = load_file(source / "dim.safetensors")
    change(tensors)
    save_file(tensors, target / "dim.safetensors")
    return target / "dim.safetensors"


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("backbone.norm_out.weight"), "lacks the tensor 'norm_out.norm.weight'"),
    "more": (lambda t: t.update(x=torch.ones(1)), "has the tensor 'x', which the model does not"),
    "width": (lambda t: t.update({"backbone.norm_out.weight": torch.ones(17)}), "has shape (17,), expected (16,)"),
    "kind": (lambda t: t.update({"backbone.norm_out.weight": torch.ones(16).int()}), "expected floating point"),
    "nan": (lambda t: t["backbone.blocks.1.norm.weight"].fill_(torch.nan), "weights are damaged"),
    "one nan": (lambda t: t["backbone.modulation.weight"].view(-1)[5:6].fill_(torch.nan), "weights are damaged"),
    "inf": (lambda t: t["backbone.blocks.2.mixers.0.D"][:1].fill_(torch.inf), "weights are damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_told(damage: str, export: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    change, said = DAMAGES[damage]
    checkpoint = damaged(source, tmp_path / "in", change)
    with pytest.raises(InputError, match=re.escape(said)):
        export(tmp_path / "out" / "a.bundle", "dim", checkpoint, validate=True)
    assert [*tmp_path.glob("out/*"), *tmp_path.glob("out/.*")] == []


@pytest.mark.parametrize("size", [0, 7, 100, 40_000, -1])
def test_a_cut_checkpoint_is_told(size: int, export: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pth"):
        content = (source / "dim.safetensors").read_bytes()
        if suffix == ".pth":
            torch.save(load_file(source / "dim.safetensors"), tmp_path / "whole.pth")
            content = (tmp_path / "whole.pth").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(content[:size])
        with pytest.raises(InputError, match=f"cut{suffix}"):
            export(tmp_path / "a.bundle", "dim", tmp_path / f"cut{suffix}")
    assert not [path for path in os.listdir(tmp_path) if "bundle" in path]


# ----------------------------------------------------------------------------------------------------- the target


def test_a_foreign_target_is_never_touched(export: Callable[..., Path], tmp_path: Path) -> None:
    """Not even by --force: files, folders, links, and folders of other programs that have a manifest.json too."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "lost").symlink_to("nowhere")
    before = contents(tmp_path)
    for name in ("file", "folder", "full", "link", "lost"):
        for force in (False, True):
            with pytest.raises(InputError, match=f"{name}' exists and is not a bundle"):
                export(tmp_path / name, "dim", force=force)
    assert contents(tmp_path) == before


def test_a_link_to_a_bundle_is_not_replaced(export: Callable[..., Path], tmp_path: Path) -> None:
    export(tmp_path / "real", "dim")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(InputError, match="link"):
        export(tmp_path / "link", "dim", force=True)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("text", ['{"manifest_version": 3, "name": "a web extension"}', "not JSON", "[]", "{}"])
def test_another_programs_manifest_makes_no_bundle(text: str, export: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(text)
    (tmp_path / "app" / "precious").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="not a bundle"):
        export(tmp_path / "app", "dim", force=True)
    assert contents(tmp_path) == before


def test_an_earlier_bundle_is_replaced_when_asked(export: Callable[..., Path], tmp_path: Path) -> None:
    export(tmp_path / "a.bundle", "mdm")
    with pytest.raises(InputError, match="say --force"):
        export(tmp_path / "a.bundle", "dim")
    export(tmp_path / "a.bundle", "dim", force=True)
    assert manifest_of(tmp_path / "a.bundle")["config"]["family"] == "dim"
    assert os.listdir(tmp_path) == ["a.bundle"]
    assert open_bundle(tmp_path / "a.bundle").extra_files() == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(export: Callable[..., Path], tmp_path: Path) -> None:
    def report(phase: str, seconds: float | None) -> None:
        if (phase, seconds) == ("sign", None):
            (tmp_path / "a.bundle").mkdir()
            (tmp_path / "a.bundle" / "theirs").write_text("x")

    with pytest.raises(InputError, match="not a bundle"):
        export(tmp_path / "a.bundle", "dim", report=report)
    assert contents(tmp_path) == {"a.bundle": None, "a.bundle/theirs": b"x"}


@pytest.mark.parametrize("step", [1, 2])
def test_a_failed_replacement_leaves_the_earlier_bundle(
    step: int, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "a.bundle", "dim")
    before, rename, calls = contents(tmp_path), os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        export(tmp_path / "a.bundle", "mdm", force=True)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------- failures along the way

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_at(where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing fails in that phase: the function that writes there raises."""
    functions = {
        "folder": "tempfile.mkdtemp", "weights": "mdm.export.weights.copy_sparse",
        "derived": "mdm.export.weights.write_header", "graphs": "pathlib.Path.write_bytes",
        "tokenizer": "shutil.copyfile", "tables": "mdm.export.bundle.write_tables", "golden": "mdm.export.golden.save",
    }  # fmt: skip

    def failing(*given: Any, **named: Any) -> Any:
        raise error

    if where == "manifest":
        write = Path.write_text

        def some(path: Path, *given: Any, **named: Any) -> int:
            return failing() if path.name == "manifest.json" else write(path, *given, **named)

        monkeypatch.setattr(Path, "write_text", some)
    else:
        monkeypatch.setattr(functions[where], failing)


PHASES = ("folder", "weights", "derived", "graphs", "tokenizer", "tables", "golden", "manifest")


@pytest.mark.parametrize("where", PHASES)
def test_a_full_disk_is_told_and_nothing_is_left(
    where: str, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "a.bundle", "dim")
    before = contents(tmp_path)
    # The validation itself writes nothing; without it the golden files come at once.
    monkeypatch.setattr("mdm.export.validate.Validation.run", lambda self: {"state": "passed"})
    fail_at(where, FULL, monkeypatch)
    for name, force in (("a.bundle", True), ("b.bundle", False)):
        with pytest.raises(EnvironmentLackError, match="not enough space") as caught:
            export(tmp_path / name, "mdm", force=force, validate=where == "golden")
        assert len(str(caught.value).splitlines()) <= 3
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "bad disk"), ValueError()])
@pytest.mark.parametrize("where", ["weights", "graphs", "manifest"])
def test_whatever_is_raised_nothing_is_left(
    where: str, error: BaseException, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(where, error, monkeypatch)
    with pytest.raises(type(error)):
        export(tmp_path / "a.bundle")
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_told_before_it_is_used(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    monkeypatch.setattr("mdm.export.weights.write_header", lambda entries: pytest.fail("it was used"))
    with pytest.raises(EnvironmentLackError, match=r"0\.0 GB are free"):
        export(tmp_path / "a.bundle", precision="fp16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["folder", "golden"])
def test_a_killed_export_leaves_nothing_at_the_target(
    moment: str, export: Callable[..., Path], source: Path, tmp_path: Path
) -> None:
    """As soon as its folder is there, or that of the golden files, in the middle of validation."""
    out = tmp_path / "a.bundle"
    words = [source / "dim.safetensors", "--config", source / "dim.json", "-o", out]
    child = subprocess.Popen([sys.executable, "-m", "mdm.tools.main", "export", *words], stderr=subprocess.DEVNULL)
    try:
        sign = {"folder": ".*.partial", "golden": ".*.partial/golden"}[moment]
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(sign)):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert not out.exists()
    export(out, "dim")
    open_bundle(out).verify()


# ---------------------------------------------------------------------------------------------------- planted faults

ADD, SCAN, GATHER, KEEP, SELECT = Graph.split_op, mixers.scan, Orders.gather, Step.keep, Step.select


def exchange(one: str, other: str) -> Any:
    """Nodes of one operator become another's."""
    return (Graph, "split_op", lambda g, op, *rest, **named: ADD(g, other if op == one else op, *rest, **named))


def without(name: str) -> Any:
    """Scans that leave out an input."""
    return (mixers, "scan", lambda g, op, needed, more, **named: SCAN(g, op, needed, more | {name: None}, **named))


def swapped(self: Orders, x: Value, start: int, to: int) -> Value:
    swap = {1: 2, 2: 1}
    return GATHER(self, x, swap.get(start, start), to)


# what is wrong -> checkpoint, what is put in the place of what, graph and output that must be named
FAULTS: dict[str, tuple[str, Any, str, str]] = {
    "time": ("dim", exchange("Sin", "Cos"), "denoise_image", "eps"),
    "gate": ("dim", without("z"), "denoise_image", "eps"),
    "D": ("mdm", without("D"), "denoise_image", "eps"),
    "bias": ("dim", without("delta_bias"), "denoise_image", "eps"),
    "mask": ("keep", without("mask"), "denoise_image", "eps"),
    "order": ("mdm", (Orders, "gather", swapped), "denoise_image", "eps"),
    "given": ("mdm", (Step, "keep", lambda self, given, old, new: new), "step_image", "base_next|point_next|x0"),
    "slots": (
        "dim", (Step, "spread", lambda self, row: (c := SPREAD(self, row)) | {"slot0": c["slot1"]}), "step_image",
        "base_next|point_next|history_next",
    ),
    "pieces": ("mdm", exchange("ArgMax", "ArgMin"), "decode_text", "ids"),
    "selection": ("keep", (Step, "select", lambda self, *x: 1.0 - SELECT(self, *x)), "step_image", "mask_next"),
}  # fmt: skip
SPREAD = Step.spread


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("fault", "precision"), [*((fault, "fp32") for fault in FAULTS), ("D", "bf16"), ("gate", "fp16")]
)
def test_a_graph_that_computes_something_else_is_not_published(
    fault: str, precision: str, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, patch, graph, output = FAULTS[fault]
    monkeypatch.setattr(*patch)
    with pytest.raises(ParityError, match=f"(?s)'{graph}'.*output '({output})'") as caught:
        export(tmp_path / "a.bundle", checkpoint, precision=precision, validate=True)
    assert caught.value.exit_code == 1


@pytest.mark.usefixtures("unchanged")
def test_choices_are_compared_in_half_precision_too(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS["selection"][1])
    with pytest.raises(ParityError, match="mask_next"):
        export(tmp_path / "a.bundle", "keep", precision="fp16", validate=True)


@pytest.mark.usefixtures("unchanged")
def test_a_graph_that_is_no_onnx_is_not_published(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Graph.model

    def wrong(self: Graph) -> ModelProto:
        made = model(self)
        made.graph.node.append(helper.make_node("NoSuchOperator", ["t"], ["u"]))
        return made

    monkeypatch.setattr(Graph, "model", wrong)
    with pytest.raises(ParityError, match="'denoise_image' is not valid ONNX"):
        export(tmp_path / "a.bundle", "dim", validate=True)


def test_weights_at_a_wrong_place_are_noticed(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors of one shape that have changed places."""
    place = Weights.place

    def wrong(self: Weights, model: ModelProto, *given: Any) -> None:
        place(self, model, *given)
        held = {t.name: t for t in model.graph.initializer}
        first, second = (held[f"backbone.blocks.{i}.mixers.0.in_proj.weight"] for i in (0, 1))
        mine = list(first.external_data)
        del first.external_data[:]
        first.external_data.extend(second.external_data)
        del second.external_data[:]
        second.external_data.extend(mine)

    monkeypatch.setattr(Weights, "place", wrong)
    with pytest.raises(ParityError, match="'denoise_image'"):
        export(tmp_path / "a.bundle", "dim", validate=True)
    assert os.listdir(tmp_path) == []
