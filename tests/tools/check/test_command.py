"""`mdm check` as it is called: exit codes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file, save_file

from mdm.plugins.machine import Cores
from mdm.tools.check import run as module
from mdm.tools.check.finding import LEVELS, Difference, Finding, Limits, Verdict
from mdm.tools.main import main

from .deployed import Exported, spoil_golden, spoil_manifest

Find = Callable[[str], Exported]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """check("b.bundle", "--json") -> exit code and what was printed; never a traceback."""

    def call(*words: object) -> Said:
        code = main(["check", *map(str, words)])
        said = Said(code, *capsys.readouterr())
        assert "Internal error" not in said.err
        if code in (2, 3):
            assert said.err.startswith("Error: ")
            assert len(said.err.splitlines()) <= 3
        return said

    return call


Check = Callable[..., Said]


# ----------------------------------------------------------------------------------------------------- exit codes


def test_a_sound_bundle(exported: Find, check: Check) -> None:
    one = exported("dim")
    said = check(one.bundle, "--threads", 1)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == "dim on ort-cpu against reference"
    assert [line.split()[0] for line in lines[1:7]] == list(LEVELS)
    assert all(" PASS: " in line for line in lines[1:7])
    assert lines[-1].startswith("PASS: ")


@pytest.mark.parametrize(
    ("large", "asked", "given"), [(10**8, (), 1), (10**8, ("--threads", 3), 1), (0, (), 2), (0, ("--threads", 3), 3)]
)
def test_torch_takes_no_more_threads_than_the_engine(
    exported: Find, check: Check, monkeypatch: pytest.MonkeyPatch, large: int, asked: tuple[Any, ...], given: int
) -> None:
    """On a large machine of which this process has but two cores; for a small model one thread is enough."""
    monkeypatch.setattr("mdm.export.golden.LARGE", large)
    taken: list[int] = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    monkeypatch.setattr("mdm.plugins.machine.cores", lambda: Cores(64, 2, 2.5))
    assert check(exported("dim").bundle, "--level", "steps", *asked).code == 0
    assert taken == [given]


@pytest.mark.parametrize("ambiguous", ["pass", "fail"])
@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.AMBIGUOUS, Verdict.FAIL])
def test_exit_codes_follow_the_verdict(
    exported: Find, check: Check, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, ambiguous: str
) -> None:
    finding = Finding("steps", "g", "x0", "seed 0", verdict, "off by 2")
    monkeypatch.setattr(module, "check_graph", lambda *_: iter([finding]))
    said = check(exported("dim").bundle, "--level", "steps", "--against", "golden", "--ambiguous", ambiguous)
    good = verdict is Verdict.PASS or (verdict is Verdict.AMBIGUOUS and ambiguous == "pass")
    assert said.code == (0 if good else 1)
    assert (f"{verdict} steps: g x0 seed 0: off by 2" in said.out) == (verdict is not Verdict.PASS)
    assert said.out.splitlines()[-1].startswith(f"{verdict}: ")


def test_a_golden_answer_that_is_wrong_fails(exported: Find, check: Check, tmp_path: Path) -> None:
    """Whoever signs it."""

    def change(arrays: dict[str, Any]) -> None:
        arrays["out.x0"] = arrays["out.x0"] * 1.01

    bundle = spoil_golden(exported("dim").bundle, tmp_path / "b", "step_image", change)
    said = check(bundle, "--level", "steps", "--against", "golden", "--json")
    assert said.code == 1
    report = json.loads(said.out)
    assert report["verdict"] == "FAIL"
    failed = [f for f in report["findings"] if f["verdict"] == "FAIL"]
    assert [(f["subject"], f["part"]) for f in failed] == [("step_image", "x0")]


def test_nothing_checked_is_no_success(exported: Find, check: Check) -> None:
    said = check(exported("dim").bundle, "--level", "blocks", "--against", "golden")
    assert said.code == 3
    assert "nothing was checked" in said.err
    assert "needs the model: --against reference" in said.err
    assert said.out == ""


def test_nothing_checked_for_many_reasons_is_told_in_three_lines(
    exported: Find, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Finding("steps", "g", str(n), "", Verdict.SKIPPED, f"reason {n % 5}") for n in range(20)]
    monkeypatch.setattr(module, "check_graph", lambda *_: iter(many))
    said = check(exported("dim").bundle, "--level", "steps", "--against", "golden")
    assert said.code == 3
    assert "reason 0; reason 1; reason 2; reason 3; reason 4" in said.err


# -------------------------------------------------------------------------------------------------------- printing


def test_json_is_one_object_and_nothing_else(exported: Find, check: Check) -> None:
    said = check(exported("half").bundle, "--against", exported("mdm").bundle, "--level", "steps", "--json")
    assert (said.code, said.err) == (0, "")
    report = json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["against"] == "mdm"
    assert report["seconds"].keys() == {"steps"}
    refused = check(exported("mdm").bundle, "--task", "joing", "--json")
    assert refused.code == 2
    assert "did you mean 'joint'" in json.loads(refused.out)["error"]["message"]


def test_a_share_that_is_infinite_is_not_printed(exported: Find, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    error = Difference(nan, nan, nan, nan, (0,), nan, 1.0, 1)
    finding = Finding("steps", "g", "x0", "seed 0", Verdict.FAIL, "1 of 2", (2,), error, None, Limits(1, 1, ""))
    monkeypatch.setattr(module, "check_graph", lambda *_: iter([finding]))
    said = check(exported("dim").bundle, "--level", "steps", "--against", "golden")
    assert said.code == 1
    assert "inf" not in said.out
    assert json.loads(check(exported("dim").bundle, "--level", "steps", "--against", "golden", "--json").out)


def test_json_of_a_replay_knows_no_infinity(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    error = Difference(nan, nan, nan, nan, (0,), nan, 1.0, 1)
    monkeypatch.setattr("mdm.tools.check.nodes.replay.replay", lambda *_: (error, Limits(1.0, 1.0, "")))
    said = check("--replay", "folder", "--json")
    assert said.code == 1
    assert json.loads(said.out) == {"used": "inf", "rms": "nan", "worst": "nan", "limit": 1.0}
    assert check("--replay", "folder").out.startswith("FAIL: off by nan in the mean")


def test_golden_by_default_where_the_checkpoint_is_not_at_hand(exported: Find, check: Check, tmp_path: Path) -> None:
    def unknown(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["checkpoint"]["sha256"] = "0" * 64

    bundle = spoil_manifest(exported("dim").bundle, tmp_path / "b", unknown)
    said = check(bundle, "--level", "steps")
    assert said.code == 0
    assert said.err == "Checking against the golden files: no checkpoint named (--checkpoint).\n"
    assert "against golden" in said.out
    refused = check(bundle, "--against", "reference")
    assert refused.code == 2
    assert "--checkpoint FILE" in refused.err


def test_golden_where_there_is_no_torch(exported: Find) -> None:
    """All levels but one, in a process that cannot import them. Its stdout is a pipe."""
    missing = ["torch", "onnx"]
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from mdm.tools.main import main; sys.exit(main(sys.argv[1:]))"
    )
    bundle = str(exported("dim").bundle)
    made = subprocess.run(
        [sys.executable, "-c", code, "check", bundle], text=True, capture_output=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr == f"Checking against the golden files: {' and '.join(missing)} not installed.\n"
    assert "against golden" in made.stdout.splitlines()[0]
    assert "blocks        skipped: needs the model: --against reference" in made.stdout
    assert "\x1b" not in made.stdout
    asked = subprocess.run(
        [sys.executable, "-c", code, "check", bundle, "--against", "reference"],
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert asked.returncode == 3
    assert "not installed" in asked.stderr
    assert 'pip install "mdm-deploy[export]"' in asked.stderr


# -------------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused(exported: Find, check: Check, tmp_path: Path) -> None:
    bundle = exported("mdm").bundle
    long = "x" * 300
    refused: dict[tuple[Any, ...], tuple[int, str]] = {
        (): (2, "name a bundle, or a folder with --replay"),
        (bundle, "--replay", bundle): (2, "name a bundle, or a folder with --replay"),
        (tmp_path / "none",): (2, "is not a folder"),
        (bundle, "--seeds", 0): (2, "--seeds"),
        (bundle, "--seed", -1): (2, "--seed"),
        (bundle, "--seed", 10**30): (2, "--seed"),
        (bundle, "--steps", 0): (2, "--steps"),
        (bundle, "--level", "stepps"): (2, "stepps"),
        (bundle, "--task", "joing"): (2, "did you mean 'joint'"),
        (bundle, "--backend", "tensorrt"): (3, "tensorrt"),
        (bundle, "--backend", "ort-gpu"): (2, "unknown backend 'ort-gpu'"),
        (bundle, "--against", "goldn"): (2, "--against is 'goldn'; did you mean 'golden'?"),
        (bundle, "--against", long): (2, "or the folder of another bundle"),
        (bundle, "--against", tmp_path): (2, "manifest.json"),
        (bundle, "--against", exported("keep").bundle): (2, "differ in 'config'"),
        (bundle, "--checkpoint", exported("dim").checkpoint): (2, "is not the checkpoint"),
        (bundle, "--checkpoint", tmp_path / "none"): (2, "cannot be read"),
        (bundle, "--autoencoder", exported("latent").autoencoder): (2, "autoencoder"),
        (bundle, "--report", exported("mdm").checkpoint): (2, "it is no folder"),
        (bundle, "--report", tmp_path / long): (2, "File name too long"),
        (bundle, "--history", tmp_path): (2, "name a folder with --report"),
        (bundle, "--history", tmp_path / "none", "--report", tmp_path / "r"): (2, "is no folder"),
        ("--replay", tmp_path / "none"): (2, "none"),
        ("--replay", exported("mdm").checkpoint): (2, "cannot be read"),
        ("--replay", bundle): (2, "cannot be read"),
        (exported("half").bundle, "--against", "golden"): (2, "has no golden files"),
    }
    for words, (code, said) in refused.items():
        found = check(*words)
        assert found.code == code, words
        assert said in found.err, words
        assert found.out == ""
    assert not (tmp_path / "r").exists()


def test_a_wrong_report_is_refused_before_any_work(
    exported: Find, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Check, "run", lambda *_: pytest.fail("the check began"))
    assert check(exported("dim").bundle, "--report", exported("dim").checkpoint).code == 2


def test_a_report_is_written_where_it_was_asked_for(exported: Find, check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    said = check(exported("dim").bundle, "--level", "decoded", "--against", "golden", "--report", folder)
    names = ["report.json", "junit.xml", "report.html", "summary.md"]
    assert said.code == 0
    assert [line for line in said.out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {folder / name}" for name in names
    ]
    assert sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("name", ["damaged", "cut"])
def test_damaged_golden_files_end_in_a_sentence(exported: Find, check: Check, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "b"
    shutil.copytree(exported("dim").bundle, folder)
    file = folder / "golden" / "task_class_to_image.safetensors"
    if name == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        arrays = load_file(file)
        save_file(arrays | {"out.z": arrays["out.z"] + 1}, file)
    said = check(folder, "--against", "golden", "--level", "trajectories")
    assert said.code == 2
    assert "task_class_to_image.safetensors" in said.err
