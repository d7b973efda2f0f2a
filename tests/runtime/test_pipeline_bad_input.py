"""Pipelines in trouble: bundles that lie about themselves, networks that overflow, calls inside of calls.

A bundle from a stranger may sign whatever it likes. It is refused in an MdmError, or it does what the sound one does.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
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

Find = Callable[[str], Any]
Spoil = Callable[..., Path]
Manifest = dict[str, Any]

PICTURE = np.full((32, 32, 3), 99, np.uint8)
REQUESTS = {
    "joint": Request.of("joint", seed=1, label=2),
    "text_to_image": Request.of("text_to_image", prompt="two big red circles", seed=2),
    "caption": Request.of("caption", picture=PICTURE, seed=3),
    "turn": Request.of("turn", picture=PICTURE, prompt="red", seed=4),
    "class_to_image": Request.of("class_to_image", label=1, seed=5),
}
STEP = "step_joint_guided"


def refused(error: pytest.ExceptionInfo[MdmError]) -> str:
    said = str(error.value)
    assert said
    assert len(said.splitlines()) <= 3
    return said


def same(a: Result, b: Result) -> bool:
    pictures = (a.picture is None and b.picture is None) or np.array_equal(a.picture, b.picture)  # type: ignore[arg-type]
    return np.array_equal(a.latents, b.latents) and a.text == b.text and pictures


# ------------------------------------------------------------------------------------------------ lies about graphs


def tensor(manifest: Manifest, name: str, side: str = "inputs") -> dict[str, Any]:
    [found] = [one for one in manifest["graphs"][STEP][side] if one["name"] == name]
    return found


def reshape(name: str, shape: list[Any], side: str = "inputs") -> Callable[..., None]:
    return lambda manifest, folder: tensor(manifest, name, side).update(shape=shape)


def retype(name: str, dtype: str, side: str = "inputs") -> Callable[..., None]:
    return lambda manifest, folder: tensor(manifest, name, side).update(dtype=dtype)


def rename(name: str, side: str = "inputs") -> Callable[..., None]:
    return lambda manifest, folder: tensor(manifest, name, side).update(name=f"{name}s")


def remove(name: str, side: str = "inputs") -> Callable[..., None]:
    return lambda manifest, folder: manifest["graphs"][STEP][side].remove(tensor(manifest, name, side))


def add(name: str, side: str = "inputs") -> Callable[..., None]:
    extra = {"name": name, "dtype": "float32", "shape": ["batch"]}
    return lambda manifest, folder: manifest["graphs"][STEP][side].append(extra)


LIES: dict[str, Callable[..., None]] = {
    "base is wider": reshape("base", ["batch", "tokens", 13]),
    "base is narrower": reshape("base", ["batch", "tokens", 11]),
    "base is flat": reshape("base", ["batch"]),
    "base is a number": reshape("base", []),
    "base is open": reshape("base", ["batch", "tokens", "width"]),
    "base has other tokens": reshape("base", ["batch", "pieces", 12]),
    "base is empty": reshape("base", ["batch", 0, 12]),
    "history is shorter": reshape("history", ["batch", 2, "tokens", 12]),
    "rows are narrower": reshape("row", ["batch", 2, 21]),
    "rows are of one schedule": reshape("row", ["batch", 1, 22]),
    "rows are flat": reshape("row", ["batch"]),
    "rows are for two samples": reshape("row", [2, 2, 22]),
    "noise is narrower": reshape("noise", ["batch", "tokens", 6]),
    "noise is for one sample": reshape("noise", [1, "tokens", 12]),
    "classes are lists": reshape("y", ["batch", 7]),
    "base_next is small": reshape("base_next", ["batch", 1, 1], "outputs"),
    "x0 is small": reshape("x0", ["batch", 1, 1], "outputs"),
    "x0 is large": reshape("x0", ["batch", 2**12, 2**12], "outputs"),
    "base is in half precision": retype("base", "float16"),
    "given is a number": retype("given", "float32"),
    "classes are numbers": retype("y", "float32"),
    "x0 is a truth": retype("x0", "bool", "outputs"),
    "base_next is whole": retype("base_next", "int64", "outputs"),
    "no base": rename("base"),
    "no row": rename("row"),
    "no noise": remove("noise"),
    "no given": remove("given"),
    "no guidance": remove("guidance"),
    "no base_next": remove("base_next", "outputs"),
    "no x0": remove("x0", "outputs"),
    "one input more": add("more"),
    "one output more": add("more_next", "outputs"),
    "the output of an input": add("row_next", "outputs"),
    "another picture size": lambda manifest, folder: manifest["graphs"][STEP].update(image_size=16),
    "no picture size": lambda manifest, folder: manifest["graphs"][STEP].update(image_size=None),
    "no patch fits": lambda manifest, folder: manifest["graphs"][STEP].update(image_size=3),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_graph_is_refused_or_without_effect(lie: str, deployed: Find, spoil: Spoil) -> None:
    [sound] = deployed("mdm").pipeline.run([REQUESTS["text_to_image"]])
    folder = spoil("mdm", LIES[lie])
    try:
        [result] = load(folder, threads=1).run([REQUESTS["text_to_image"]])
    except MdmError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        assert same(result, sound)
    assert len(lines) <= 3


@pytest.mark.parametrize("name", ["x0", "base_next"])
def test_a_buffer_for_fewer_samples_is_never_overrun(name: str, spoil: Spoil) -> None:
    """The engine writes where it is told to, for as many samples as it is told: here eight, where one has room.

    In a process of its own, for what lies behind the buffer is anybody's.
    """

    def change(manifest: Manifest, folder: Path) -> None:
        shape = tensor(manifest, name, "outputs")["shape"]
        shape[0] = 1

    script = """
import sys
from mdm.plugins.errors import MdmError
from mdm.runtime import load
try:
    load(sys.argv[1], threads=1).sample("text_to_image", prompt="two big red circles", batch=8)
except MdmError as error:
    print("refused:", error)
"""
    command = [sys.executable, "-c", script, str(spoil("mdm", change))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-300:]
    assert done.stdout.startswith("refused: ")


# --------------------------------------------------------------------------------- lies about everything else


def put(*place: Any) -> Callable[..., None]:
    *keys, last, value = place

    def change(manifest: Manifest, folder: Path) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


def drop(*names: str) -> Callable[..., object]:
    return lambda manifest, folder: [manifest["graphs"].pop(name) for name in names]


UNSOUND: dict[str, tuple[str, Callable[..., object]]] = {
    "no text at all": ("text_to_image", put("text", None)),
    "no pictures at all": ("text_to_image", put("picture", None)),
    "no pictures for a caption": ("caption", put("picture", None)),
    "another patch": ("text_to_image", put("picture", "patch", 4)),
    "another patch, two pictures": ("turn", put("picture", "patch", 4)),
    "other channels": ("caption", put("picture", "channels", 1)),
    "another factor": ("caption", put("picture", "factor", 2)),
    "an empty range": ("joint", put("picture", "range", [0, 0])),
    "no text schedule": ("joint", put("schedules", "text", None)),
    "a schedule without a name": ("joint", put("schedules", "image", {})),
    "a list of schedules": ("joint", put("schedules", "image", {"kind": ["cosine"]})),
    "a schedule of words": ("joint", put("schedules", "image", {"kind": "cosine", "shift": "1"})),
    "schedules that count otherwise": ("joint", put("schedules", "image", {"kind": "vp-linear"})),
    "text too long for the network": ("joint", put("text", "lengths", [1000])),
    "a pad beyond the vocabulary": ("text_to_image", put("text", "pad", 2**20)),
    "another vocabulary": ("text_to_image", put("text", "vocabulary", 41)),
    "classes beyond the network's": ("joint", put("null_class", 1000)),
    "an unknown solver": ("joint", put("sampler", "solver", "dddim")),
    "too many steps": ("joint", put("sampler", "steps", 100_000)),
    "an unknown option": ("joint", put("sampler", "eta", 0.5)),
    "times in the wrong order": ("joint", put("sampler", "t_end", 0.995)),
    "a task of nothing": ("joint", lambda manifest, folder: manifest["tasks"]["joint"].update(text="", image="")),
    "a tokenizer of something else": ("joint", put("text", "tokenizer", "sampler/joint.json")),
    "no encoder for text": ("text_to_image", drop("encode_text")),
    "no encoder for pictures": ("caption", drop("encode_image", "encode_image_48")),
    "no decoder for text": ("caption", drop("decode_text")),
    "a step graph that is not there": ("joint", drop(STEP)),
}


@pytest.mark.parametrize("lie", UNSOUND)
def test_an_unsound_bundle_is_told(lie: str, spoil: Spoil) -> None:
    task, change = UNSOUND[lie]
    with pytest.raises(MdmError) as error:
        load(spoil("mdm", change), threads=1).run([REQUESTS[task]])
    refused(error)


def test_a_decoder_that_is_missing_is_told_before_the_first_step(spoil: Spoil) -> None:
    steps: list[Step] = []
    with pytest.raises(MdmError, match="decode_text"):
        load(spoil("mdm", drop("decode_text")), threads=1).run([REQUESTS["caption"]], steps.append)
    assert steps == []


def test_without_a_decoder_for_pictures_there_are_latents(deployed: Find, spoil: Spoil) -> None:
    [sound] = deployed("mdm").pipeline.run([REQUESTS["joint"]])
    folder = spoil("mdm", drop("decode_image", "decode_image_48"))
    [result] = load(folder, threads=1).run([REQUESTS["joint"]])
    assert result.picture is None
    assert result.text == sound.text
    assert np.array_equal(result.latents, sound.latents)


def test_a_task_that_names_another_sets_graph(deployed: Find, spoil: Spoil) -> None:
    """The runtime finds the graph by what the task is made of; what is written there is for other hosts."""
    request = REQUESTS["text_to_image"]
    [sound] = deployed("mdm").pipeline.run([request])
    change = {"step": "step_text", "set": "text", "table": "sampler/complete.json"}
    folder = spoil("mdm", lambda manifest, folder: manifest["tasks"]["text_to_image"].update(change))
    try:
        [result] = load(folder, threads=1).run([request])
    except MdmError:
        return
    assert same(result, sound)


def test_without_a_tokenizer_pictures_are_still_made(deployed: Find, spoil: Spoil) -> None:
    pipeline = load(spoil("mdm", put("text", "tokenizer", None)), threads=1)
    [sound] = deployed("mdm").pipeline.run([REQUESTS["class_to_image"]])
    [result] = pipeline.run([REQUESTS["class_to_image"]])
    assert same(result, sound)
    for task in ("text_to_image", "caption", "joint", "turn"):
        with pytest.raises(InputError, match="has no tokenizer: it takes and makes no text"):
            pipeline.run([REQUESTS[task]])


def test_a_graph_that_was_changed_is_not_run(deployed: Find, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "changed.bundle"
    shutil.copytree(deployed("mdm").bundle, folder)
    graph = bytearray((folder / f"{STEP}.onnx").read_bytes())
    graph[-1] ^= 1
    (folder / f"{STEP}.onnx").write_bytes(graph)
    pipeline = load(folder, threads=1)
    with pytest.raises(InputError, match=rf"{STEP}\.onnx"):
        pipeline.run([REQUESTS["joint"]])
    assert pipeline.run([REQUESTS["class_to_image"]])[0].picture is not None


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


# -------------------------------------------------------------------------------------- denoise, load and calls


@pytest.mark.parametrize(
    ("task", "fields", "said"),
    [
        ("text_to_image", {"prompt": ["red", "red " * 9]}, "denoise: the samples differ in task, size or text length"),
        ("joint", {"size": [32, 48]}, "denoise: the samples differ"),
        ("joint", {"seed": [], "label": []}, "there are 0 of seed"),
        ("text_to_image", {}, "needs prompt"),
        ("nothing", {}, "has no task 'nothing'"),
    ],
)
def test_what_cannot_be_denoised_together(task: str, fields: dict[str, Any], said: str, deployed: Find) -> None:
    with pytest.raises(InputError, match=said):
        deployed("mdm").pipeline.denoise(task, **fields)


def test_denoise_of_another_shape(deployed: Find) -> None:
    denoiser = deployed("mdm").pipeline.denoise("joint", seed=[1, 2])
    for shape in ((2, 24, 11), (1, 24, 12), (24, 12), (3, 24, 12)):
        with pytest.raises(InputError, match=r"z has shape \[.*\], expected \[2, 24, 12\]"):
            denoiser(np.zeros(shape, np.float32), 0.5)
    lists = denoiser(np.zeros((2, 24, 12)).tolist(), 0.5)
    assert np.array_equal(lists, denoiser(np.zeros((2, 24, 12), np.float32), 0.5))


@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_denoise_at_no_time(t: float, deployed: Find) -> None:
    """t lies in (0,1]: at 0 there is no noise to estimate."""
    denoiser = deployed("mdm").pipeline.denoise("joint")
    with pytest.raises(InputError, match="t is"):
        denoiser(np.zeros(denoiser.shape, np.float32), t)


def test_denoise_is_the_network_alone_without_upsample_guidance(deployed: Find) -> None:
    with pytest.raises(InputError, match="upsample"):
        deployed("dim").pipeline.denoise("class_to_image", label=1, upsample=2)


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
