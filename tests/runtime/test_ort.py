"""ONNX Runtime as a backend, on real tiny bundles: what a bound run writes and what it leaves alone, that neither
company nor threads change a bit, that nothing grows, and what happens at the limits.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime.backend import Graph
from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.lane import Job, Lane
from mdm.runtime.noise import START, normal
from mdm.runtime.ort import DeviceBuffer, OrtBackend
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import solver_table

Backends = Callable[..., OrtBackend]
SOLVERS = ("dpmpp_3m", "euler-maruyama", "dim", "heun", "dpmpp_2m_sde")


@pytest.fixture
def backend(deployed: Callable[[str], Any]) -> Backends:
    """backend("dim", threads=2, memory=..): one on a tiny bundle; "keep" is an MDM that selects tokens."""

    def made(name: str = "keep", engine: str = "ort-cpu", **options: Any) -> OrtBackend:
        return OrtBackend(open_bundle(deployed(name).bundle), engine, **{"threads": 1, **options})

    return made


def tokens_of(name: str) -> int:
    """Of a graph of either family: 0 where it leaves no length open."""
    modality = name.split("_")[1]
    return {"text": 8, "joint": 24, "turn": 40}.get(modality, 0)


def feeds(graph: Graph, name: str, batch: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of a graph, drawn at random; each sample is at another step of another solver."""
    draw = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for tensor, spec in graph.inputs.items():
        shape = spec.sized(batch=batch, tokens=tokens_of(name))
        if tensor == "row":
            schedules = [make_schedule({"kind": "cosine", "shift": shift}) for shift in (2.0, 0.5)[-shape[1] :]]
            tables = [solver_table(schedules, solver=s, steps=6, t_start=0.99, t_end=0.02) for s in SOLVERS]
            found[tensor] = np.stack([tables[i % len(tables)][1 + i % 5] for i in range(batch)]).astype(np.float32)
        elif spec.dtype.kind == "i":
            found[tensor] = draw.integers(0, 4, shape)
        elif spec.dtype == bool:
            found[tensor] = draw.random(shape) < 0.3
        elif tensor == "mask":
            found[tensor] = (draw.random(shape) < 0.7).astype(np.float32)
        elif tensor == "t":
            found[tensor] = draw.random(shape).astype(np.float32)
        else:
            found[tensor] = draw.standard_normal(shape).astype(spec.dtype)
    return found


def make_job(engine: OrtBackend, name: str, seed: int, solver: str = "dpmpp_3m", steps: int = 4, y: int = 1) -> Job:
    tokens = tokens_of(name)
    specs = engine.bundle.graph(name)["inputs"]
    modalities = next(spec["shape"] for spec in specs if spec["name"] == "row")[1]
    latents = next(spec["shape"] for spec in specs if spec["name"] == "base")[1:]
    shape = [tokens if size == "tokens" else size for size in latents]
    schedules = [make_schedule({"kind": "cosine", "shift": shift}) for shift in (2.0, 0.5)[-modalities:]]
    rows = solver_table(schedules, solver=solver, steps=steps, t_start=0.99, t_end=0.02).astype(np.float32)
    base = normal(seed, 0, START, shape)
    state = {"base": base, "point": base, "history": np.zeros((3, *shape), np.float32)}
    state |= {"mask": np.ones(shape[:1], np.float32), "x0_before": np.zeros_like(base)}
    inputs = {
        "y": np.int64(y), "uncond_y": np.int64(4), "guidance": np.float32(1.5 + seed),
        "given": np.arange(shape[0]) < seed % 3, "uncond": normal(seed, 1, START, shape),
    }  # fmt: skip
    return Job([name] * len(rows), rows, tokens, seed, 0, inputs, state)


def finish(lane: Lane, jobs: list[Job]) -> list[Any]:
    """Run these together, whoever is done leaves -> their latents."""
    for job in jobs:
        lane.join(job)
    while lane.jobs:
        assert lane.step() == {}
        for job in [job for job in lane.jobs if job.finished]:
            lane.leave(job)
    return [job.state["base"] for job in jobs]


# --------------------------------------------------------------------------------------------------- what a run does


@pytest.mark.parametrize("name", ["keep", "dim"])
def test_a_bound_run_writes_its_rows_and_no_others(backend: Backends, name: str) -> None:
    """Every graph, of every role: rows 2 to 5 of buffers of seven get what `run` gives, bit for bit."""
    engine = backend(name)
    for title in engine.bundle.manifest["graphs"]:
        graph = engine.graph(title)
        data = feeds(graph, title, 7)
        inputs, outputs = {}, {}
        for tensor, spec in graph.inputs.items():
            inputs[tensor] = engine.buffer(spec.sized(batch=7, tokens=tokens_of(title)), spec.dtype)
            inputs[tensor].host[...] = data[tensor]
        for tensor, spec in graph.outputs.items():
            outputs[tensor] = engine.buffer(spec.sized(batch=7, tokens=tokens_of(title)), spec.dtype)
            outputs[tensor].host[...] = 77
        expected = graph.run(list(graph.outputs), **{tensor: value[2:5] for tensor, value in data.items()})
        run = graph.bind([(inputs, outputs)], 2, 3)
        assert all((buffer.host == 77).all() for buffer in outputs.values())  # binding does not run
        run()
        for (tensor, buffer), value in zip(outputs.items(), expected, strict=True):
            assert value.dtype == graph.outputs[tensor].dtype
            assert not (value == 77).all()
            np.testing.assert_array_equal(buffer.host[2:5], value, err_msg=f"{title}: {tensor}")
            assert (buffer.host[:2] == 77).all()
            assert (buffer.host[5:] == 77).all()
        for tensor, buffer in inputs.items():
            np.testing.assert_array_equal(buffer.host, data[tensor])


def test_wanted_outputs_come_in_their_order(backend: Backends) -> None:
    graph = backend().graph("decode_text")
    data = feeds(graph, "decode_text", 2)
    logits, ids = graph.run(["logits", "ids"], **data)
    back, alone = graph.run(["ids", "logits"], **data), graph.run(["ids"], **data)
    np.testing.assert_array_equal(back[0], ids)
    np.testing.assert_array_equal(back[1], logits)
    np.testing.assert_array_equal(alone[0], ids)
    np.testing.assert_array_equal(logits.argmax(-1), ids)


@pytest.mark.parametrize("title", ["step_image", "step_text_guided", "step_joint_guided", "dim"])
def test_neither_company_nor_threads_change_a_bit(backend: Backends, title: str) -> None:
    name = "dim" if title == "dim" else "keep"
    title = "step_image_guided" if title == "dim" else title
    one, two = backend(name), backend(name, threads=2)
    graph = one.graph(title)
    wanted = list(graph.outputs)
    data = feeds(graph, title, 8)
    together = graph.run(wanted, **data)
    assert all(np.isfinite(value).all() for value in together)
    order = np.random.default_rng(1).permutation(8)
    companies = [[slot] for slot in range(8)] + [[0, 1], [3, 7, 2], [5, 4, 6, 1, 0], list(order)]
    for graph in (one.graph(title), two.graph(title)):
        for slots in companies:
            found = graph.run(wanted, **{tensor: value[slots] for tensor, value in data.items()})
            for tensor, value, whole in zip(wanted, found, together, strict=True):
                np.testing.assert_array_equal(value, whole[slots], err_msg=f"{tensor} of {slots}")


@pytest.mark.parametrize("title", ["step_text", "step_joint_guided"])
def test_whole_runs_are_equal_in_any_company(backend: Backends, title: str) -> None:
    """Solvers and lengths of runs mixed, so that slots are filled again and holes are closed."""
    engines = [backend(), backend(threads=2)]

    def jobs() -> list[Job]:
        return [make_job(engines[0], title, n, SOLVERS[n % 5], 1 + n % 4, y=n % 4) for n in range(6)]

    lanes = [Lane(engine, title, tokens_of(title), 8) for engine in engines]
    lone = [finish(lanes[0], [job])[0] for job in jobs()]
    for lane in lanes:
        for result, expected in zip(finish(lane, jobs()), lone, strict=True):
            np.testing.assert_array_equal(result, expected)
    assert len({value.tobytes() for value in lone}) == len(lone)


def test_a_job_the_engine_refuses_fails_alone(backend: Backends) -> None:
    """No class has that number: ONNX Runtime fails for the whole batch, with an error of its own."""
    engine = backend()
    title = "step_image_guided"
    good = [make_job(engine, title, n) for n in (1, 2)]
    lone = [finish(Lane(engine, title, 0, 1), [make_job(engine, title, n)])[0] for n in (1, 2)]
    bad = make_job(engine, title, 3, y=10**6)
    lane = Lane(engine, title, 0, 4)
    for job in (good[0], bad, good[1]):
        lane.join(job)
    [(job, error)] = lane.step().items()
    assert job is bad
    assert isinstance(error, EngineError)
    assert str(error).startswith("graph 'step_image_guided' failed in ONNX Runtime: ")
    assert len(str(error)) < 400
    lane.leave(bad)
    while not good[0].finished:
        assert lane.step() == {}
    for job, expected in zip(good, lone, strict=True):
        lane.leave(job)
        np.testing.assert_array_equal(job.state["base"], expected)


def test_a_chain_runs_in_its_order(backend: Backends) -> None:
    """Two steps in one run: what the second takes is what the first gave."""
    engine, title = backend(), "step_text"
    graph = engine.graph(title)
    data = feeds(graph, title, 3)
    inputs, outputs = (
        {name: engine.buffer(spec.sized(batch=3, tokens=tokens_of(title)), spec.dtype) for name, spec in specs.items()}
        for specs in (graph.inputs, graph.outputs)
    )
    for name, value in data.items():
        inputs[name].host[...] = value
    then = inputs | {"base": outputs["base_next"]}, outputs | {"base_next": inputs["base"]}
    graph.bind([(inputs, outputs), then], 0, 3)()
    (first,) = graph.run(["base_next"], **data)
    (second,) = graph.run(["base_next"], **data | {"base": first})
    np.testing.assert_array_equal(outputs["base_next"].host, first)
    np.testing.assert_array_equal(inputs["base"].host, second)
    assert not np.array_equal(first, second)


def test_inputs_of_another_shape_are_the_engines_error(backend: Backends) -> None:
    graph = backend().graph("encode_text")
    for inputs in ({"ids": np.zeros((1, 8), np.float32)}, {"ids": np.zeros(8, np.int64)}, {}):
        with pytest.raises(EngineError, match=r"^graph 'encode_text' failed in ONNX Runtime: ") as caught:
            graph.run(["z"], **inputs)
        assert caught.value.__cause__ is not None


# ------------------------------------------------------------------------------------------------------ nothing grows


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_a_bound_run_allocates_nothing_here(backend: Backends) -> None:
    """On Python's side, where numpy's arrays are counted too: fifty runs together take less than one run's x0.

    ONNX Runtime's module grows by 120 bytes a run, for the first few hundred.
    """
    engine, title = backend(), "step_joint"
    graph = engine.graph(title)
    inputs, outputs = (
        {name: engine.buffer(spec.sized(batch=8, tokens=24), spec.dtype) for name, spec in specs.items()}
        for specs in (graph.inputs, graph.outputs)
    )
    for name, value in feeds(graph, title, 8).items():
        inputs[name].host[...] = value
    run = graph.bind([(inputs, outputs)], 0, 8)
    for _ in range(5):
        run()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(50):
        run()
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < outputs["x0"].host.nbytes


@pytest.mark.usefixtures("traced")
def test_steps_do_not_make_the_process_grow(backend: Backends) -> None:
    engine, title = backend(), "step_text_guided"
    lane = Lane(engine, title, 8, 4)
    for n in range(4):
        lane.join(make_job(engine, title, n, SOLVERS[n], steps=1200))
    pairs = [buffer for pair in lane.pairs.values() for buffer in pair]
    buffers = [*lane.inputs.values(), *lane.outputs.values(), *pairs]
    places = [buffer.address(2) for buffer in buffers]
    size = sum(buffer.host.nbytes for buffer in buffers)
    for _ in range(100):
        lane.step()
    gc.collect()
    traced, process = tracemalloc.get_traced_memory()[0], resident() if sys.platform == "linux" else 0
    for _ in range(400):
        lane.step()
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] - traced < 400 * 100
    if sys.platform == "linux":
        assert resident() - process < 400 * size / 10  # a tenth of a lane for each step would be seen
    assert [buffer.address(2) for buffer in buffers] == places
    assert len(engine.graph(title).bound[lane]) == 2  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- memory's limit


TITLES = ["step_image", "step_text", "step_joint", "step_image_guided"]


def test_graphs_used_longest_ago_are_closed(backend: Backends) -> None:
    whole = backend()
    room = 2 * whole.size_of("step_text") + whole.size_of("step_text") // 2
    engine = backend(memory=room)
    first = engine.graph(TITLES[0])
    engine.graph(TITLES[1])
    assert list(engine.loaded) == TITLES[:2]
    assert engine.graph(TITLES[0]) is first  # used again: now the other one is the oldest
    engine.graph(TITLES[2])
    assert list(engine.loaded) == [TITLES[0], TITLES[2]]
    assert engine.graph(TITLES[0]) is first
    for title in TITLES * 2:
        engine.graph(title)
        assert sum(map(engine.size_of, engine.loaded)) <= room
    for title in TITLES:
        whole.graph(title)
    assert list(whole.loaded)[-4:] == TITLES  # without a limit all stay


def test_a_closed_graph_is_gone_at_once(backend: Backends) -> None:
    """Its memory is for the next one, so it cannot wait for Python's garbage collector; a lane has run it."""
    engine = backend(memory=backend().size_of("step_image") + 1)
    lane = Lane(engine, "step_image", 0, 2)
    finish(lane, [make_job(engine, "step_image", 1)])
    graph = engine.loaded["step_image"]
    watched = {"graph": weakref.ref(graph), "session": weakref.ref(graph.session)}
    del graph
    gc.disable()
    try:
        engine.graph("step_text")
        assert {name: found() for name, found in watched.items()} == {"graph": None, "session": None}
    finally:
        gc.enable()
    assert list(engine.loaded) == ["step_text"]


def test_lanes_go_on_after_their_graph_was_closed(backend: Backends) -> None:
    """Two lanes take turns where only one graph fits: each step loads its graph again."""
    engine = backend(memory=backend().size_of("step_image") + 1)
    whole = backend()
    jobs, lone, lanes = [], [], []
    for title, solver in (("step_image", "euler-maruyama"), ("step_text", "dpmpp_3m")):
        jobs.append(make_job(engine, title, 5, solver))
        [expected] = finish(Lane(whole, title, tokens_of(title), 1), [make_job(whole, title, 5, solver)])
        lone.append(expected)
        lanes.append(Lane(engine, title, tokens_of(title), 3))
        lanes[-1].join(jobs[-1])
    seen = set()
    for _ in range(4):
        for lane in lanes:
            assert lane.step() == {}
            [name] = engine.loaded
            assert name == lane.name
            seen.add(id(engine.loaded[name].session))
    for lane, job, expected in zip(lanes, jobs, lone, strict=True):
        lane.leave(job)
        np.testing.assert_array_equal(job.state["base"], expected)


def test_a_limit_below_one_graph_is_refused(backend: Backends) -> None:
    need = backend().size_of("step_text")
    weights = sum(
        signed["size"]
        for file, signed in backend().bundle.manifest["files"].items()
        if file in ("weights.safetensors", "derived.safetensors")
    )
    assert weights < need < 4 * weights
    assert backend(memory=need).graph("step_text")
    engine = backend(memory=need - 1)
    with pytest.raises(EnvironmentLackError, match=r"^graph 'step_text' takes about .* the limit") as caught:
        engine.graph("step_text")
    assert caught.value.exit_code == 3
    assert not engine.loaded


# ----------------------------------------------------------------------------------------------------- what is refused


def test_an_unknown_backend_names_the_nearest(backend: Backends) -> None:
    with pytest.raises(InputError) as caught:
        backend(engine="ort-gpu")
    assert str(caught.value).startswith("unknown backend 'ort-gpu'; did you mean 'ort-c")
    assert "backends: ort-cpu, ort-cuda" in str(caught.value)
    with pytest.raises(InputError, match="did you mean 'ort-cuda'"):
        backend(engine="ort-cudda")
    with pytest.raises(InputError, match=r"^unknown backend 'tensorrt'; did you mean 'tensorrt-rtx'"):
        backend(engine="tensorrt")  # which is not ONNX Runtime's


def test_an_engine_that_is_not_there_is_the_machines_lack(backend: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLackError, match="needs ONNX Runtime's CUDAExecutionProvider, found CPU") as caught:
        backend(engine="ort-cuda")
    assert caught.value.exit_code == 3
    assert "mdm-deploy[gpu]" in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(backend: Backends, threads: int) -> None:
    with pytest.raises(InputError, match=f"^threads is {threads}, expected at least 1$"):
        backend(threads=threads)


def test_bfloat16_is_not_for_the_cpu(deployed: Callable[[str], Any]) -> None:
    bundle = open_bundle(deployed("keep").bundle)
    with pytest.raises(EnvironmentLackError, match="is in bfloat16, which ONNX Runtime's CPU cannot compute") as caught:
        OrtBackend(Bundle(bundle.path, bundle.manifest | {"precision": "bf16"}))
    assert caught.value.exit_code == 3


def test_an_unknown_graph_names_the_nearest(backend: Backends) -> None:
    for memory in (None, 10**9):
        with pytest.raises(InputError, match="has no graph 'step_txt'; did you mean 'step_text'"):
            backend(memory=memory).graph("step_txt")


@pytest.fixture
def spoiled(deployed: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(deployed("keep").bundle, tmp_path / "spoiled.bundle"))


def test_a_changed_graph_is_not_loaded(spoiled: Path) -> None:
    """One bit, in a bundle that is open already; the other graphs go on."""
    engine = OrtBackend(open_bundle(spoiled), threads=1)
    path = spoiled / "step_text.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(InputError, match=r"step_text\.onnx' is not the file that the manifest signs"):
            engine.graph("step_text")
    assert "step_text" not in engine.loaded
    assert engine.graph("step_image")


def test_weights_that_are_gone_are_told_with_the_graphs_name(spoiled: Path) -> None:
    engine = OrtBackend(open_bundle(spoiled), threads=1)
    (spoiled / "weights.safetensors").unlink()
    with pytest.raises(EnvironmentLackError, match="cannot load graph 'step_text' of bundle") as caught:
        engine.graph("step_text")
    assert len(str(caught.value).splitlines()) <= 3


# ------------------------------------------------------------------------------------------------ a device's memory


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU ONNX Runtime takes an array's own memory for a tensor; a device's is another one."""

    def copied(array: Any, device: str, number: int) -> Any:
        made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, number)
        made.update_inplace(array)
        return made

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", copied)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
def test_a_device_buffer_moves_when_it_is_told(dtype: str) -> None:
    buffer = DeviceBuffer((5, 3, 2), dtype, "cpu", 0)
    assert buffer.host.dtype == dtype
    assert not buffer.value.numpy().any()
    buffer.host[...] = values = (np.arange(30).reshape(5, 3, 2) % 3).astype(dtype)
    assert not buffer.value.numpy().any()
    buffer.push()
    place = buffer.address(0)
    np.testing.assert_array_equal(buffer.value.numpy(), values)
    buffer.host[...] = 0
    np.testing.assert_array_equal(buffer.value.numpy(), values)
    buffer.pull()
    np.testing.assert_array_equal(buffer.host, values)
    assert buffer.address(0) == place == buffer.value.data_ptr() != buffer.host.ctypes.data
    assert [buffer.address(row) - place for row in range(5)] == [row * 6 * values.itemsize for row in range(5)]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("title", ["step_text", "step_joint_guided"])
def test_lanes_compute_the_same_in_a_devices_memory(
    backend: Backends, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = backend()

    def jobs() -> list[Job]:
        return [make_job(engine, title, n, SOLVERS[n % 5], 1 + n % 4) for n in range(5)]

    expected = finish(Lane(engine, title, tokens_of(title), 6), jobs())
    monkeypatch.setattr(engine, "buffer", lambda shape, dtype: DeviceBuffer(shape, dtype, "cpu", 0))
    lane = Lane(engine, title, tokens_of(title), 6)
    assert isinstance(lane.inputs["row"], DeviceBuffer)
    for result, value in zip(finish(lane, jobs()), expected, strict=True):
        np.testing.assert_array_equal(result, value)
