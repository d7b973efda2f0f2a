# Cases for forbidden.py: what the driver forbids.

import contextlib
import ctypes
import threading

import numpy as np
from ready import ROW, Ready, case, device, driver

from mdm.plugins.errors import EngineError

PAGEABLE = ctypes.create_string_buffer(16)


@case
def free_what_was_not_allocated():
    driver.free(Ready().x + 256)


@case
def free_twice():
    ready = Ready()
    driver.free(ready.x)
    driver.free(ready.x)


@case
def more_memory_than_there_is():
    driver.allocate(2**60)


@case
def copy_beyond_an_allocation():
    Ready().up(16 * ROW + 1)


@case
def copy_between_streams_unsynchronized():
    """A copy that is no stream's waits for no stream that is beside the default one."""
    ready = Ready()
    ready.host[:] = 3
    ready.up()
    found = np.frombuffer(driver.download(ready.x, 4), np.uint8)[0]
    return f"reads {found:#x}"


@case
def read_too_early():
    ready = Ready()
    ready.host[:] = 3
    driver.upload_later(ready.y, ready.pinned, 16 * ROW, ready.stream)
    ready.sync()
    ready.host[:] = 0
    ready.down()
    early = ready.host[0]
    ready.sync()
    return f"reads {early:g} then {ready.host[0]:g}"


@case
def overwrite_too_early():
    ready = Ready()
    ready.host[:] = 3
    ready.up()
    ready.host[:] = 4
    ready.run()
    ready.down()
    ready.sync()
    return f"reads {ready.host[0]:g}"


@case
def free_under_a_copy():
    ready = Ready()
    ready.up()
    driver.free(ready.x)
    ready.sync()


@case
def free_the_host_under_a_copy():
    ready = Ready()
    ready.up()
    driver.free_host(ready.pinned)
    ready.sync()


@case
def use_a_stream_that_is_gone():
    ready = Ready()
    driver.call("cuStreamDestroy_v2", ready.stream)
    ready.up()


@case
def use_a_graph_that_is_gone():
    ready = Ready()
    graph = ready.captured()
    driver.free_graph(graph)
    driver.replay(graph, ready.stream)


@case
def capture_the_default_stream():
    driver.begin_capture(0)


@case
def capture_twice():
    ready = Ready()
    ready.capture()
    ready.capture()


@case
def end_what_was_not_begun():
    driver.end_capture(Ready().stream)


@case
def copy_without_a_context():
    device.driver.handle("cuCtxPopCurrent_v2")
    try:
        driver.allocate(16)
    finally:
        driver.call("cuCtxPushCurrent_v2", device.context)


@case
def a_context_of_another_thread():
    answers = []

    def elsewhere():
        try:
            driver.allocate(16)
        except EngineError as error:
            answers.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    return answers[0]


def within_a_capture(name, forbidden):
    def tried():
        ready = Ready()
        ready.run()
        ready.sync()
        ready.capture()
        with contextlib.suppress(EngineError):
            return f"done: {forbidden(ready)}"
        driver.end_capture(ready.stream)  # the capture is spoiled as well

    tried.__name__ = f"{name}_within_a_capture"
    case(tried)


within_a_capture("allocate", lambda ready: driver.allocate(16))
within_a_capture("allocate_host", lambda ready: driver.allocate_host(16))
within_a_capture("free", lambda ready: driver.free(ready.x))
within_a_capture("synchronize", lambda ready: ready.sync())
within_a_capture("upload", lambda ready: driver.upload(ready.x, b"some"))
within_a_capture("download", lambda ready: driver.download(ready.x, 4))
within_a_capture("load_code", lambda ready: driver.handle("cuModuleLoadData", b"code"))
within_a_capture("copy_pageable", lambda ready: driver.upload_later(ready.x, PAGEABLE, 4, ready.stream))
