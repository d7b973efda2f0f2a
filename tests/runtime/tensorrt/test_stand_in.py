"""The stand-in for TensorRT and the fake driver: they compute what ONNX Runtime does, late, and refuse what is
forbidden.

What runs on them uses TensorRT's API as it may be used: every name of theirs is one of the real bindings (in the rig).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT

ENQUEUE, SYNC = "False: IExecutionContext::enqueueV3: .*", "cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS.*"
SPOILED = r"cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED \(901\).*"
NO_PLAN = "None: IRuntime::deserializeCudaEngine: .*"
# What forbidden.py does -> what has to come of it, a pattern for the whole answer.
ANSWERS = {
    "all_is_well": r"\[6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0\] then cb",
    # the driver
    "free_what_was_not_allocated": r"cuMemFree_v2 failed: CUDA_ERROR_INVALID_VALUE.*",
    "free_twice": r"cuMemFree_v2 failed: CUDA_ERROR_INVALID_VALUE.*",
    "more_memory_than_there_is": r"cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY \(2\).*",
    "copy_beyond_an_allocation": r"cuMemcpyHtoDAsync_v2 failed: CUDA_ERROR_INVALID_VALUE.*",
    "copy_between_streams_unsynchronized": "reads 0xcb",
    "read_too_early": "reads 0 then 3",
    "overwrite_too_early": "reads 8",
    "free_under_a_copy": SYNC,
    "free_the_host_under_a_copy": SYNC,
    "use_a_stream_that_is_gone": r"cuMemcpyHtoDAsync_v2 failed: CUDA_ERROR_INVALID_HANDLE.*",
    "use_a_graph_that_is_gone": r"cuGraphLaunch failed: CUDA_ERROR_INVALID_HANDLE.*",
    "capture_the_default_stream": r"cuStreamBeginCapture_v2 failed: .*UNSUPPORTED \(900\).*",
    "capture_twice": r"cuStreamBeginCapture_v2 failed: CUDA_ERROR_ILLEGAL_STATE.*",
    "end_what_was_not_begun": r"cuStreamEndCapture failed: CUDA_ERROR_ILLEGAL_STATE.*",
    "copy_without_a_context": r"cuMemAlloc_v2 failed: CUDA_ERROR_INVALID_CONTEXT \(201\).*",
    "a_context_of_another_thread": r"cuMemAlloc_v2 failed: CUDA_ERROR_INVALID_CONTEXT \(201\).*",
    "allocate_within_a_capture": SPOILED,
    "allocate_host_within_a_capture": SPOILED,
    "free_within_a_capture": SPOILED,
    "synchronize_within_a_capture": SPOILED,
    "upload_within_a_capture": SPOILED,
    "download_within_a_capture": SPOILED,
    "load_code_within_a_capture": SPOILED,
    "copy_pageable_within_a_capture": SPOILED,
    # a run
    "a_graph_copies_what_is_there_when_it_runs": "10 12",
    "run_on_the_default_stream": f"{ENQUEUE}stream 0x0 is the default one.*",
    "run_on_a_stream_that_is_gone": f"{ENQUEUE}is the default one or none.*",
    "no_address": f"{ENQUEUE}y: 32 bytes at 0x0 .*",
    "a_misaligned_address": f"{ENQUEUE}x: 32 bytes at .* not aligned.*",
    "an_address_of_the_host": f"{ENQUEUE}x: 32 bytes at .*in one allocation.*",
    "a_buffer_too_small": f"{ENQUEUE}y: 32 bytes at .*in one allocation.*",
    "in_and_out_overlap": f"{ENQUEUE}x and y overlap.*",
    "no_device_memory": f"{ENQUEUE}of device memory needed, 0 at 0x0 given.*",
    "device_memory_too_small": f"{ENQUEUE}of device memory needed, 512 at.*",
    "device_memory_misaligned": f"{ENQUEUE}of device memory needed.*",
    "device_memory_that_lies": f"{ENQUEUE}of device memory needed, 2097152 at.*",
    "device_memory_that_is_gone": f"{ENQUEUE}of device memory needed.*",
    "device_memory_over_an_input": f"{ENQUEUE}x and device memory overlap.*",
    "device_memory_as_told": "ran",
    "no_shapes_after_a_switch": rf"{ENQUEUE}no shapes set for \['x'\].*",
    "a_switch_on_another_stream": f"{ENQUEUE}change of profile was on another stream.*",
    "a_switch_on_another_stream_awaited": "ran",
    "capture_at_once": f"{ENQUEUE}deferred updates cannot be captured.*",
    "capture_after_new_shapes": f"{ENQUEUE}deferred updates cannot be captured.*",
    "capture_after_a_switch": f"{ENQUEUE}deferred updates cannot be captured.*",
    "capture_of_streamed_weights": f"{ENQUEUE}streams its weights cannot be captured.*",
    "a_stripped_plan": f"{ENQUEUE}stripped of its weights, and not refitted.*",
    "a_stripped_plan_refitted": "ran",
    "a_refit_on_another_stream": f"{ENQUEUE}refit was on another stream.*",
    "two_runs_on_two_streams": f"{ENQUEUE}another run that may not be done.*",
    "a_run_whose_input_is_freed": f"{SYNC}memory of x went.*",
    "a_run_whose_context_is_closed": f"{SYNC}execution context went.*",
    "a_run_whose_shapes_change": "ran",
    "a_graph_whose_input_is_freed": f"{SYNC}memory of x went.*",
    "a_graph_whose_context_is_closed": f"{SYNC}execution context went.*",
    "a_graph_whose_shapes_change": f"{SYNC}context has other shapes.*",
    "shapes_outside_the_profile": r"False False \(2, 4\)",
    # an engine
    "outside_a_context": "None",
    "no_plan": f"{NO_PLAN}magic tag.*",
    "half_a_plan": f"{NO_PLAN}checksum.*",
    "a_changed_plan": f"{NO_PLAN}checksum.*",
    "a_plan_of_host_code": f"{NO_PLAN}engine_host_code_allowed is not set.*",
    "no_profile": r"None: IBuilder::buildSerializedNetwork: .*no optimization profile.*",
    "memory_comes_back": "True True",
}


def child(environment: dict[str, str], name: str, *words: object, **more: str) -> Any:
    """What a script beside this file prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *map(str, words)],
        env={**environment, **more}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", folder / "tiny.bundle", validate=False)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, stand_in: dict[str, str]) -> dict[str, str]:
    """Of all that is forbidden, in one process."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    weight = numpy_helper.from_array(np.full(4, 2, np.float32), "w")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"], name="double")], "g", [x], [y], [weight])
    path = tmp_path_factory.mktemp("forbidden") / "double.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return dict(child(stand_in, "forbidden.py", path))


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_forbidden_fails(answers: dict[str, str], name: str) -> None:
    assert re.fullmatch(ANSWERS[name], answers[name], re.DOTALL), answers[name]


def test_nothing_forbidden_goes_unlooked_at(answers: dict[str, str]) -> None:
    assert answers.keys() == ANSWERS.keys()


@pytest.mark.parametrize(("graph", "batch", "tokens"), [("step_text", 3, 20), ("step_joint_guided", 2, 84)])
def test_a_graph_computes_as_in_onnx_runtime(
    bundle: Path, stand_in: dict[str, str], graph: str, batch: int, tokens: int
) -> None:
    """To the bit: directly, replayed, and replayed on other inputs; what was allocated comes back."""
    told = child(stand_in, "one_graph.py", bundle, graph, batch, tokens)
    assert told["worst"] == 0
    assert told["moved"] > 0.1  # the other inputs gave other outputs
    assert told["free"][0] == told["free"][1]


def test_planted_failures(bundle: Path, stand_in: dict[str, str]) -> None:
    for planted, said in (("build:1", "NoneType"), ("execute:2", "assert context.execute_async_v3"), ("run:3", "700")):
        with pytest.raises(AssertionError, match=said):
            child(stand_in, "one_graph.py", bundle, "step_text", 1, 8, STAND_IN_FAILS=planted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"STAND_IN_TENSORRT": "11.5.0.1"}, "expecting 11.4.0.106 got 11.5.0.1"),
        ({"FAKE_CUDA_CAPABILITY": "89"}, "expecting compute 9.0 got compute 8.9"),
        ({"WITHOUT_PLUGINS": "1"}, "Cannot find plugin: MambaShortConv, version: 1, namespace:mdm"),
    ],
)
def test_an_engine_for_something_else(
    bundle: Path, stand_in: dict[str, str], tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    """Another TensorRT, another GPU, no plugins: it is built in one process and loaded in another."""
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    place = [sys.executable, str(script), str(bundle / "step_text.onnx"), str(tmp_path / "engine")]
    for step, more, loads in (("build", {}, True), ("load", {}, True), ("load", changes, False)):
        done = subprocess.run([*place, step], env={**stand_in, **more}, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is loads, done.stderr[-1000:]
    assert said in done.stderr


LOAD = """
import os, sys, tensorrt as trt
from pathlib import Path
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.tensorrt.python_plugin import register
model, engine, step = sys.argv[1:]
log = trt.Logger()
if "WITHOUT_PLUGINS" not in os.environ:
    register()
with Device(Driver()).current():
    if step == "load":
        sys.exit(trt.Runtime(log).deserialize_cuda_engine(Path(engine).read_bytes()) is None)
    builder = trt.Builder(log)
    network, config = builder.create_network(), builder.create_builder_config()
    assert trt.OnnxParser(network, log).parse_from_file(model)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        open_ = iter((2, 8) if len(tensor.shape) > 1 and tensor.name != "row" else (2,))
        shape = [next(open_) if size == -1 else size for size in tensor.shape]
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    Path(engine).write_bytes(builder.build_serialized_network(network, config))
"""


def test_it_offers_only_what_tensorrt_has(stand_in: dict[str, str], rig: dict[str, str]) -> None:
    """Every class, method with its arguments' names, property and enumerator with its number."""
    ours, real = child(stand_in, "api.py"), child(rig, "api.py")
    assert {*ours} <= {*real}
    for name, found in ours.items():
        known = real[name]
        assert {*found["properties"]} <= {*known["properties"]}, name
        assert found["numbers"].items() <= known["numbers"].items(), name
        for method, (arguments,) in found["methods"].items():
            assert any(arguments == one[: len(arguments)] for one in known["methods"][method]), (name, method)
    assert sum(len(found["methods"]) for found in ours.values()) > 60  # it has looked
    assert sum(len(found["properties"]) for found in ours.values()) > 40
