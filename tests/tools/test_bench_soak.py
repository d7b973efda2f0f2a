"""`mdm bench soak`: engines that are sound, and faults planted into captures and memory. That captures are looked at is
seen in the fake driver's log too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.tools.bench.soak import differing

from .built import GRAPH, Built, build

QUICK = ("--runs", "20", "--changes", "6")
ENGINE = "from mdm.runtime.tensorrt import engine\n"
CAPTURING = ENGINE + (
    "make = engine.Capture.__init__\n"
    "engine.Capture.__init__ = lambda capture, fitted, chain: make(capture, fitted, {})\n"
)
CALLING = ENGINE + (
    "kept, call = [], engine.Run.__call__\n"
    "def leaking(run):\n"
    "    with run.engine.gpu.mine():\n"
    "        kept.append({})\n"
    "    call(run)\n"
    "engine.Run.__call__ = leaking\n"
)  # fmt: skip
# What is planted, and what is said of it.
FAULTS = {
    "a capture lacks the last step": (
        CAPTURING.format("chain[:-1] or chain"), "class_to_image, captured, in one go, time 3: "
    ),
    "captures are empty": (CAPTURING.format("[]"), "class_to_image, captured, in one go, time 3: "),
    "every step of a loop is its first": (
        "from mdm.runtime.lane import Lane\ntensors = Lane.tensors\n"
        "Lane.tensors = lambda lane, k, drawn: tensors(lane, 0, drawn)\n",
        "class_to_image, not captured, in one go, time 1: ",
    ),
    "nothing is captured": (
        ENGINE + "engine.Engine._capture = lambda engine, run: None\n",
        f"class_to_image is not captured: graph '{GRAPH}' runs call by call, again and again",
    ),
    "the GPU's memory grows": (CALLING.format("run.engine.gpu.driver.allocate(4096)"), "20 runs: gpu memory grew by "),
    "memory here grows": (CALLING.format("b'x' * 2**20"), "20 runs: host memory grew by "),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Any, stand_in: dict[str, str]) -> Built:
    return build(tmp_path_factory.mktemp("soak"), tiny(family="dim", state=16), stand_in)


def test_sound_engines(built: Built, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    report = built.told("bench", "soak", built.bundle, *QUICK, FAKE_CUDA_LOG=str(tmp_path / "log"))
    assert (report["tasks"], report["equal"], report["wrong"]) == (["class_to_image"], True, [])
    assert [report[name]["count"] for name in ("runs", "changes")] == [20, 8]  # all of four batch sizes, twice
    assert report["changes"]["shapes"] == 4
    for part in (report["runs"], report["changes"]):
        assert part["added"]["gpu"] == 0 < part["memory"]["gpu"]
        assert {*part["memory"]} == {*part["added"]} == {"gpu", "host"}
    called = Counter(line.split()[0] for line in (tmp_path / "log").read_text(errors="replace").splitlines())
    # Of the comparison loops and steps from either buffer, of the runs loops, of 12 and 8 changes a loop each; but the
    # first of those finds the lane of the runs.
    assert called["cuStreamBeginCapture_v2"] == 2 + 2 + 2 + 11 + 8
    assert called["cuGraphLaunch"] > 2 * 2 + 20 + 12 + 8


def test_for_people(built: Built) -> None:
    run = built.mdm("bench", "soak", built.bundle, "--runs", "1", "--changes", "1", "--profile", "latency")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "captured against not captured, 1 tasks, 5 steps: equal to the bit"
    assert lines[1].startswith("1 runs of class_to_image: ")
    assert lines[2].startswith("4 changes of task and batch: ")
    assert [line.endswith("; it does not grow") for line in lines[1:3]] == [True, True]
    assert lines[3:] == ["PASS"]
    assert run.stderr.splitlines() == [
        "captured against not captured", "1 runs of class_to_image", "4 changes among 4 shapes",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(fault: str, built: Built) -> None:
    planted, said = FAULTS[fault]
    report = built.told("bench", "soak", built.bundle, *QUICK, code=1, first=planted)
    assert report["wrong"][0].startswith(said), report["wrong"]
    assert report["equal"] == ("memory" in fault)


def test_a_fault_ends_in_exit_code_1_for_people_too(built: Built) -> None:
    planted, said = FAULTS["the GPU's memory grows"]
    run = built.mdm("bench", "soak", built.bundle, *QUICK, first=planted)
    assert run.returncode == 1
    assert run.stdout.splitlines()[0].endswith("equal to the bit")
    assert "; gpu memory grew by 0.1 MB" in run.stdout.splitlines()[1]
    assert run.stdout.splitlines()[3].startswith(said)
    assert run.stdout.splitlines()[-1] == "FAIL"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runs", "0"), "0 is not in the range x>=1"),
        (("--task", "caption"), "this model has no task 'caption'"),
        (("--profile", "edge"), "has the profile 'edge', only: latency"),
    ],
)
def test_wrong_use_is_told(words: tuple[str, ...], said: str, built: Built) -> None:
    assert said in built.told("bench", "soak", built.bundle, *words, code=2)["error"]["message"]


def test_numbers_are_compared_as_bits() -> None:
    nan, one = np.float32(np.nan), np.float32(1)
    found = np.array([[nan, 0.0, one], [one, one, one]], np.float32)
    truth = np.array([[nan, -0.0, one], [one, np.nextafter(one, 2), 2]], np.float32)
    assert differing(found, found.copy()) == 0
    assert differing(found, truth) == 3
