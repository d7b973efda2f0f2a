"""`mdm check --backend tensorrt`, on a stand-in for TensorRT: sound engines pass every level, and what is wrong is
found and placed: a TensorRT that computes a node wrongly, an engine of other weights, one that is missing or from
elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from mdm.runtime.bundle import open_bundle, sha256_of
from mdm.runtime.tensorrt.records import Record, engine_path, manifest_path, manifests, read_record, record_path
from mdm.tools.check.finding import LEVELS

from ..built import GRAPH, Built, build
from .deployed import sign

NODE = "backbone.blocks.0.mixers.0.in_proj.MatMul"
# Appended to the stand-in: one node's output is a hundredth off, in whatever engine it is.
BENT = f"""
_sound = load


def load(model, weights=Path()):
    import onnx
    from onnx import helper

    bent = onnx.load_model_from_string(model)
    for place, node in enumerate(bent.graph.node):
        if node.name == "{NODE}":
            y, node.output[0] = node.output[0], "raw"
            off = helper.make_node("Constant", [], ["off"], value_float=0.01)
            bent.graph.node.insert(place + 1, helper.make_node("Add", ["raw", "off"], [y]))
            bent.graph.node.insert(place + 1, off)
            break
    return _sound(bent.SerializeToString(), weights)
"""


ON = ("--backend", "tensorrt")
QUICK = (*ON, "--against", "ort-cpu", "--level", "files", "--level", "steps")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Any, stand_in: dict[str, str]) -> Built:
    config = tiny(family="dim", state=16, blocks=1)
    return build(tmp_path_factory.mktemp("check"), config, stand_in, golden=True)


@pytest.fixture
def own(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """For a test to spoil. Records that it writes go where its commands look for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", built.environment["XDG_CACHE_HOME"])
    return built.copy(tmp_path)


@pytest.fixture(scope="module")
def wrong(built: Built, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the TensorRT is that computes a node wrongly: for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(built.environment["PYTHONPATH"], folder, dirs_exist_ok=True)
    with (folder / "tensorrt" / "computing.py").open("a") as file:
        file.write(BENT)
    return str(folder)


def found(report: Mapping[str, Any], verdict: str) -> list[tuple[str, str, str]]:
    return [(one["level"], one["subject"], one["said"]) for one in report["findings"] if one["verdict"] == verdict]


def engine_of(one: Built, graph: str) -> tuple[Path, Record]:
    ((engine, manifest),) = manifests(open_bundle(one.bundle), graph)
    return engine, read_record(manifest, engine)


def put(one: Built, content: bytes, record: Record) -> None:
    """An engine in the bundle's, recorded as one that was built here."""
    engine = engine_path(open_bundle(one.bundle), record.facts)
    engine.write_bytes(content)
    record = replace(record, sha256=sha256_of(engine), bytes=len(content))
    record.write(manifest_path(engine))
    record.write(record_path(engine, record.sha256))


def drop(engine: Path) -> None:
    engine.unlink()
    manifest_path(engine).unlink()


def test_sound_engines_pass_every_level(built: Built) -> None:
    report = built.told("check", built.bundle, *ON)
    assert (report["verdict"], report["backend"], report["against"]) == ("PASS", "tensorrt", "reference")
    assert not found(report, "FAIL") + found(report, "AMBIGUOUS")
    why = f"no engine was built of it, and no task needs it: mdm build {built.bundle} --graph denoise_image"
    assert found(report, "SKIPPED") == [(level, "denoise_image", why) for level in ("files", "steps")]
    assert list(dict.fromkeys(one["level"] for one in report["findings"])) == list(LEVELS)
    forms = {(one["subject"].split()[0], one["part"]) for one in report["findings"] if one["level"] == "operators"}
    assert forms == {
        (name, part) for name in ("MambaSelectiveScan", "MambaShortConv") for part in ("plugin", "function body")
    }  # fmt: skip
    assert {one["subject"] for one in report["findings"] if one["level"] == "blocks"} == {GRAPH}


def test_a_node_that_tensorrt_computes_wrongly_is_found_and_placed(built: Built, wrong: str, tmp_path: Path) -> None:
    """And runs again alone, where it is wrong still; on a TensorRT that is sound, and by ONNX Runtime, it is right."""
    report = built.told("check", built.bundle, *QUICK, code=1, PYTHONPATH=wrong)
    assert {(level, graph) for level, graph, _ in found(report, "FAIL")} == {("steps", "step_image"), ("steps", GRAPH)}
    words = ("--level", "blocks", "--report", tmp_path / "report")
    report = built.told("check", built.bundle, *ON, *words, code=1, PYTHONPATH=wrong)
    (divergence,) = report["divergences"]
    assert (divergence["graph"], divergence["node"], divergence["op"]) == (GRAPH, NODE, "MatMul")
    assert divergence["error"] == pytest.approx(0.01, rel=1)
    assert divergence["reproduce"].endswith(f"divergence/{GRAPH} --backend tensorrt")
    alone = ("check", "--replay", tmp_path / "report" / "divergence" / GRAPH)
    again = built.told(*alone, *ON, code=1, PYTHONPATH=wrong)
    assert again["rms"] == pytest.approx(divergence["error"], rel=1e-3)
    for backend in ("tensorrt", "ort-cpu"):
        assert built.told(*alone, "--backend", backend)["used"] < 1


def test_an_engine_of_other_weights(own: Built, tmp_path: Path) -> None:
    """Its record is right, and so is every node of the graph: the steps tell."""
    other = replace(own, bundle=Path(shutil.copytree(own.bundle, tmp_path / "other.bundle")))
    _, record = engine_of(own, GRAPH)
    for file in ("weights.safetensors", "derived.safetensors"):
        if (path := other.bundle / file).is_file():
            save_file({name: 1.01 * array for name, array in load_file(path).items()}, path)
    sign(other.bundle)
    (made,) = other.told("build", other.bundle, "--graph", GRAPH)["engines"]
    assert made["new"]
    assert own.told("check", own.bundle, *QUICK)["verdict"] == "PASS"
    put(own, Path(made["file"]).read_bytes(), record)
    report = own.told("check", own.bundle, *QUICK, code=1)
    assert {(level, graph) for level, graph, _ in found(report, "FAIL")} == {("steps", GRAPH)}


def test_an_engine_that_is_missing(own: Built) -> None:
    """What no task needs was skipped; this a task does."""
    drop(engine_of(own, GRAPH)[0])
    report = own.told("check", own.bundle, *QUICK, code=1)
    failed = found(report, "FAIL")
    assert {(level, graph) for level, graph, _ in failed} == {("files", GRAPH), ("steps", GRAPH)}
    for *_, said in failed:
        assert (
            said
            == f"graph '{GRAPH}' of bundle '{own.bundle}' has no engine; run: mdm build {own.bundle} --graph {GRAPH}"
        )


def test_an_engine_from_elsewhere(own: Built) -> None:
    engine, record = engine_of(own, GRAPH)
    gpu = "NVIDIA T4, compute capability 7.5"
    content = engine.read_bytes()
    drop(engine)
    put(own, content, replace(record, facts={**record.facts, "gpu": gpu}))
    failed = found(own.told("check", own.bundle, *QUICK, code=1), "FAIL")
    assert {(level, graph) for level, graph, _ in failed} == {("files", GRAPH), ("steps", GRAPH)}
    for *_, said in failed:
        assert f"was built for {gpu}, TensorRT 11.4.0.106 on linux" in said
        assert f"; found {record.facts['gpu']}, TensorRT 11.4.0.106 on linux" in said
        assert said.endswith(f" run: mdm build {own.bundle}")


def test_an_engine_that_tensorrt_refuses(own: Built) -> None:
    """It is trusted, and of the right place; TensorRT says why."""
    failed = found(own.told("check", own.bundle, *QUICK, code=1, STAND_IN_FAILS="deserialize:1"), "FAIL")
    ((level, _, said),) = failed
    assert level == "files"
    assert "does not load the engine: deserialize fails, as STAND_IN_FAILS asks" in said


def test_a_run_that_fails_is_a_finding_and_the_rest_goes_on(own: Built) -> None:
    failed = found(own.told("check", own.bundle, *QUICK, code=1, STAND_IN_FAILS="execute:1"), "FAIL")
    ((level, _, said),) = failed
    assert level == "steps"
    assert "failed in TensorRT: it does not run: " in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--profile", "edge"), "no engine of graph"),
        (("--against", "tensorrt"), "--against tensorrt compares the bundle with itself"),
        (("--against", "tensortt"), "did you mean 'tensorrt'?"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str, built: Built) -> None:
    run = built.mdm("check", built.bundle, *QUICK, *words)
    assert said in run.stdout + run.stderr
    assert run.returncode == (1 if "--profile" in words else 2)
