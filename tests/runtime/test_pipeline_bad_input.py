"""Pipelines in trouble: networks that overflow, wrong options, calls inside of calls."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mdm.plugins.errors import EngineError, InputError, MdmError
from mdm.runtime import Pipeline, Request, Result, load
from mdm.runtime.pipeline import Step

from .some_requests import REQUESTS, refused, same

Find = Callable[[str], Any]
Spoil = Callable[..., Path]
Manifest = dict[str, Any]


# ------------------------------------------------------------------------------------------------- overflow


def plant(name: str, value: float) -> Callable[..., None]:
    """One weight of the checkpoint, wherever the bundle keeps it."""

    def change(manifest: Manifest, folder: Path) -> None:
        planted = 0
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name] = tensors[name].copy()
                tensors[name].flat[0] = value
                before = path.stat().st_size
                save_file(tensors, path)
                assert path.stat().st_size == before
                planted += 1
        assert planted == 1

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("latent_out.bias", "joint"), ("latent_out.bias", "caption"), ("latent_in.weight", "class_to_image"),
        ("vae.image_out.bias", "class_to_image"), ("vae.image_out.bias", "turn"),
        ("vae.text_in.weight", "text_to_image"), ("vae.image_in.bias", "caption"),
    ],
)  # fmt: skip
def test_what_overflows_is_an_error_and_no_black_picture(
    name: str, task: str, value: float, spoil: Spoil, recwarn: pytest.WarningsRecorder
) -> None:
    """In the network, the encoders, and the decoder, which comes after the latents were found to be sound."""
    pipeline = load(spoil("mdm", plant(name, value)), threads=1)
    with pytest.raises(EngineError, match="not finite") as error:
        pipeline.run([REQUESTS[task]])
    refused(error)
    assert not recwarn.list


def test_latents_of_a_dim_that_overflow(spoil: Spoil) -> None:
    pipeline = load(spoil("dim", plant("patch_out.bias", np.nan)), threads=1)
    with pytest.raises(EngineError, match="not finite"):
        pipeline.generate(label=1, steps=3)


@pytest.mark.parametrize("name", ["mdm", "keep", "dim"])
def test_one_sample_that_overflows_leaves_the_pipeline_sound(name: str, deployed: Find) -> None:
    pipeline = deployed(name).load()
    before = pipeline.generate(label=[0, 1, 2], guidance=1.0, steps=3)
    with pytest.raises(EngineError, match="not finite"):
        pipeline.generate(label=[0, 1, 2], guidance=[1.0, 3e38, 1.0], steps=3)
    after = pipeline.generate(label=[0, 1, 2], guidance=1.0, steps=3)
    assert all(map(same, before, after))
    assert not any(lane.jobs for lane in pipeline.lanes.made.values())


# -------------------------------------------------------------------------------------- load and calls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"), ({"batch": -1}, "batch is -1"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"backend": "ort-cpus"}, "unknown backend 'ort-cpus'; did you mean 'ort-cpu'?\nbackends: ort-cpu, ort-cuda"),
    ],
)  # fmt: skip
def test_wrong_options_of_load(options: dict[str, Any], said: str, deployed: Find) -> None:
    with pytest.raises(InputError) as error:
        load(deployed("mdm").bundle, **options)
    assert said in str(error.value)


def test_the_first_wrong_request_ends_the_call_before_any_step(deployed: Find) -> None:
    pipeline: Pipeline = deployed("mdm").pipeline
    steps: list[Step] = []
    with pytest.raises(InputError, match="label is 9"):
        pipeline.run([REQUESTS["joint"], Request.of("joint", label=9)], steps.append)
    assert steps == []
    assert pipeline.run([]) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 5}, {"label": "2"}, {"seed": "1"}, {"size": "32"}, {"sampler": {"stps": 3}}, {"upsample": 1.5},
        {"task": ["joint"]}, {"sample": None}, {"label": True}, {"sampler": {"steps": "3"}},
    ],
    ids=repr,
)  # fmt: skip
def test_a_request_made_by_hand_is_checked_like_any(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        Request(**{"task": "joint"} | fields)
    refused(error)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """A call that never returns is a failure after so long."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_call_from_a_callback_is_refused_or_right(batch: int, deployed: Find) -> None:
    """It must neither hang nor step the samples of the call around it."""
    pipeline = deployed("mdm").load(batch=batch)
    [outer], [inner] = pipeline.joint(seed=1, steps=4), pipeline.joint(seed=2, steps=3)
    found: list[Result | MdmError] = []

    def nested(step: Step) -> None:
        if step.done == 2:
            try:
                found.extend(pipeline.joint(seed=2, steps=3))
            except MdmError as error:
                found.append(error)

    with within(3):
        [result] = pipeline.joint(seed=1, steps=4, callback=nested)
    assert same(result, outer)
    assert len(found) == 1
    assert isinstance(found[0], MdmError) or same(found[0], inner)


def test_calls_from_threads_are_refused_or_right(deployed: Find) -> None:
    pipeline: Pipeline = deployed("mdm").load()
    alone = [pipeline.joint(seed=seed, steps=20)[0] for seed in range(4)]
    found: dict[int, Any] = {}

    def call(seed: int) -> None:
        try:
            [found[seed]] = pipeline.joint(seed=seed, steps=20)
        except Exception as error:
            found[seed] = error

    threads = [threading.Thread(target=call, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(found) == set(range(4))
    for seed, one in found.items():
        assert isinstance(one, MdmError) or same(one, alone[seed]), (seed, one)


def test_a_stream_left_early_frees_its_lanes(deployed: Find) -> None:
    pipeline = deployed("mdm").load(batch=2)
    requests = [Request.of("joint", seed=seed, steps=steps) for seed, steps in ((1, 5), (2, 2), (3, 4), (4, 3))]
    alone = pipeline.run(requests)
    stream = pipeline.stream(requests)
    index, first = next(iter(stream))
    assert index == 1  # the first to end, not the first asked for
    assert same(first, alone[1])
    stream.close()  # type: ignore[attr-defined]
    assert not any(lane.jobs for lane in pipeline.lanes.made.values())
    assert all(map(same, pipeline.run(requests), alone))
    assert {index: result.latents.tobytes() for index, result in pipeline.stream(requests)} == {
        index: result.latents.tobytes() for index, result in enumerate(alone)
    }


def test_a_call_inside_a_stream_is_refused_or_right(deployed: Find) -> None:
    """Between two results of a stream its other samples stand in lanes that a call would step."""
    pipeline = deployed("mdm").load(batch=2)
    requests = [Request.of("joint", seed=seed, steps=steps) for seed, steps in ((1, 4), (2, 2))]
    alone, [other] = pipeline.run(requests), pipeline.joint(seed=3, steps=3)
    with within(3):
        for index, result in pipeline.stream(requests):
            assert same(result, alone[index])
            with contextlib.suppress(MdmError):
                assert same(pipeline.joint(seed=3, steps=3)[0], other)


def test_what_was_prepared_runs_once(deployed: Find) -> None:
    """Its latents are gone then: a second run is refused, or as good as the first."""
    pipeline = deployed("mdm").pipeline
    prepared = [pipeline.model.prepare(REQUESTS["joint"])]
    [(_, first)] = pipeline.stream(prepared)
    with contextlib.suppress(MdmError):
        assert same(dict(pipeline.stream(prepared))[0], first)
