# Cases for forbidden.py: what TensorRT forbids.

import gc

import tensorrt as trt
from ready import LOG, ON_CHANGE, USER, Ready, build, case, device, driver

from mdm.plugins.errors import EngineError


@case
def all_is_well():
    """The measure of the others."""
    ready = Ready()
    ready.host[:] = 3
    ready.up()
    assert ready.run()
    ready.down()
    ready.sync()
    return f"{ready.host[:8].tolist()} then {ready.host[8:].tobytes()[:1].hex()}"


@case
def a_graph_copies_what_is_there_when_it_runs():
    ready, found = Ready(), []
    ready.run()
    ready.sync()
    ready.capture()
    ready.up()
    ready.run()
    ready.down()
    graph = driver.end_capture(ready.stream)
    for value in (5, 6):
        ready.host[:] = value
        driver.replay(graph, ready.stream)
        ready.sync()
        found.append(f"{ready.host[0]:g}")
    return " ".join(found)


def refused(name, change=lambda ready: None, flags=(), **options):
    """A run that is refused, or a stream that fails, after this change."""

    def tried():
        ready = Ready(*flags, **options)
        change(ready)
        return outcome(ready)

    tried.__name__ = name
    case(tried)


def outcome(ready):
    LOG.said.clear()
    if not ready.run():
        return f"False: {LOG.said[-1]}"
    ready.sync()
    return "ran"


def sized(change):
    """Other device memory of the right size, before a change."""

    def changed(ready):
        size = ready.context.update_device_memory_size_for_shapes()
        ready.scratch = driver.allocate(size)
        ready.context.set_device_memory(ready.scratch, size)
        change(ready)

    return changed


def captured(change):
    """In a capture, after a run outside it and a change."""

    def changed(ready):
        ready.run()
        ready.sync()
        change(ready)
        ready.capture()

    return changed


def switch(ready, stream):
    assert ready.context.set_optimization_profile_async(1, stream)
    ready.context.set_input_shape("x", (2, 4))


refused("run_on_the_default_stream", lambda r: setattr(r, "stream", 0))
refused("run_on_a_stream_that_is_gone", lambda r: driver.call("cuStreamDestroy_v2", r.stream))
refused("no_address", lambda r: r.context.set_tensor_address("y", 0))
refused("a_misaligned_address", lambda r: r.context.set_tensor_address("x", r.x + 16))
refused("an_address_of_the_host", lambda r: r.context.set_tensor_address("x", r.pinned))
refused("a_buffer_too_small", lambda r: r.context.set_tensor_address("y", driver.allocate(31)))
refused("in_and_out_overlap", lambda r: r.context.set_tensor_address("y", r.x))
refused("no_device_memory", strategy=USER)
refused("device_memory_too_small", lambda r: r.context.set_device_memory(driver.allocate(512), 512), strategy=USER)
refused("device_memory_misaligned", sized(lambda r: r.context.set_device_memory(r.scratch + 8, 2**21)), strategy=USER)
refused("device_memory_that_lies", lambda r: r.context.set_device_memory(driver.allocate(512), 2**21), strategy=USER)
refused("device_memory_that_is_gone", sized(lambda r: driver.free(r.scratch)), strategy=USER)
refused("device_memory_over_an_input", sized(lambda r: r.context.set_tensor_address("x", r.scratch)), strategy=USER)
refused("device_memory_as_told", sized(lambda r: None), strategy=USER)
refused("no_shapes_after_a_switch", lambda r: r.context.set_optimization_profile_async(1, r.stream))
refused("a_switch_on_another_stream", lambda r: switch(r, r.other))
refused("a_switch_on_another_stream_awaited", lambda r: (switch(r, r.other), r.sync(r.other)))
refused("capture_at_once", lambda r: r.capture())
refused("capture_after_new_shapes", captured(lambda r: r.context.set_input_shape("x", (3, 4))))
refused("capture_after_a_switch", captured(lambda r: switch(r, r.stream)))
refused("capture_of_streamed_weights", captured(lambda r: None), flags=["WEIGHT_STREAMING"], budget=0)
refused("a_stripped_plan", flags=["STRIP_PLAN", "REFIT_IDENTICAL"])
refused("a_stripped_plan_refitted", lambda r: r.refit(), flags=["STRIP_PLAN", "REFIT_IDENTICAL"])
refused("a_refit_on_another_stream", lambda r: r.refit(r.other), flags=["REFIT"])
refused("two_runs_on_two_streams", lambda r: r.run(r.other))


def pending(name, change, replayed=False):
    """What happens to a run that waits in its stream, or in a graph, after this change."""

    def tried():
        ready = Ready()
        if replayed:
            driver.replay(ready.captured(), ready.stream)
        else:
            assert ready.run()
        LOG.said.clear()
        change(ready)
        try:
            ready.sync()
        except EngineError as error:
            return f"{error}: {LOG.said[-1]}"
        return "ran"

    tried.__name__ = name
    case(tried)


def close(ready):
    del ready.context
    gc.collect()


for kind, replayed in (("a_run", False), ("a_graph", True)):
    pending(f"{kind}_whose_input_is_freed", lambda r: driver.free(r.x), replayed)
    pending(f"{kind}_whose_context_is_closed", close, replayed)
    pending(f"{kind}_whose_shapes_change", lambda r: r.context.set_input_shape("x", (3, 4)), replayed)


@case
def shapes_outside_the_profile():
    context = Ready().context
    return (
        f"{context.set_input_shape('x', (5, 4))} {context.set_input_shape('x', (2, 3))} {context.get_tensor_shape('x')}"
    )


@case
def outside_a_context():
    """Loading, where TensorRT would take GPU 0."""
    plan = build()
    driver.handle("cuCtxPopCurrent_v2")
    try:
        return str(trt.Runtime(LOG).deserialize_cuda_engine(plan))
    finally:
        driver.call("cuCtxPushCurrent_v2", device.context)


def unloaded(name, change, *flags):
    def tried():
        LOG.said.clear()
        made = trt.Runtime(LOG).deserialize_cuda_engine(change(build(*flags)))
        return f"{made}: {LOG.said[-1]}"

    tried.__name__ = name
    case(tried)


unloaded("no_plan", lambda plan: b"not a plan")
unloaded("half_a_plan", lambda plan: plan[: len(plan) // 2])
unloaded("a_changed_plan", lambda plan: plan[:-1] + b"!")
unloaded("a_plan_of_host_code", lambda plan: plan, "VERSION_COMPATIBLE")


@case
def no_profile():
    made = build(profiles=())
    return f"{made}: {LOG.said[-1]}"


@case
def memory_comes_back():
    """Of engine, context and refit, when they go."""
    gc.collect()
    before = driver.memory()[0]
    ready = Ready("REFIT", strategy=ON_CHANGE)
    ready.refit()
    during = driver.memory()[0]
    own = 2 * 256
    del ready.context, ready.engine, ready.refitter, ready.weights
    gc.collect()
    return f"{during < before} {before - driver.memory()[0] == own}"
