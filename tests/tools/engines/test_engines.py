"""`mdm build` with TensorRT-RTX's builder, and with stand-ins for a TensorRT that fails."""

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
from mdm.reference import SHIPPED_CHECKPOINT

TINY = "step_text"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", tmp_path / "tiny.bundle", precision="fp16", validate=False)


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def build(bundle: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**environment, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    command = [sys.executable, "-m", "mdm.tools.main", "build", str(bundle), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def engines(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines").glob("*.engine"))


def test_engines_are_built_once(bundle: Path, rig: dict[str, str]) -> None:
    """Once for each set of facts: the same asks for nothing, another profile and other plugins for another."""
    words = ("--graph", TINY, "--json")
    first = build(bundle, rig, *words)
    assert first.returncode == 0, first.stderr
    (made,) = json.loads(first.stdout)["engines"]
    assert made["built"]
    assert made["plugins"] == 14  # a scan and a convolution in each of seven blocks
    assert made["bytes"] == Path(made["file"]).stat().st_size > 1e6
    (again,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    assert (again["built"], again["file"]) == (False, made["file"])
    (forced,) = json.loads(build(bundle, rig, *words, "--force").stdout)["engines"]
    assert (forced["built"], forced["file"]) == (True, made["file"])
    (bodies,) = json.loads(build(bundle, rig, *words, "--bodies").stdout)["engines"]
    assert bodies["plugins"] == 0
    (edge,) = json.loads(build(bundle, rig, *words, "--profile", "edge").stdout)["engines"]
    assert len({made["file"], bodies["file"], edge["file"]}) == 3 == len(engines(bundle))
    assert not [*(bundle / "engines").glob("*.part")]

    cache = Path(os.environ["XDG_CACHE_HOME"]) / "mdm-deploy"
    record = cache / "engines" / Path(made["file"]).with_suffix(".json").name
    facts = json.loads(record.read_text())["facts"]
    assert (facts["graph"], facts["precision"], facts["gpu"]) == (TINY, "fp16", "no GPU")
    assert facts["shapes"]["base"] == [[1, 8, 16], [1, 20, 16], [4, 20, 16]]
    assert facts["tensorrt"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {name: manifest["files"][name]["sha256"] for name in facts["files"]} == facts["files"]
    assert {"step_text.onnx", "derived.safetensors"} <= {*facts["files"]}

    assert {path.name for path in cache.iterdir()} == {"engines", f"timing-{facts['tensorrt']}.cache"}
    assert {path.suffix for path in (bundle / "engines").iterdir()} == {".engine"}

    for spoiled in ("{", "[]", '{"facts": 3}', json.dumps(json.loads(record.read_text()) | {"contents": {}})):
        record.write_text(spoiled)  # as if nothing were known
        (mended,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
        assert mended["built"]
    Path(made["file"]).write_bytes(b"another's engine")
    (mended,) = json.loads(build(bundle, rig, *words).stdout)["engines"]
    assert mended["built"]
    assert mended["bytes"] == Path(made["file"]).stat().st_size


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
    assert again["built"]
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
        ("raise ImportError('libnvinfer.so.11 is not here')", 4, "TensorRT says: ImportError: libnvinfer.so.11"),
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
    """TensorRT-RTX dies of a profile behind the model's positions: planted, since ours cannot ask for one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import mdm.runtime.tensorrt.profiles as p\np._texts = lambda graph, lengths, profile: [8, 128]\n"
    )
    environment = {**rig, "PYTHONPATH": f"{tmp_path}{os.pathsep}{rig['PYTHONPATH']}"}
    run = build(bundle, environment, "--graph", TINY)
    assert run.returncode == 4
    assert f"graph '{TINY}' of bundle '{bundle}' was not built\nTensorRT ended its process (-" in run.stderr
    assert len([line for line in run.stderr.splitlines() if line.strip()]) <= 4
    assert engines(bundle) == []
    assert not [*(bundle / "engines").glob("*.part")]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--graph", "step_txt"), 2, "has no graph 'step_txt'"),
        (("--profile", "fast"), 2, "there is no profile 'fast'"),
        (("--backend", "ort-cpu"), 2, "ort-cpu"),
    ],
)
def test_wrong_use(bundle: Path, words: tuple[str, ...], code: int, said: str) -> None:
    run = build(bundle, dict(os.environ), *words)
    assert run.returncode == code
    assert said in run.stderr


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
