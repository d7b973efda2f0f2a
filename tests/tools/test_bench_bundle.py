"""`mdm bench BUNDLE`: stages, rates and the comparison, also where neither torch nor onnx can be imported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_TOKENIZER, build_model, load_config
from mdm.tools.bench import compare
from mdm.tools.main import main

from .built import GRAPH, Built, build

QUICK = ["--seconds", "0.02", "--threads", "1", "--no-compile"]
Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    config = load_config(tiny())
    save_file(build_model(config).state_dict(), folder / "model.safetensors")
    out = folder / "tiny.bundle"
    return export_bundle(folder / "model.safetensors", config, out, tokenizer=SHIPPED_TOKENIZER, validate=False)


@pytest.mark.parametrize(
    ("task", "words", "graphs", "steps"),
    [
        (None, [], ["step_image_guided", "decode_image"], 3),
        ("joint", ["--batch", "2"], ["encode_text", "step_joint_guided", "decode_text", "decode_image"], 3),
        ("caption", ["--steps", "5"], ["encode_text", "encode_image", "step_joint", "decode_text"], 5),
    ],
)
def test_a_report_is_whole(
    task: str | None, words: list[str], graphs: list[str], steps: int, bundle: Path, capsys: Out
) -> None:
    chosen = [] if task is None else ["--task", task]
    assert main(["bench", str(bundle), *chosen, *words, *QUICK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == (task or "class_to_image")
    assert list(report["load"]) == graphs
    assert (report["steps"], report["threads"], report["backend"]) == (steps, 1, "ort-cpu")
    assert min(report["open"], *report["load"].values()) > 0
    assert list(report["stages"]) == ["encode", "step", "decode", "whole run"]
    for times in report["stages"].values():
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    medians = {name: times["p50"] for name, times in report["seconds"].items()}
    assert set(medians) == {"runtime", "products", "torch"}
    assert medians["runtime"] == report["stages"]["step"]["p50"]
    assert report["steps_per_second"] == pytest.approx(1 / medians["runtime"])
    assert report["results_per_second"] == pytest.approx(report["batch"] / report["stages"]["whole run"]["p50"])
    assert report["ratios"]["runtime_over_products"] == pytest.approx(medians["runtime"] / medians["products"])
    assert report["ratios"]["torch_over_runtime"] == pytest.approx(medians["torch"] / medians["runtime"])
    assert 0 < report["ratios"]["python_over_runtime"] < 1
    assert report["missing"] == {"compiled": "left out by --no-compile"}
    assert report["memory_peak"] is None or report["memory_peak"] > 0


def test_a_report_for_people_and_its_picture(bundle: Path, tmp_path: Path, capsys: Out) -> None:
    out = tmp_path / "bars.png"
    assert main(["bench", "--plot", str(out), *QUICK, str(bundle)]) == 0  # options may come first
    text = capsys.readouterr().out
    assert f"{bundle}, class_to_image: 3 steps, batch 1, ort-cpu, threads 1" in text
    assert "runtime over products: " in text
    assert "(aim: at most 1.30)" in text
    for name in ("ONNX Runtime", "products alone", "PyTorch, eager"):
        assert f"\n{name} | " in text
    assert "not measured, PyTorch, compiled: left out by --no-compile" in text
    with Image.open(out) as picture:
        assert picture.width == 960
        assert len(picture.getcolors(1 << 20) or []) > 10


def test_compiling_is_told_apart(bundle: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "compiled_network", lambda network: network)
    assert main(["bench", str(bundle), "--seconds", "0", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "\nPyTorch, compiled | " in text
    assert "\ntorch.compile took 0 s" in text


def test_a_compiler_that_fails_is_told(bundle: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: Any) -> Any:
        def forward(*inputs: Any) -> None:
            raise RuntimeError("no C++\ncompiler was found")

        twin = copy.copy(network)
        twin.forward = forward
        return twin

    monkeypatch.setattr(compare, "compiled_network", broken)
    assert main(["bench", str(bundle), "--seconds", "0", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "not measured, PyTorch, compiled: torch.compile failed: no C++ compiler was found" in text
    assert "\nPyTorch, eager | " in text


def test_it_runs_where_torch_and_onnx_are_not_installed(bundle: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'onnx'): sys.modules[name] = None\n"
        f"from mdm.tools.main import main\nsys.exit(main({['bench', str(bundle), *QUICK]!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "\nONNX Runtime | " in run.stdout
    wanted = 'is not installed: pip install "mdm-deploy[export]"'
    assert f"not measured, products alone: the Python module onnx {wanted}" in run.stdout
    assert f"not measured, PyTorch, eager: the Python module torch {wanted}" in run.stdout
    assert "python over runtime: " in run.stdout
    assert "runtime over products" not in run.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["opps"], "'opps' is neither a bundle nor a part of mdm bench; did you mean 'ops'?\nexpected the folder"),
        (["--json"], "or one of: export, ops, scaling, soak, step"),
        (["BUNDLE"], "Missing argument"),
        (["{bundle}", "--task", "caption_"], "this model has no task 'caption_'; did you mean 'caption'?"),
        (["{bundle}", "--steps", "0"], "steps is 0, expected 1 to"),
        (["{bundle}", "--batch", "0"], "batch is 0"),
        (["{bundle}", "--threads", "0"], "threads is 0"),
        (["{bundle}", "--backend", "ort-cp"], "unknown backend 'ort-cp'; did you mean 'ort-cpu'?"),
        (["{bundle}", "--profile", "edge"], "backend 'ort-cpu' has no profiles\nleave the profile out"),
        (["{bundle}", "--backend", "tensorrt", "--threads", "1"], "runs on a GPU, and takes no threads"),
        (["{bundle}", "--plot", "bars.jpg"], "--plot is 'bars.jpg', expected a file name that ends in .png"),
        (["{bundle}/.."], "lacks the file 'manifest.json'"),
    ],
)
def test_wrong_use_is_told(words: list[str], said: str, bundle: Path, capsys: Out) -> None:
    assert main(["bench", *(word.format(bundle=bundle) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_the_parts_are_still_there(capsys: Out) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("BUNDLE", "export", "ops", "scaling", "soak", "step"))
    assert main(["bench", "step", "--help"]) == 0


# ------------------------------------------------------------------------------------------------------- on TensorRT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]], stand_in: Any) -> Built:
    return build(tmp_path_factory.mktemp("bench_tensorrt"), tiny(family="dim", state=16), stand_in)


def test_a_report_of_tensorrt_is_whole(built: Built) -> None:
    """What it cannot be compared with is told, each with its reason."""
    words = ("--backend", "tensorrt", "--profile", "latency", "--steps", "4", "--batch", "2", "--seconds", "0.02")
    report = built.told("bench", built.bundle, *words)
    assert (report["engine"], report["backend"], report["threads"]) == ("TensorRT", "tensorrt", None)
    assert (report["task"], report["steps"], report["batch"]) == ("class_to_image", 4, 2)
    assert list(report["load"]) == [GRAPH]
    assert min(report["open"], report["load"][GRAPH]) > 0
    for times in report["stages"].values():
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert report["seconds"].keys() == {"runtime"}
    assert report["seconds"]["runtime"]["p50"] == report["stages"]["step"]["p50"]
    assert report["seconds"]["runtime"]["count"] >= 4
    assert report["ratios"].keys() == {"python_over_runtime"}
    assert 0 < report["ratios"]["python_over_runtime"] < 1
    assert report["missing"] == {
        "products": "only ONNX Runtime itself says which products a step has",
        "torch": "the reference is timed on the CPU alone",
        "compiled": "the reference is timed on the CPU alone",
    }
    assert (report["operators"], report["product_share"], report["compile_seconds"]) == ({}, None, None)


def test_a_report_of_tensorrt_for_people_and_its_picture(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "bars.png"
    run = built.mdm("bench", built.bundle, "--backend", "tensorrt", "--seconds", "0.02", "--plot", out)
    assert run.returncode == 0, run.stderr
    assert f"{built.bundle}, class_to_image: 50 steps, batch 1, tensorrt\n" in run.stdout
    assert "\nTensorRT | " in run.stdout
    assert "\nnot measured, PyTorch, eager: the reference is timed on the CPU alone\n" in run.stdout
    assert "ONNX Runtime |" not in run.stdout
    with Image.open(out) as picture:
        assert picture.width == 960


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--profile", "edge"), f"no engine of graph '{GRAPH}' of bundle '"),
        (("--batch", "6"), f"--batch is 6, and the engine of '{GRAPH}' takes 4 samples at most"),
        (("--memory", "10KB"), f"graph '{GRAPH}' takes about 0 MB of memory, the limit is 0 MB"),
    ],
)
def test_why_tensorrt_does_not_run_is_told(words: tuple[str, ...], said: str, built: Built) -> None:
    run = built.mdm("bench", built.bundle, "--backend", "tensorrt", *words)
    assert run.stderr.splitlines()[1].startswith(f"Error: {said}"), run.stderr
    assert run.returncode == (3 if "--memory" in words else 2)
