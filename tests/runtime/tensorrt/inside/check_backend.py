"""What the backend computes, and where it refuses."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime import Pipeline, load
from mdm.runtime.solver import SOLVERS
from mdm.runtime.tensorrt import backend as backend_module
from mdm.runtime.tensorrt import engine as engine_module
from mdm.runtime.tensorrt import graph as graph_module

from .conftest import TOLD, build

MIXED: dict[str, Any] = {"seed": [1, 2, 3, 4, 5], "steps": [3, 5, 3, 8, 1], "guidance": [1.5, 2.0, 1.0, 1.5, 3.0]}


def on_gpu(folder: Path, **options: Any) -> Pipeline:
    return load(folder, "tensorrt", **options)


def same(ours: list[Any], theirs: list[Any]) -> None:
    """The stand-in computes by ONNX Runtime too, so a difference is one of memory, order or shape."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.latents, b.latents)
        assert a.text == b.text


@pytest.mark.parametrize("task", TOLD)
def test_every_task_is_what_the_cpu_makes(task: str, built: Path) -> None:
    """Alone, again and again, and several that share steps and leave one by one."""
    ours, theirs = on_gpu(built), load(built, threads=1)
    for seed in (0, 0, 0, 1):
        same(ours.sample(task, seed=seed, **TOLD[task]), theirs.sample(task, seed=seed, **TOLD[task]))
    for _ in range(2):
        same(ours.sample(task, **MIXED, **TOLD[task]), theirs.sample(task, **MIXED, **TOLD[task]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(solver: str, built: Path) -> None:
    ours, theirs = on_gpu(built), load(built, threads=1)
    for _ in range(3):
        asked = {"solver": solver, "steps": 5, "seed": [1, 2], "prompt": "two big red"}
        same(ours.sample("text_to_image", **asked), theirs.sample("text_to_image", **asked))


def test_a_callback_sees_every_step(built: Path) -> None:
    seen: list[list[Any]] = [[], []]
    for pipeline, steps in zip((on_gpu(built), load(built, threads=1)), seen, strict=True):
        pipeline.joint(batch=2, seed=3, steps=4, callback=lambda step, steps=steps: steps.append((step.done, step.x0)))
    assert [done for done, _ in seen[0]] == [done for done, _ in seen[1]] == [1, 1, 2, 2, 3, 3, 4, 4]
    for (_, ours), (_, theirs) in zip(*seen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_arrays_of_any_number_go_through(built: Path) -> None:
    """More samples than the engine takes, piece by piece; the halves of the autoencoder, one by one."""
    ours, theirs = (load(built, name).model.backend for name in ("tensorrt", "ort-cpu"))
    rng = np.random.default_rng(0)
    for name in ("encode_text", "step_joint"):
        graph = ours.graph(name)
        for count, tokens in ((1, 24), (4, 36), (11, 24), (3, 30)):
            if name == "encode_text":
                tokens = {24: 8, 36: 20, 30: 14}[tokens]
            inputs = {
                key: rng.uniform(0.1, 2, spec.sized(batch=count, tokens=tokens)).astype(spec.dtype)
                for key, spec in graph.inputs.items()
            }
            wanted = list(graph.outputs)
            for a, b in zip(graph.run(wanted, **inputs), theirs.graph(name).run(wanted, **inputs), strict=True):
                np.testing.assert_array_equal(a, b)


def test_two_profiles_in_one_engine(own: Path) -> None:
    """A run goes by the profile that was built for the nearest shapes, and either gives the same."""
    needed = ("encode_text", "step_joint", "decode_text", "decode_image")
    build(own, needed, ("edge", "throughput"))
    ours, theirs = on_gpu(own), load(own, threads=1)
    asked: dict[str, Any] = {"seed": [*range(9)], "guidance": 0.0, "steps": 3}
    for fields in (asked, {**asked, "seed": 3}, asked):
        same(ours.joint(**fields), theirs.joint(**fields))
    engine = ours.model.backend.graph("step_joint").engine  # type: ignore[attr-defined]
    used = {dict(shapes)["base"][0]: fitted.context.active_optimization_profile
            for shapes, fitted in engine._fitted.items()}  # fmt: skip
    assert used == {1: 0, 8: 1}
    assert on_gpu(own, profile="edge").model.backend.graph("step_joint").batches(0) == [*range(1, 17)]


def test_two_threads_share_the_gpu(built: Path) -> None:
    """A server encodes beside the thread that steps: nothing of the one is caught in the other's captures."""
    ours, theirs = on_gpu(built), load(built, threads=1)
    expected = theirs.joint(batch=2, seed=1, steps=6)
    picture = theirs.model.encode_picture(TOLD["caption"]["picture"], 32)
    wrong: list[BaseException] = []

    def encode() -> None:
        try:
            for _ in range(40):
                np.testing.assert_array_equal(ours.model.encode_picture(TOLD["caption"]["picture"], 32), picture)
        except BaseException as error:
            wrong.append(error)

    other = threading.Thread(target=encode)
    other.start()
    for _ in range(8):
        same(ours.joint(batch=2, seed=1, steps=6), expected)
    other.join()
    assert not wrong, wrong


def test_who_waits_breaks_nobodys_capture(built: Path) -> None:
    """One thread waits for what it put on the stream while another captures on it: forced, as chance rarely does."""
    ours, theirs = on_gpu(built), load(built, threads=1)
    gpu, expected = ours.model.backend.gpu, theirs.joint(seed=1, steps=4)  # type: ignore[attr-defined]
    same(ours.joint(seed=1, steps=4), expected)
    with gpu.mine():
        done = gpu.mark()
    begin, waited = gpu.driver.begin_capture, []

    def begin_and_let_wait(stream: int) -> None:
        begin(stream)
        other = threading.Thread(target=lambda: waited.append(gpu.wait(done)))
        other.start()
        other.join()

    gpu.driver.begin_capture = begin_and_let_wait
    for _ in range(3):
        same(ours.joint(seed=1, steps=4), expected)
    engine = ours.model.backend.graph("step_joint_guided").engine  # type: ignore[attr-defined]
    assert (len(engine.captured), engine.why_not) == (1, "")
    assert waited


def test_no_more_is_staged_than_allowed(built: Path) -> None:
    """By many threads at once, each with other shapes."""
    graph = on_gpu(built).model.backend.graph("encode_text")

    def encode(first: int) -> None:
        for count in range(12):
            graph.run(["z"], ids=np.ones((1, 8 + (first + count) % 13), np.int64))

    threads = [threading.Thread(target=encode, args=(2 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graph._staged) <= graph_module.MOST_STAGED  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_run_that_fails_is_told_and_the_next_one_works(built: Path, fails: Any) -> None:
    """TensorRT refuses, or the GPU fails under way. Before the four steps a text is encoded, the second time by a
    capture: three runs."""
    ours, asked = on_gpu(built), {"seed": [1, 2], "steps": 4}
    expected = load(built, threads=1).joint(**asked)
    fails("execute:5")
    with pytest.raises(
        EngineError, match=r"graph 'step_joint_guided' failed in TensorRT: it does not run: .*as planted"
    ):
        ours.joint(**asked)
    fails("")
    for _ in range(3):
        same(ours.joint(**asked), expected)
    fails("run:2")
    with pytest.raises(EngineError, match=r"graph '\w+' failed in TensorRT: cuEventSynchronize failed"):
        ours.joint(**asked)


def test_shapes_that_no_profile_has(own: Path, tmp_path: Path) -> None:
    """A longer text than the engine was built for; the message says what it takes and what to do."""
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.tensorrt.facts import Options
    from mdm.runtime.tensorrt.profiles import Profile, Span
    from mdm.tools.engines.run import build_engines

    bundle = open_bundle(own)
    short = Profile("short", Span(1, 2, 4), texts=(8,))
    list(build_engines(bundle, ["encode_text", "step_text", "decode_text"], [short], Options(), False, lambda s: None))
    ours, theirs = on_gpu(own), load(own, threads=1)
    asked: dict[str, Any] = {"prompt": ["one", "two"], "steps": 2, "guidance": 0.0}
    same(ours.complete(**asked), theirs.complete(**asked))
    with pytest.raises(
        InputError, match=r"of graph 'encode_text' takes no ids of shape \[1, 20\]\nit takes \[1, 8\] to"
    ):
        ours.complete("one small blue square in the middle. what colour? how many?", steps=2, guidance=0.0)
    with pytest.raises(InputError, match=r"graph 'step_joint' of bundle '.*' has no engine\nrun: mdm build"):
        ours.joint(guidance=0.0)


def test_batches_of_one_profile_are_not_anothers(own: Path) -> None:
    """Eight of short texts, two of long ones: four long ones share a step two by two."""
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.tensorrt.facts import Options
    from mdm.runtime.tensorrt.profiles import Profile, Span
    from mdm.tools.engines.run import build_engines

    bundle = open_bundle(own)
    profiles = [Profile("short", Span(1, 8, 8), texts=(8,)), Profile("long", Span(1, 2, 2), texts=(20,))]
    needed = ["encode_text", "step_text", "decode_text"]
    list(build_engines(bundle, needed, profiles, Options(), False, lambda step: None))
    ours, theirs = on_gpu(own), load(own, threads=1)
    graph = ours.model.backend.graph("step_text")
    assert [[*graph.batches(tokens)] for tokens in (8, 14, 20)] == [[*range(1, 9)], [], [1, 2]]
    long = "one small blue square in the middle. what colour?"
    asked: dict[str, Any] = {"prompt": [long, "one", long, "two", long, long], "steps": 3, "guidance": 0.0}
    for _ in range(2):
        same(ours.complete(**asked), theirs.complete(**asked))


def test_a_plan_that_was_changed_since(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is what was hashed; a file that is gone, or empty, is told in our words."""
    build(own, ("step_text", "step_joint"))
    backend = on_gpu(own).model.backend
    [path], [other] = (list((own / "engines").glob(f"{name}-*.engine")) for name in ("step_text", "step_joint"))
    sound, plans = path.read_bytes(), []
    deserialize = backend.library.deserialize  # type: ignore[attr-defined]
    monkeypatch.setattr(backend.library, "deserialize",  # type: ignore[attr-defined]
                        lambda plan, *rest: plans.append(bytes(plan)) or deserialize(plan, *rest))  # fmt: skip
    for content in (other.read_bytes(), b"", sound[:-1], sound[:-1] + bytes([sound[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is not the file that was built\n.*\nrun: mdm build"):
            backend.graph("step_text")
    path.unlink()
    with pytest.raises(InputError, match=r"is not the file that was built\n.* cannot be read: No such file"):
        backend.graph("step_text")
    assert plans == []
    path.write_bytes(sound)
    backend.graph("step_text")
    assert plans == [sound]


def test_ctrl_c_in_a_plugin_is_ctrl_c(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings print it and say that the run failed; an error of ours is told in our words."""
    from mdm.plugins.tensorrt.node import keeps_error

    ours = on_gpu(built)
    for accident, expected, said in (
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (EngineError("MambaSsdScan: no such kernel"), EngineError, "it does not run: MambaSsdScan: no such kernel"),
    ):

        def swallowed(self: Any, stream: int, accident: BaseException = accident) -> bool:
            try:
                with keeps_error():
                    raise accident
            except BaseException:
                return False

        with monkeypatch.context() as patch:
            patch.setattr("tensorrt.IExecutionContext.execute_async_v3", swallowed)
            with pytest.raises(expected, match=said):
                ours.joint(seed=1, steps=2)
    same(ours.joint(seed=1, steps=2), load(built, threads=1).joint(seed=1, steps=2))


def test_the_log_keeps_what_matters() -> None:
    import tensorrt as trt

    from mdm.runtime.tensorrt.library import make_log

    log, level = make_log(trt), trt.ILogger.Severity
    log.take()
    for told, expected in (
        ([(level.INFO, "a"), (level.VERBOSE, "b")], ""),
        ([(level.WARNING, "no CUDA"), (level.INFO, "b"), (level.WARNING, "c")], "no CUDA"),
        ([(level.WARNING, "a"), (level.ERROR, "this\n is it"), (level.WARNING, "c")], "this is it"),
        ([(level.ERROR, "a"), (level.INTERNAL_ERROR, "worse")], "worse"),
    ):
        for severity, text in told:
            log.log(severity, text)
        assert (log.take(), log.take()) == (expected, "")


def test_a_plugin_that_is_not_there(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our words, before TensorRT fails without any."""
    build(own, ("step_text",))
    ours = on_gpu(own)
    engines = backend_module.open_engine

    def other(*asked: Any) -> Any:
        path, record, plan = engines(*asked)
        contents = {**record.contents, "operators": [["MambaSsdScan", "2", "mdm"]]}
        return path, replace(record, contents=contents), plan

    monkeypatch.setattr(backend_module, "open_engine", other)
    with pytest.raises(
        EnvironmentLackError, match="wants the plugin MambaSsdScan version 2 of 'mdm', which is not here"
    ):
        ours.model.backend.graph("step_text")


def test_options_of_other_backends(built: Path) -> None:
    with pytest.raises(InputError, match="takes no threads"):
        on_gpu(built, threads=2)
    with pytest.raises(InputError, match="has no profiles"):
        load(built, profile="latency")
    with pytest.raises(InputError, match="unknown backend 'tensorrts'; did you mean 'tensorrt'"):
        load(built, "tensorrts")
    with pytest.raises(EnvironmentLackError, match="there is no GPU 3 here"):
        on_gpu(built, device=3)


# --------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_and_all_of_it_comes_back(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many runs and changes of shape, with few contexts kept; and when the pipeline goes."""
    monkeypatch.setattr(engine_module, "MOST_CONTEXTS", 2)
    monkeypatch.setattr(engine_module, "MOST_CAPTURED", 7)
    gc.collect()
    other = on_gpu(built)  # whose GPU tells what is in use
    gpu = other.model.backend.gpu  # type: ignore[attr-defined]
    start = gpu.memory_in_use()
    ours, used = on_gpu(built), []
    expected = {batch: load(built, threads=1).joint(batch=batch, steps=3) for batch in (1, 2, 3, 4)}
    for turn in range(6):
        for batch, results in expected.items():
            same(ours.joint(batch=batch, steps=3), results)
        ours.complete("two", steps=1 + turn % 3)
        gc.collect()
        ours.model.backend.gpu.sweep()  # type: ignore[attr-defined]
        used.append(gpu.memory_in_use())
    assert used[3:] == used[:3]  # as `steps` has it
    assert used[-1] > start
    del ours
    gc.collect()
    assert gpu.memory_in_use() == start


def test_graphs_make_room_for_each_other(built: Path) -> None:
    """Engines go when the limit asks for it, and come back; a graph that cannot fit is refused."""
    backend = on_gpu(built).model.backend
    sizes = {name: backend.size_of(name) for name in ("encode_text", "step_joint_guided", "decode_image")}  # type: ignore[attr-defined]
    limit = sizes["step_joint_guided"] + max(sizes["encode_text"], sizes["decode_image"]) - 1
    ours, theirs = on_gpu(built, memory=limit), load(built, threads=1)
    for _ in range(2):
        same(ours.joint(seed=5, steps=4), theirs.joint(seed=5, steps=4))
        assert len(ours.model.backend.shelf.loaded) < 3  # type: ignore[attr-defined]
    gc.disable()  # an engine that has to go goes at once, not when somebody looks for cycles
    try:
        first = weakref.ref(ours.model.backend.graph("step_joint_guided").engine)  # type: ignore[attr-defined]
        assert first() is not None
        ours.joint(seed=5, steps=4)
        for name in ("decode_text", "decode_image", "encode_image", "encode_text"):
            ours.model.backend.graph(name)
        assert first() is None
    finally:
        gc.enable()
    with pytest.raises(EnvironmentLackError, match=r"graph 'encode_text' takes about .* MB of memory"):
        on_gpu(built, memory=1000).joint(seed=5)


def test_no_memory_left(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(2**20))
    with pytest.raises(EngineError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        on_gpu(built).joint(seed=5)
