"""`mdm bench step` on models of one block: every form has a time, and ratios are those of the times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

import torch
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import build_model, load_config, make_schedule
from mdm.reference.guidance import classifier_free
from mdm.reference.solvers import ddim
from mdm.tools.bench import compare, step
from mdm.tools.bench.bundle import Deployed, Run
from mdm.tools.bench.clock import median_time, percentiles, take_turns
from mdm.tools.main import main

SMALL = ["bench", "step", "--tokens", "4", "--blocks", "1", "--seconds", "0", "--threads", "1"]
Out = pytest.CaptureFixture[str]


def test_every_form_is_measured(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "compiled_network", lambda network: network)  # compiling takes half a minute
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["preset"], row["tokens"], row["blocks"]) for row in found["rows"]] == [
        ("dim-large", 4, 1), ("mdm-1024", 4, 1)
    ]  # fmt: skip
    assert found["aims"] == {name: aim for name, (_, aim) in step.AIMS.items()}
    for row in found["rows"]:
        medians = {name: times["p50"] for name, times in row["seconds"].items()}
        assert set(medians) == {"runtime", *compare.NAMES}
        assert row["missing"] == {}
        assert row["threads"] == 1
        assert row["compile_seconds"] > 0
        for name in ("runtime_over_products", "torch_over_runtime", "compiled_over_runtime"):
            over, _, under = name.partition("_over_")
            assert row["ratios"][name] == pytest.approx(medians[over] / medians[under])
        assert 0 < row["ratios"]["python_over_runtime"] < 1
        assert row["product_share"] == pytest.approx(sum(row["operators"].get(name, 0) for name in compare.OPERATORS))
        assert sum(row["operators"].values()) == pytest.approx(1)


def test_the_table_has_a_line_a_model_and_one_of_aims(capsys: Out) -> None:
    assert main([*SMALL, "--preset", "dim-large", "--no-compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("dim-large, 1 blocks | 4 | ")
    assert lines[2].split(" | ")[6] == "-"  # compiled
    assert lines[3] == "aim |  |  |  | at most 1.30 | at least 1.60 | at least 1.00 | at most 1.00%"


def test_what_misses_its_aim_is_told() -> None:
    times = {"p50": 0.5, "p90": 0.6, "p99": 0.7, "least": 0.4, "count": 9}
    row = {
        "preset": "dim-large", "tokens": 256, "blocks": 49, "engine": "ONNX Runtime",
        "seconds": {"runtime": times, "products": times},
        "ratios": {"runtime_over_products": 1.25, "python_over_runtime": 0.02},
        "operators": {"MatMul": 0.7, "Conv": 0.3},
    }  # fmt: skip
    *_, line = step.table([row | {"ratios": {"runtime_over_products": 1.25}}])
    assert line == ""
    *_, line = step.table([row])
    assert line == "dim-large, 256 tokens misses the aim for python over runtime: MatMul 70.0%, Conv 30.0%"
    *_, line = step.table([row | {"ratios": {}, "seconds": {"runtime": times | {"least": 0.1}, "products": times}}])
    assert line.startswith("dim-large, 256 tokens: the machine was busy: medians far above the least times of ONNX")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "7"], "--tokens is 7, expected a square number"),
        (["--tokens", "0"], "--tokens is 0, expected a square number"),
        (["--tokens", "4", "--blocks", "2"], "'blocks' is 2, expected an odd number"),
        (["--preset", "dim-larg"], "'dim-large', 'mdm-1024'"),
    ],
)
def test_wrong_use_is_told(words: list[str], said: str, capsys: Out) -> None:
    assert main(["bench", "step", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_reference_takes_the_same_step(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Both halves of guidance in one evaluation, and DDIM from there."""
    config = load_config(tiny(family="dim", sampler={"solver": "ddim", "steps": 3, "guidance": 0.7}))
    network = build_model(config).eval().requires_grad_(False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    bundle = export_bundle(tmp_path / "model.safetensors", config, tmp_path / "out.bundle", validate=False)
    deployed = Deployed(bundle, None, None, 2, threads=1)
    assert deployed.task == "class_to_image"
    prepared = [deployed.model.prepare(request) for request in deployed.requests]
    seen: list[int] = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = compare.torch_step(network, deployed.model.task("class_to_image"), prepared)()
    assert seen == [4]

    schedule = make_schedule(config.schedule_image)
    z = torch.from_numpy(np.stack([one.job.state["base"] for one in prepared]))
    null = torch.full((2,), config.classes)

    def estimate(z: Any, t: Any) -> Any:
        return network(z, schedule.model_time(t).expand(2), null)

    times = torch.tensor([0.9, 0.8], dtype=torch.float64)
    expected = ddim(classifier_free(estimate, estimate, 0.7), z, schedule, times)
    torch.testing.assert_close(found, expected)


def test_forms_take_turns_until_the_first_has_had_its_seconds() -> None:
    called: list[str] = []

    def form(name: str, *seconds: float) -> Callable[[], list[float]]:
        return lambda: called.append(name) or list(seconds)  # type: ignore[func-returns-value]

    forms = {"first": form("first", 0.25, 0.25), "fast": form("fast", 0.125), "slow": form("slow", 5.0)}
    assert take_turns(forms, 1.0) == {"first": [0.25] * 4, "fast": [0.125] * 2, "slow": [5.0]}
    assert called == ["first", "fast", "slow", "first", "fast"]
    assert take_turns({"one": form("one", 0.0)}, 0) == {"one": [0.0]}
    assert median_time(lambda: None, 0) >= 0


def test_percentiles() -> None:
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3}
    assert percentiles(range(101)) == {"p50": 50, "p90": 90, "p99": 99}


def test_ratios_of_what_was_measured() -> None:
    runs = [Run(9, [1.0, 3.0], 3.0, 9), Run(9, [2.0, 2.0], 3.0, 9)]
    found = compare.ratios_of({"runtime": [1, 3, 2], "torch": [5.0]}, runs)
    assert found == {"torch_over_runtime": 2.5, "python_over_runtime": 0.25}
    assert compare.missed(found) == ["python_over_runtime"]
    found = {"runtime_over_products": 1.31, "torch_over_runtime": 1.59, "compiled_over_runtime": 1.0}
    assert compare.missed(found) == ["runtime_over_products", "torch_over_runtime"]
