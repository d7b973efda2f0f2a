"""The command `mdm inspect`, on a bundle of our own and on a stranger's: what it shows, and that it never breaks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_TOKENIZER
from mdm.runtime.bundle import open_bundle
from mdm.tools.main import main

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any], tiny_model: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    save_file(tiny_model().state_dict(), folder / "model.safetensors")
    return export_bundle(
        folder / "model.safetensors", tiny(), folder / "tiny.bundle", tokenizer=SHIPPED_TOKENIZER, validate=True
    )


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy, which a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "tiny.bundle"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def change(bundle: Path, *place: str, to: Any) -> None:
    """Put a value into the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_it_shows_what_is_in_a_bundle(sound: Path, capsys: Out) -> None:
    assert main(["inspect", str(sound)]) == 0
    out, err = capsys.readouterr()
    manifest = open_bundle(sound).manifest
    assert err == ""
    for name in (*manifest["tasks"], *manifest["graphs"]):
        assert f"\n{name} " in out
    for said in (
        "mdm, 3 blocks x 32, mamba2, 0.1M parameters", "fp32, opset 20", "weights.safetensors 0.3 MB",
        "solver ddim, steps 3, guidance 1.5", f"model.safetensors, float32, sha256 {manifest_hash(sound)[:16]}..",
        "with mdm-deploy ", "validated by ONNX Runtime's CPU: off by at most ", "golden      23 files",
        "history[batch,3,tokens,12]", "picture[batch,3,32,32]", manifest["created"],
    ):  # fmt: skip
        assert said in out
    assert "not in the manifest" not in out


def manifest_hash(bundle: Path) -> str:
    return str(open_bundle(bundle).manifest["provenance"]["checkpoint"]["sha256"])


def test_json_is_the_manifest(sound: Path, capsys: Out) -> None:
    assert main(["inspect", str(sound), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown.pop("verified"), shown.pop("extra_files"), shown.pop("engines")) == (False, [], [])
    assert shown == json.loads((sound / "manifest.json").read_text())


def test_verify_finds_a_flipped_bit(bundle: Path, capsys: Out) -> None:
    assert main(["inspect", str(bundle), "--verify"]) == 0
    assert f"all {len(open_bundle(bundle).manifest['files'])} files are the ones" in capsys.readouterr().out
    for name in ("weights.safetensors", "golden/task_joint.safetensors", "denoise_image.onnx", "tokenizer.model"):
        content = bytearray((bundle / name).read_bytes())
        content[-1] ^= 1
        (bundle / name).write_bytes(content)
        assert main(["inspect", str(bundle)]) == 0  # without hashing nobody can know
        capsys.readouterr()
        assert main(["inspect", str(bundle), "--verify", "--json"]) == 2
        out, err = capsys.readouterr()
        assert f"{name}' is not the file that the manifest signs" in err
        assert json.loads(out)["error"]["exit_code"] == 2
        content[-1] ^= 1
        (bundle / name).write_bytes(content)


def test_a_file_too_many_is_named(bundle: Path, capsys: Out) -> None:
    (bundle / "more.txt").write_text("x")
    assert main(["inspect", str(bundle)]) == 0
    assert "not in the manifest, and never read: more.txt" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nix", "manifest.json", "golden"])
def test_what_is_no_bundle_is_2(name: str, sound: Path, capsys: Out) -> None:
    assert main(["inspect", str(sound / name)]) == 2
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 3


def test_a_cut_bundle_is_2(bundle: Path, capsys: Out) -> None:
    (bundle / "weights.safetensors").write_bytes(b"")
    assert main(["inspect", str(bundle)]) == 2
    assert "has 0 bytes, the manifest signs" in capsys.readouterr().err
    (bundle / "weights.safetensors").unlink()
    assert main(["inspect", str(bundle)]) == 2
    assert "lacks the file 'weights.safetensors'" in capsys.readouterr().err


def test_neither_torch_nor_an_engine_is_needed(sound: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'onnxruntime'): sys.modules[name] = None\n"
        "from mdm.tools.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "inspect", "--verify", str(sound)], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "step_joint_guided" in run.stdout


# what a stranger may write, and the schema allows -> place, value
STRANGE: dict[str, tuple[tuple[str, ...], Any]] = {
    "name that closes a tag": (("name",), "[/b]"),
    "name that is a tag": (("name",), "[bold]x"),
    "no config": (("config",), {}),
    "strange config": (("config",), {"family": [1], "blocks": None, "width": {}, "mixer": "[/b]"}),
    "no graphs validated": (("validation",), {"state": "passed", "graphs": {}}),
    "no limit": (("validation",), {"state": "passed", "graphs": {"a": {"error": 1.0}}}),
    "no error": (("validation",), {"state": "passed", "graphs": {"a": 5}, "limit": 1.0}),
    "error in words": (("validation",), {"state": "passed", "graphs": {"a": {"error": "x"}}, "limit": 1.0}),
    "no reason": (("validation",), {"state": "skipped"}),
    "tag in the checkpoint": (("provenance", "checkpoint", "file"), "[b]"),
    "tag in the type": (("provenance", "checkpoint", "dtype"), "[/b]"),
    "no tools": (("provenance", "tools"), {}),
    "no graphs": (("graphs",), {}),
    "no tasks": (("tasks",), {}),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_manifest_is_shown_or_refused(name: str, bundle: Path, capsys: Out) -> None:
    place, value = STRANGE[name]
    change(bundle, *place, to=value)
    code = main(["inspect", str(bundle)])
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert len(err.splitlines()) <= 3
    if code == 0 and isinstance(value, str):
        assert value in out


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "family"), "mdm\x1b]0;pwned\x07"),
        (("config", "mixer"), "\x1b[2J"),
        (("validation",), {"state": "skipped", "reason": "\x1b[2J\x9b31m"}),
        (("validation",), {"state": "skipped", "reason": "x\nall 45 files are the ones the manifest signs"}),
    ],
)
def test_a_stranger_does_not_steer_the_terminal(place: tuple[str, ...], value: Any, bundle: Path, capsys: Out) -> None:
    change(bundle, *place, to=value)
    assert main(["inspect", str(bundle)]) in (0, 2)
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & {*out, *err}
    assert not any(line.startswith("all 45 files") for line in out.splitlines())


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "[", "[bold]x", "a\nall 45 files are the ones the manifest signs"])
def test_a_strange_file_name_is_shown_as_it_is(name: str, bundle: Path, capsys: Out) -> None:
    (bundle / name).mkdir()
    (bundle / name / "b]").write_text("x")
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("all 45 files") for line in out.splitlines())
    if name.startswith("["):
        assert f"never read: {name}/b]" in out


def test_engines_are_listed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    """By the machine they are for; one that this user built, a stranger's, and one whose manifest is broken."""
    from mdm.runtime.tensorrt.facts import Options, facts_of
    from mdm.runtime.tensorrt.profiles import PROFILES
    from mdm.runtime.tensorrt.records import Record, engine_path, manifest_path, record_path

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    opened = open_bundle(bundle)
    (bundle / "engines").mkdir()
    for graph, gpu, trusted in (
        ("step_text", "NVIDIA H200", True), ("step_joint", "NVIDIA H200", False), ("step_image", "\x1b[31mL4", False)
    ):  # fmt: skip
        place = {"gpu": gpu, "tensorrt": "11.4.0.106", "platform": "linux x86_64"}
        options = Options(strip=True, bodies=True) if graph == "step_joint" else Options()
        facts = facts_of(opened, graph, [PROFILES["edge"], PROFILES["latency"]], options, place)
        path = engine_path(opened, facts)
        path.write_bytes(b"an engine")
        contents = {"layers": 9, "plugins": 2, "operators": []}
        record = Record.of_engine(path, facts, 1.5, "2026-01-31T12:00:00.000Z", contents)
        record.write(manifest_path(path))
        if trusted:
            record.write(record_path(path, record.sha256))
    assert main(["inspect", str(bundle), "--json"]) == 0
    told = {one["graph"]: one for one in json.loads(capsys.readouterr().out)["engines"]}
    assert {graph: one.get("trusted") for graph, one in told.items()} == {
        "step_text": True, "step_joint": False, "step_image": None
    }  # fmt: skip
    assert (told["step_text"]["profiles"], told["step_text"]["bytes"]) == (["edge", "latency"], 9)
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "TensorRT engines for NVIDIA H200, TensorRT 11.4.0.106 on linux x86_64" in text
    rows = [line.split() for line in text.split("TensorRT engines")[1].splitlines()]
    assert ["step_text", "edge,", "latency", "-", "0.0", "2026-01-31", "yes"] in rows
    assert ["step_joint", "edge,", "latency", "strip,", "bodies", "0.0", "2026-01-31", "no"] in rows
    assert "expected a line of text" in text.split("cannot be used")[1]
    assert "\x1b[31m" not in text
    next((bundle / "engines").glob("step_text-*.engine")).write_bytes(b"another's")
    assert main(["inspect", str(bundle), "--verify"]) == 0
    assert "step_text-" in capsys.readouterr().out.split("cannot be used")[1]
