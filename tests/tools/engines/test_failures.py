"""`mdm build` that fails or is refused: by a TensorRT that is none, ends or says no, by plugins that are not there, by
use that is wrong; and that nothing is left, run or written where it should not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdm.export import export_bundle

from .building import TINY, build, change_nodes, engines


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


def test_a_library_that_is_none(bundle: Path, rig: dict[str, str], tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    assert f"file '{library}' cannot be read" in build(bundle, rig, "--library", str(library)).stderr
    library.write_bytes(b"no library")
    run = build(bundle, rig, "--graph", TINY, "--library", str(library))
    assert run.returncode == 2
    assert f"takes no plugins from '{library}'" in run.stderr


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
