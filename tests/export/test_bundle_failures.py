"""Exports that fail, on tiny models: whatever goes wrong publishes nothing. No target, no leftovers beside it, and an
earlier bundle stays whole.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto, helper
from safetensors.torch import load_file, save_file

from mdm.export import mixers
from mdm.export.graph import Graph, Value
from mdm.export.orders import Orders
from mdm.export.step import Step
from mdm.export.weights import Weights
from mdm.plugins.errors import EnvironmentLackError, InputError, ParityError
from mdm.runtime.bundle import open_bundle

Tiny = Callable[..., dict[str, Any]]
Contents = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture
def unchanged(tmp_path: Path, contents: Contents) -> Iterator[None]:
    """Nothing in the test's folder is another at the end, no file more and none less."""
    before = contents(tmp_path)
    yield
    assert contents(tmp_path) == before


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


def test_a_foreign_target_is_never_touched(export: Callable[..., Path], tmp_path: Path, contents: Contents) -> None:
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
def test_another_programs_manifest_makes_no_bundle(
    text: str, export: Callable[..., Path], tmp_path: Path, contents: Contents
) -> None:
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
    assert open_bundle(tmp_path / "a.bundle").manifest["config"]["family"] == "dim"
    assert os.listdir(tmp_path) == ["a.bundle"]
    assert open_bundle(tmp_path / "a.bundle").extra_files() == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(
    export: Callable[..., Path], tmp_path: Path, contents: Contents
) -> None:
    def report(phase: str, seconds: float | None) -> None:
        if (phase, seconds) == ("sign", None):
            (tmp_path / "a.bundle").mkdir()
            (tmp_path / "a.bundle" / "theirs").write_text("x")

    with pytest.raises(InputError, match="not a bundle"):
        export(tmp_path / "a.bundle", "dim", report=report)
    assert contents(tmp_path) == {"a.bundle": None, "a.bundle/theirs": b"x"}


@pytest.mark.parametrize("step", [1, 2])
def test_a_failed_replacement_leaves_the_earlier_bundle(
    step: int, export: Callable[..., Path], tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
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
    where: str, export: Callable[..., Path], tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
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

ADD, SCAN, GATHER, KEEP, SELECT = Graph.split_op, mixers.own_node, Orders.gather, Step.keep, Step.select


def exchange(one: str, other: str) -> Any:
    """Nodes of one operator become another's."""
    return (Graph, "split_op", lambda g, op, *rest, **named: ADD(g, other if op == one else op, *rest, **named))


def without(name: str) -> Any:
    """Scans that leave out an input."""
    return (mixers, "own_node", lambda g, op, needed, more, **named: SCAN(g, op, needed, more | {name: None}, **named))


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
