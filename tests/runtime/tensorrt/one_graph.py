# Runs in a process of its own, with the stand-in for TensorRT: builds an engine of one graph, loads it, and runs it
# by the API alone, once directly and twice as a CUDA graph. An example of what runtime/ does with many.
#
#     one_graph.py BUNDLE GRAPH BATCH TOKENS
#
# Out: {"worst": the largest difference to ONNX Runtime, "free": [free bytes before, and after all is closed], ...}

import contextlib
import ctypes
import json
import sys

import numpy as np
import tensorrt as trt

from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.tensorrt.python_plugin import register
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend
from mdm.runtime.tensorrt.profiles import find_profile, shapes_of


def build(bundle, graph):
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    assert parser.parse_from_file(str(bundle.path / f"{graph}.onnx")), parser.get_error(0).desc()
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, three in shapes_of(bundle.manifest, graph, find_profile("latency")).items():
        profile.set_shape(name, *three)
    assert config.add_optimization_profile(profile) >= 0
    return bytes(memoryview(builder.build_serialized_network(network, config)))


def at(address, dtype, shape):
    """Host memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def run(plan, inputs, outputs, driver):
    """`outputs`: their types and shapes -> the results of a run and of two replays, the second on other inputs."""
    with closing_memory(driver) as (allocate, allocate_host), driver.stream() as stream:
        engine = trt.Runtime(LOG).deserialize_cuda_engine(plan)
        assert engine is not None
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        assert context.set_optimization_profile_async(0, stream)
        device, pinned, host = {}, {}, {}
        for name, (dtype, shape) in ({n: (v.dtype, v.shape) for n, v in inputs.items()} | outputs).items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            device[name], pinned[name] = allocate(size), allocate_host(size)
            host[name] = at(pinned[name], dtype, shape)
            assert context.set_tensor_address(name, device[name])
        for name, value in inputs.items():
            assert context.set_input_shape(name, value.shape)
            host[name][...] = value
        assert context.infer_shapes() == []
        size = context.update_device_memory_size_for_shapes()
        context.set_device_memory(allocate(size), size)

        def step():
            for name in inputs:
                driver.upload_later(device[name], pinned[name], host[name].nbytes, stream)
            assert context.execute_async_v3(stream)
            for name in outputs:
                driver.download_later(pinned[name], device[name], host[name].nbytes, stream)

        def results():
            driver.synchronize(stream)
            return {name: host[name].copy() for name in outputs}

        step()  # the first run after new shapes: what it updates cannot be captured
        found = [results()]
        driver.begin_capture(stream)
        step()
        graph = driver.end_capture(stream)
        for turn in range(2):
            if turn:
                for name in inputs:
                    host[name][...] = host[name][::-1].copy()  # the samples in another order
            driver.replay(graph, stream)
            found.append(results())
        driver.free_graph(graph)
        return found


@contextlib.contextmanager
def closing_memory(driver):
    """What allocates on the device, and on this side; all goes at the end."""
    device, host = [], []
    yield (
        lambda size: device.append(driver.allocate(size)) or device[-1],
        lambda size: host.append(driver.allocate_host(size)) or host[-1],
    )
    for pointer in device:
        driver.free(pointer)
    for pointer in host:
        driver.free_host(pointer)


def main(path, name, batch, tokens):
    bundle = open_bundle(path)
    plain = OrtBackend(bundle, threads=1).graph(name)
    generator, sizes = np.random.default_rng(3), {"batch": int(batch), "tokens": int(tokens)}
    inputs = {
        name: generator.uniform(0, 2, spec.sized(**sizes)).astype(spec.dtype) for name, spec in plain.inputs.items()
    }
    outputs = {name: (spec.dtype, spec.sized(**sizes)) for name, spec in plain.outputs.items()}
    driver = Driver()
    device = Device(driver)
    with device.current():
        register()
        plan = build(bundle, name)
        before = driver.memory()[0]
        results = run(plan, inputs, outputs, driver)
        after = driver.memory()[0]
    expected = dict(zip(outputs, plain.run([*outputs], **inputs), strict=True))
    turned = [*expected.values()], [*results[2].values()]
    wanted = [expected, expected, {name: value[::-1] for name, value in expected.items()}]
    worst = max(
        float(np.abs(found[name].astype(np.float64) - right[name]).max())
        for found, right in zip(results, wanted, strict=True)
        for name in outputs
    )
    moved = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(*turned, strict=True))
    return {"worst": worst, "moved": moved, "free": [before, after], "plan": len(plan)}


LOG = trt.Logger(trt.Logger.WARNING)
with contextlib.redirect_stdout(sys.stderr):
    told = main(*sys.argv[1:])
json.dump(told, sys.stdout)
