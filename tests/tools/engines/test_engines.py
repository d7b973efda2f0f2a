"""`mdm build` with TensorRT-RTX's builder: what is built, when, and what is known of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from mdm.plugins.contract import SHORT_CONV
from mdm.plugins.errors import InputError
from mdm.plugins.functions import operator_model
from mdm.runtime.bundle import open_bundle, sha256_of
from mdm.runtime.tensorrt.engines import open_engine, place_of

from ...plugins.tensorrt.test_cpp_plugin import headers, library
from .building import TINY, build, change_nodes, engines, record_of


def test_engines_are_built_once(bundle: Path, rig: dict[str, str]) -> None:
    """Once for each set of facts: the same asks for nothing, another profile and other plugins for another."""
    words = ("--graph", TINY, "--json")
    first = build(bundle, rig, *words)
    assert first.returncode == 0, first.stderr
    (made,) = json.loads(first.stdout)["engines"]
    assert made["new"]
    assert made["contents"]["plugins"] == 14  # a scan and a convolution in each of seven blocks
    assert made["contents"]["operators"] == [["MambaShortConv", "1", "mdm"], ["MambaSsdScan", "1", "mdm"]]
    assert made["bytes"] == Path(made["file"]).stat().st_size > 1e6
    (again,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    assert again == made | {"new": False, "built": again["built"]}
    assert again["built"] > made["built"]  # the one asked for last is the one that is run
    (forced,) = json.loads(build(bundle, rig, *words, "--force").stdout)["engines"]
    assert (forced["new"], forced["file"]) == (True, made["file"])
    assert forced["built"] > made["built"]
    (bodies,) = json.loads(build(bundle, rig, *words, "--bodies").stdout)["engines"]
    assert (bodies["contents"]["plugins"], bodies["contents"]["operators"]) == (0, [])
    (edge,) = json.loads(build(bundle, rig, *words, "--profile", "edge").stdout)["engines"]
    assert len({made["file"], bodies["file"], edge["file"]}) == 3 == len(engines(bundle))
    assert not [*(bundle / "engines").glob("*.part")]
    # Who runs engines may be another user.
    assert {path.stat().st_mode & 0o777 for path in (bundle / "engines").iterdir()} == {0o644}

    cache = Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy"
    record = record_of(forced)  # TensorRT-RTX builds another engine every time
    facts = json.loads(record.read_text())["facts"]
    assert (facts["graph"], facts["precision"], facts["gpu"]) == (TINY, "fp16", "no GPU")
    assert facts["profiles"][0]["shapes"]["base"] == [[1, 8, 16], [1, 20, 16], [4, 20, 16]]
    assert facts["tensorrt"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {name: manifest["files"][name]["sha256"] for name in facts["files"]} == facts["files"]
    assert {"step_text.onnx", "derived.safetensors"} <= {*facts["files"]}

    assert {path.name for path in cache.iterdir()} == {"engines", f"timing-{facts['tensorrt']}.cache"}
    beside = Path(made["file"]).with_suffix(".json")
    assert json.loads(beside.read_text()) == json.loads(record.read_text())
    beside.unlink()
    (again,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    assert (again["new"], beside.is_file()) == (False, True)


def test_what_is_known_of_an_engine_is_not_believed_blindly(bundle: Path, rig: dict[str, str]) -> None:
    """Neither a record that is broken, nor a file that is another."""
    words = ("--graph", "decode_text", "--json")
    (made,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    for spoiled in ("{", "[]", '{"facts": 3}', json.dumps(json.loads(record_of(made).read_text()) | {"contents": {}})):
        record_of(made).write_text(spoiled)
        (made,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
        assert made["new"]
    Path(made["file"]).write_bytes(b"another's engine")
    (mended,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    assert mended["new"]
    assert mended["bytes"] == Path(made["file"]).stat().st_size


def test_an_engine_has_several_profiles(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """In the order they were asked for; and the runtime finds it by each."""
    (tmp_path / "mine.json").write_text('{"batch": [2, 2, 2], "text": [8]}')
    profiles = ("edge", "throughput", str(tmp_path / "mine.json"))
    words = [word for name in profiles for word in ("--profile", name)]
    (made,) = json.loads(build(bundle, rig, "--graph", TINY, *words, "--json").stdout)["engines"]
    assert [profile["name"] for profile in made["facts"]["profiles"]] == ["edge", "throughput", "mine"]
    shapes = [profile["shapes"]["base"] for profile in made["facts"]["profiles"]]
    assert shapes == [[[1, 8, 16], [1, 20, 16], [1, 20, 16]], [[1, 8, 16], [8, 20, 16], [16, 20, 16]], [[2, 8, 16]] * 3]
    opened = open_bundle(bundle)
    for name in ("edge", "throughput", "mine"):
        path, record, _ = open_engine(opened, TINY, place_of(made["facts"]["tensorrt"], None), name)
        assert (str(path), record.sha256) == (made["file"], made["sha256"])


def test_options_that_the_rig_can_build(bundle: Path, rig: dict[str, str]) -> None:
    """Each makes another engine. What needs a GPU, or TensorRT's lean runtime, is told by TensorRT's own words."""
    options = (
        ("--level", "0"),
        ("--stream-weights",),
        ("--hardware", "ampere-plus"),
        ("--hardware", "same-capability"),
    )
    for words in options:
        (made,) = json.loads(build(bundle, rig, "--graph", "decode_text", *words, "--json").stdout)["engines"]
        assert made["new"]
    assert len(engines(bundle)) == len(options)
    lean = build(bundle, rig, "--graph", "decode_text", "--version-compatible", "--bodies")
    assert lean.returncode == 3
    assert "TensorRT's lean runtime is not installed" in lean.stderr
    assert "pip install tensorrt-lean" in lean.stderr
    assert len(engines(bundle)) == len(options)


def test_a_trusted_bundle_is_not_built_again(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """What came with it is taken over whole, or not at all."""
    graphs = ("--graph", TINY, "--graph", "decode_text")
    assert build(bundle, rig, *graphs).returncode == 0
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.rename(tmp_path / "the maker's")
    opened, place = open_bundle(bundle), place_of(trt_version(rig), None)
    with pytest.raises(InputError, match=r"was not built here(.|\n)*--trust"):
        open_engine(opened, TINY, place)

    changed = (bundle / "engines" / engines(bundle)[1]).read_bytes()
    (bundle / "engines" / engines(bundle)[1]).write_bytes(changed[:-1] + b"?")
    refused = build(bundle, rig, "--trust")
    assert refused.returncode == 2
    assert "has the SHA-256" in refused.stderr
    assert not cache.exists()
    (bundle / "engines" / engines(bundle)[1]).write_bytes(changed)

    told = build(bundle, rig, "--trust", "--json")
    assert {one["graph"] for one in json.loads(told.stdout)["engines"]} == {TINY, "decode_text"}
    assert "TensorRT will run whatever is in these engines" in build(bundle, rig, "--trust").stderr
    open_engine(opened, TINY, place)
    assert not [
        one["graph"] for one in json.loads(build(bundle, rig, *graphs, "--json").stdout)["engines"] if one["new"]
    ]


def trt_version(rig: dict[str, str]) -> str:
    command = [sys.executable, "-c", "import tensorrt; print(tensorrt.__version__)"]
    return subprocess.run(command, env=rig, capture_output=True, text=True, check=True).stdout.strip()


def test_progress_is_told(bundle: Path, rig: dict[str, str]) -> None:
    """No terminal: a line a phase, TensorRT's own among them, and how long it took the last time once that is known."""
    words = ("--graph", "decode_text", "--graph", "encode_text")
    lines = build(bundle, rig, *words).stderr.splitlines()
    begins = [line.rpartition(", ")[0] for line in lines]
    assert begins[0] == "decode_text (1 of 2): parse"
    assert "encode_text (2 of 2): write" in begins
    assert any(line.startswith("decode_text (1 of 2): Building engine / ") for line in lines)
    assert not [line for line in lines if "%" in line or "the last time" in line]
    record = next((Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy/engines").glob("encode_text-*/*.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 61.7}))
    lines = build(bundle, rig, *words, "--force").stderr.splitlines()
    assert "encode_text (2 of 2): parse, 0 s, 62 s the last time" in lines
    assert build(bundle, rig, *words, "--json", "--force").stderr == ""


@pytest.mark.parametrize("version", ["10.3.0.26", "10.6.0.26", "10.7.0.23", "11.4.0.106"])
def test_plugins_are_taken_by_every_version(bundle: Path, stand_in: dict[str, str], version: str) -> None:
    """Before 10.7 TensorRT takes a file's functions first: they are left out."""
    run = build(bundle, {**stand_in, "STAND_IN_TENSORRT": version}, "--graph", TINY, "--json")
    assert run.returncode == 0, run.stderr
    (made,) = json.loads(run.stdout)["engines"]
    assert (made["contents"]["plugins"], made["facts"]["tensorrt"]) == (14, version)


@pytest.mark.parametrize("bodies", [False, True])
def test_a_model_for_some_shapes(rig: dict[str, str], tmp_path: Path, bodies: bool) -> None:
    """Of no bundle: one node, which has to become a plugin unless its body is asked for."""
    model = operator_model(SHORT_CONV, 1, "float16")
    model.graph.node[0].attribute.extend(
        helper.make_attribute(*one) for one in (("plugin_version", "1"), ("plugin_namespace", "mdm"))
    )
    onnx.save(model, tmp_path / "model.onnx")
    ask = (
        "import json, sys, pathlib; from mdm.tools.engines.run import build_for_shapes\n"
        "path, shapes, bodies = json.loads(sys.argv[1])\n"
        "path = pathlib.Path(path)\n"
        "plan, plugins = build_for_shapes(path, path.parent, shapes, {'tensorrt': 'any'}, bodies)\n"
        "print(json.dumps([len(plan), plugins]))"
    )
    shapes = {"x": [2, 20, 32], "weight": [32, 4], "bias": [32]}
    words = json.dumps([str(tmp_path / "model.onnx"), shapes, bodies])
    run = subprocess.run([sys.executable, "-c", ask, words], env=rig, capture_output=True, text=True, check=True)
    size, plugins = json.loads(run.stdout)
    assert size > 1000
    assert plugins == ([] if bodies else [["MambaShortConv", "1", "mdm"]])


def test_the_library_of_plugins(bundle: Path, rig: dict[str, str]) -> None:
    """Ours in C++: the same nodes become the same plugins, and the file itself is a fact."""
    version = (headers() / "NvInferVersion.h").read_text()
    if not re.search(r"define (TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) 11\b", version):
        pytest.skip("the rig is TensorRT 11, and TENSORRT_ROOT is another: classes of the two are laid out otherwise")
    words = ("--graph", TINY, "--library", str(library()))
    (made,) = json.loads(build(bundle, rig, *words, "--json").stdout)["engines"]
    assert made["contents"]["operators"] == [["MambaShortConv", "1", "mdm"], ["MambaSsdScan", "1", "mdm"]]
    assert made["contents"]["plugins"] == 14
    assert (made["facts"]["library"], made["facts"]["kernels"]) == (sha256_of(library()), None)
    change_nodes(bundle, "plugin_version", "2", 1)
    refused = build(bundle, rig, *words)
    assert "asks for version '2' of namespace 'mdm'; registered: version '1' of namespace 'mdm'" in refused.stderr
    lean = build(bundle, rig, "--graph", "decode_text", *words[2:], "--version-compatible")
    assert "TensorRT's lean runtime is not installed" in lean.stderr
