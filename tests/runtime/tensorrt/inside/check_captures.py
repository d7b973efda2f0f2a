"""Captured loops: what is called when, and that nothing changes by it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.runtime import load
from mdm.runtime.lane import Lanes
from mdm.runtime.model import Prepared
from mdm.runtime.pipeline import Pipeline, requests_of
from mdm.runtime.scheduler import Scheduler
from mdm.runtime.tensorrt import engine as engine_module
from mdm.runtime.tensorrt.backend import TensorRtBackend

from .conftest import Calls, build

COPIES = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2")
STEPS = 6


def latents(pipeline: Pipeline, burst: int = 1000, **fields: Any) -> Any:
    """Of the steps alone: nothing is decoded."""
    return run(pipeline, prepare(pipeline, **fields), burst)


def prepare(
    pipeline: Pipeline, task: str = "joint", batch: int = 2, steps: int = STEPS, **fields: Any
) -> list[Prepared]:
    return [pipeline.model.prepare(request) for request in requests_of(task, batch, steps=steps, **fields)]


def run(pipeline: Pipeline, prepared: list[Prepared], burst: int = 1000) -> Any:
    scheduler = Scheduler(pipeline.lanes, queue=len(prepared), burst=burst)
    for one in prepared:
        scheduler.submit(one.job)
    while scheduler.busy:
        for ticket in scheduler.tick():
            assert ticket.error is None, ticket.error
    return np.stack([one.job.state["base"] for one in prepared])


def test_the_third_loop_is_one_launch(built: Path, calls: Calls) -> None:
    """The first is run call by call, the second captured; each copies in before it and out behind it, and nothing else
    is asked of the driver."""
    pipeline = load(built, "tensorrt")
    found, ran = [], []
    for _ in range(4):
        asked = prepare(pipeline)
        calls()
        found.append(run(pipeline, asked))
        ran.append(Counter(calls()))
    assert [turn["cuLaunchHostFunc"] for turn in ran] == [STEPS, 1 + STEPS, 0, 0]  # one to warm up a context
    assert [turn["cuStreamBeginCapture_v2"] for turn in ran] == [0, 1, 0, 0]
    assert [turn["cuGraphLaunch"] for turn in ran] == [0, 1, 1, 1]
    lane = next(iter(pipeline.lanes.made.values()))
    inward = STEPS + len(lane.inputs) - 1 + len(lane.pairs)  # a row for each step, noise as any other input, the state
    assert [turn["cuMemcpyHtoDAsync_v2"] for turn in ran[1:]] == [inward] * 3
    assert [turn["cuMemcpyDtoHAsync_v2"] for turn in ran[1:]] == [len(lane.pairs)] * 3
    assert {name for name in ran[3] if name.startswith("cu")} - {*COPIES} <= {
        "cuGraphLaunch", "cuEventRecord", "cuEventSynchronize", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"
    }  # fmt: skip
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_captured_is_uncaptured(solver: str, built: Path) -> None:
    """Bit for bit: in one go, step by step, and where the loop's length changes what comes after it."""
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.model import Model

    bundle = open_bundle(built)
    plain = Pipeline(Model(bundle, TensorRtBackend(bundle, captures=False)))
    captured = load(built, "tensorrt")
    for steps in (5, 4, 5, 5, 4, 7, 5):
        truth = latents(plain, burst=1, steps=steps, solver=solver, seed=steps)
        for burst in (1000, 1, 3, 1000):
            np.testing.assert_array_equal(latents(captured, burst, steps=steps, solver=solver, seed=steps), truth)
            np.testing.assert_array_equal(latents(plain, burst, steps=steps, solver=solver, seed=steps), truth)
    graphs = [one.model.backend.graph("step_joint_guided") for one in (captured, plain)]
    assert len(graphs[0].engine.captured) > 2  # type: ignore[attr-defined]
    assert len(graphs[1].engine.captured) == 0  # type: ignore[attr-defined]


def test_memory_that_moves_undoes_a_capture(built: Path) -> None:
    """A graph that needs more of the shared memory comes after one was captured, which then is captured again."""
    pipeline, cpu = load(built, "tensorrt"), load(built, threads=1)
    truth, large = latents(cpu, task="complete", prompt="two", batch=1), latents(cpu, batch=4)
    for _ in range(3):
        np.testing.assert_array_equal(latents(pipeline, task="complete", prompt="two", batch=1), truth)
    before = pipeline.model.backend.gpu.scratch_size  # type: ignore[attr-defined]
    for _ in range(3):
        np.testing.assert_array_equal(latents(pipeline, batch=4), large)
        np.testing.assert_array_equal(latents(pipeline, task="complete", prompt="two", batch=1), truth)
    assert pipeline.model.backend.gpu.scratch_size > before > 0  # type: ignore[attr-defined]


def test_few_captures_are_kept(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last; one that had to go is captured when it has come twice again."""
    monkeypatch.setattr(engine_module, "MOST_CAPTURED", 2 * STEPS)
    pipeline, truth = load(built, "tensorrt"), latents(load(built, threads=1))
    prepared = {batch: [prepare(pipeline, batch=batch) for _ in range(6)] for batch in (1, 2, 3)}
    engine = pipeline.model.backend.graph("step_joint_guided").engine  # type: ignore[attr-defined]

    def go(batch: int) -> list[int]:
        np.testing.assert_array_equal(run(pipeline, prepared[batch].pop())[:2], truth[:batch])
        return [dict(one.shapes)["base"][0] for one in engine.captured]

    assert [go(1), go(1), go(2), go(2), go(1)] == [[], [1], [1], [1, 2], [2, 1]]
    assert [go(3), go(3), go(2), go(2)] == [[2, 1], [1, 3], [1, 3], [3, 2]]


def test_captures_that_fail_again_and_again(built: Path, fails: Any) -> None:
    """Three in a row, and none is tried any more; one that works in between forgets those before."""
    truth = latents(load(built, threads=1))
    for planted, captures in (("execute:9,execute:16", True), ("execute:9,execute:16,execute:23", False)):
        pipeline = load(built, "tensorrt")
        asked = [prepare(pipeline) for _ in range(6)]
        engine = pipeline.model.backend.graph("step_joint_guided").engine  # type: ignore[attr-defined]
        fails(planted)  # in a run are 6; where a capture is begun, 1 to warm up, and 1 that fails
        for one in asked:
            np.testing.assert_array_equal(run(pipeline, one), truth)
        fails("")
        assert (engine.captures, "as planted" in engine.why_not) == (captures, not captures)


def test_what_cannot_be_captured_runs_call_by_call(own: Path) -> None:
    """An engine that streams its weights for want of memory: it says why, once, and computes the same."""
    build(own, ("encode_text", "step_joint_guided", "decode_text"), stream_weights=True)
    pipeline, truth = load(own, "tensorrt", memory=1000), latents(load(own, threads=1))
    for _ in range(3):
        np.testing.assert_array_equal(latents(pipeline), truth)
    engine = pipeline.model.backend.graph("step_joint_guided").engine  # type: ignore[attr-defined]
    assert not engine.captures
    assert "streams its weights" in engine.why_not


def test_an_engine_without_weights_gets_the_bundles(own: Path) -> None:
    build(own, ("encode_text", "step_joint_guided", "decode_text"), strip=True)
    np.testing.assert_array_equal(latents(load(own, "tensorrt")), latents(load(own, threads=1)))


def test_lanes_of_one_backend(built: Path) -> None:
    """Two lanes on the same graph have buffers and captures of their own, and take them along when they go."""
    pipeline = load(built, "tensorrt")
    truth = latents(pipeline)
    engine = pipeline.model.backend.graph("step_joint_guided").engine  # type: ignore[attr-defined]
    for _ in range(3):
        pipeline.lanes = Lanes(pipeline.model.backend, 4)
        for _ in range(3):
            np.testing.assert_array_equal(latents(pipeline), truth)
        assert len(engine.captured) == 1
