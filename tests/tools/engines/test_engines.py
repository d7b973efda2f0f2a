"""`mdm build` with TensorRT-RTX's builder, and with stand-ins for a TensorRT that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from mdm.export import export_bundle
from mdm.plugins.contract import SHORT_CONV
from mdm.plugins.errors import InputError
from mdm.plugins.functions import operator_model
from mdm.reference import SHIPPED_CHECKPOINT
from mdm.runtime.bundle import open_bundle, sha256_of
from mdm.runtime.tensorrt.engines import open_engine, place_of

from ...plugins.tensorrt.test_cpp_plugin import headers, library

TINY = "step_text"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny.bundle"
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", out, precision="fp16", validate=False)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "tiny.bundle"))


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def build(bundle: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**environment, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    command = [sys.executable, "-m", "mdm.tools.main", "build", str(bundle), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def engines(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines").glob("*.engine"))


def record_of(made: dict[str, Any]) -> Path:
    """What the user's cache has of an engine."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy/engines"
    return folder / Path(made["file"]).stem / f"{made['sha256']}.json"


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


def change_nodes(bundle: Path, attribute: str, value: str, every: int) -> None:
    """In every so-manieth scan of a graph, signed anew."""
    path = bundle / f"{TINY}.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in [node for node in model.graph.node if node.op_type == "MambaSsdScan"][::every]:
        next(one for one in node.attribute if one.name == attribute).s = value.encode()
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "nodes", "asked"),
    [
        (("plugin_version", "2", 1), 7, "version '2' of namespace 'mdm'"),
        (("plugin_namespace", "other", 4), 2, "version '1' of namespace 'mdm' and version '1' of namespace 'other'"),
    ],
)
def test_a_plugin_that_is_not_the_one_asked_for(
    bundle: Path, rig: dict[str, str], change: tuple[str, str, int], nodes: int, asked: str
) -> None:
    """TensorRT would take the bodies without a word."""
    change_nodes(bundle, *change)
    run = build(bundle, rig, "--graph", TINY)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-3:] == [
        f"Error: graph '{TINY}' of bundle '{bundle}': {nodes} of 7 nodes of operator 'MambaSsdScan' find no plugin, "
        "and would run by their ONNX bodies",
        f"the file asks for {asked}; registered: version '1' of namespace 'mdm'",
        "export the bundle again, or build with --bodies",
    ]
    assert engines(bundle) == []
    assert build(bundle, rig, "--graph", TINY, "--bodies").returncode == 0


def test_plugins_that_are_not_registered(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import mdm.plugins.tensorrt.python_plugin as p\np.register = lambda: None\n"
    )
    environment = {**rig, "PYTHONPATH": f"{tmp_path}{os.pathsep}{rig['PYTHONPATH']}"}
    run = build(bundle, environment, "--graph", TINY)
    assert run.returncode == 2
    assert "7 of 7 nodes of operator 'MambaShortConv' find no plugin" in run.stderr
    assert "registered: none of this name" in run.stderr


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


def test_nothing_is_written_outside(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """A bundle whose folder of engines is a link, or that has links where a file is to be."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / "engines").symlink_to(outside)
    run = build(bundle, rig, "--graph", "decode_text")
    assert (run.returncode, engines(bundle)) == (2, [])
    assert "engines' is a link, expected a folder" in run.stderr
    (bundle / "engines").unlink()
    (made,) = json.loads(build(bundle, rig, "--graph", "decode_text", "--json").stdout)["engines"]
    Path(made["file"]).unlink()
    Path(made["file"]).symlink_to(outside / "engine")
    (again,) = json.loads(build(bundle, rig, "--graph", "decode_text", "--json").stdout)["engines"]
    assert again["new"]
    assert not Path(again["file"]).is_symlink()
    assert [*outside.iterdir()] == []


def test_nothing_is_run_from_the_folder_one_is_in(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """A stranger's bundle may hold a tensorrt.py."""
    (bundle / "tensorrt.py").write_text("raise SystemExit('a stranger ran')")
    command = [sys.executable, "-P", "-m", "mdm.tools.main", "build", ".", "--graph", "decode_text"]
    run = subprocess.run(command, env=rig, cwd=bundle, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(engines(bundle)) == 1


def test_a_build_ends_with_whoever_asked(bundle: Path, tmp_path: Path) -> None:
    """Killed, not stopped: a child that went on would hold the GPU."""
    environment = stand_in(tmp_path, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                           "time.sleep(600)")  # fmt: skip
    command = [sys.executable, "-m", "mdm.tools.main", "build", str(bundle), "--graph", TINY]
    asking = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").is_file() and bool((tmp_path / "pid").read_text()))
    child = int((tmp_path / "pid").read_text())
    asking.kill()
    asking.wait()
    wait_for(lambda: not Path(f"/proc/{child}/cmdline").is_file() or not Path(f"/proc/{child}/cmdline").read_bytes())


def wait_for(held: Callable[[], bool]) -> None:
    for _ in range(600):
        if held():
            return
        time.sleep(0.05)
    raise AssertionError("after 30 seconds it does not hold")


def stand_in(folder: Path, source: str) -> dict[str, str]:
    """An environment whose `tensorrt` is this."""
    (folder / "tensorrt.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("import os, sys\nprint('[E] out of memory', file=sys.stderr)\nos.abort()", 4,
         r"TensorRT ended its process (-6)" "\n[E] out of memory"),
        ("raise ImportError('libnvinfer.so.11 is not here')", 3, "found ImportError: libnvinfer.so.11 is not here"),
        ("__version__ = '10.0.1'", 3, "found 10.0.1, expected 10.3 or newer"),
        ("print('hello')\nimport sys\nsys.exit(0)", 4, "TensorRT ended its process (0)\nhello"),
    ],
)  # fmt: skip
def test_a_tensorrt_that_fails(bundle: Path, tmp_path: Path, source: str, code: int, said: str) -> None:
    run = build(bundle, stand_in(tmp_path, source), "--graph", TINY)
    assert run.returncode == code
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert not (bundle / "engines").exists()


def test_a_build_that_ends_in_a_crash_leaves_nothing(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """With half of the engine written."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "write = pathlib.Path.write_bytes\n"
        "def crash(self, content):\n"
        "    write(self, content[:1000])\n"
        "    if '.engine.' in self.name:\n"
        "        os.abort()\n"
        "pathlib.Path.write_bytes = crash\n"
    )
    environment = {**rig, "PYTHONPATH": f"{tmp_path}{os.pathsep}{rig['PYTHONPATH']}"}
    run = build(bundle, environment, "--graph", "decode_text")
    assert run.returncode == 4
    assert f"graph 'decode_text' of bundle '{bundle}' was not built\nTensorRT ended its process (-6)" in run.stderr
    assert os.listdir(bundle / "engines") == []
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy/engines").exists()


def test_what_tensorrt_refuses(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    """A profile behind the model's positions: planted, since ours cannot ask for one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import mdm.runtime.tensorrt.profiles as p\np._texts = lambda graph, lengths, profile: [8, 128]\n"
    )
    environment = {**rig, "PYTHONPATH": f"{tmp_path}{os.pathsep}{rig['PYTHONPATH']}"}
    run = build(bundle, environment, "--graph", TINY)
    assert run.returncode == 4
    first, second, third = run.stderr.splitlines()[-3:]
    assert first == f"Error: graph '{TINY}' of bundle '{bundle}' was not built"
    assert second == "TensorRT says: it builds no engine, and does not say why"
    assert "violate shape constraints" in third
    assert os.listdir(bundle / "engines") == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--graph", "step_txt"), 2, "has no graph 'step_txt'"),
        (("--profile", "fast"), 2, "there is no profile 'fast'"),
        (("--backend", "ort-cpu"), 2, "ort-cpu"),
        (
            ("--precision", "bf16"),
            2,
            "is fp16, not bf16: TensorRT keeps to the types in its graphs\nexport it so: mdm export",
        ),
        (("--strip", "--refit"), 2, "--strip does not go with --refit"),
        (("--version-compatible",), 2, "add --library or --bodies"),
        (("--library", "x", "--bodies"), 2, "--bodies does not go with --library"),
        (("--profile", "edge", "--profile", "edge"), 2, "two profiles have the name 'edge'"),
        (("--trust", "--refit"), 2, "--trust builds nothing"),
        (("--trust",), 2, "brings no engines to trust"),
    ],
)
def test_wrong_use(bundle: Path, words: tuple[str, ...], code: int, said: str) -> None:
    run = build(bundle, dict(os.environ), *words)
    assert run.returncode == code
    assert said in run.stderr


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


def test_a_library_that_is_none(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    assert f"file '{library}' cannot be read" in build(bundle, rig, "--library", str(library)).stderr
    library.write_bytes(b"no library")
    run = build(bundle, rig, "--graph", TINY, "--library", str(library))
    assert run.returncode == 2
    assert f"takes no plugins from '{library}'" in run.stderr


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


def test_without_tensorrt(bundle: Path) -> None:
    run = build(bundle, dict(os.environ), "--graph", TINY)
    assert run.returncode == 3
    assert 'pip install "mdm-deploy[tensorrt]"' in run.stderr


def test_what_no_kernel_serves_is_said_before(tmp_path: Path, tiny: Any, tiny_model: Any, rig: dict[str, str]) -> None:
    """A state of 8: not a word of TensorRT's, and the bodies are the way out."""
    from safetensors.torch import save_file

    from mdm.reference import SHIPPED_TOKENIZER

    save_file(tiny_model().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(tiny()))
    made = export_bundle(
        tmp_path / "model.safetensors", tmp_path / "model.json", tmp_path / "b.bundle", tokenizer=SHIPPED_TOKENIZER,
        validate=False,
    )  # fmt: skip
    run = build(made, rig, "--graph", "denoise_image")
    assert run.returncode == 2
    assert "MambaSsdScan: no GPU kernel for N = 8" in run.stderr
    assert build(made, rig, "--graph", "denoise_image", "--bodies").returncode == 0
