"""The driver library, a fake one: what reaches it, and what is said when it refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.plugins.gpu.driver import FUNCTIONS, Device, Driver

from .fake_cuda import Told, fake_cuda


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(tmp_path, monkeypatch)


def test_a_device_tells_what_it_is(told: Told) -> None:
    told(CAPABILITY="121", SHARED="101376", MULTIPROCESSORS="48")
    device = Device(Driver(fake_cuda()))
    assert (device.name, device.capability) == ("Fake GPU", (12, 1))
    assert (device.multiprocessors, device.shared_limit) == (48, 101376)
    assert device.driver.version() == "12.8"
    device.close()
    assert told.calls("cuDevicePrimaryCtxRelease_v2") == ["cuDevicePrimaryCtxRelease_v2 40"]


def test_memory_goes_there_and_back(told: Told) -> None:
    driver, data = Driver(fake_cuda()), bytes(range(200))
    pointer = driver.allocate(len(data))
    driver.upload(pointer, data)
    assert driver.download(pointer, len(data)) == data
    driver.free(pointer)
    assert [call.split()[0] for call in told.calls()[1:]] == [
        "cuMemAlloc_v2", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuMemFree_v2"
    ]  # fmt: skip


def test_copies_wait_for_their_turn_on_the_stream(told: Told) -> None:
    driver = Driver(fake_cuda())
    free, total = driver.memory()
    pointer, host = driver.allocate(200), driver.allocate_host(200)
    assert driver.memory() == (free - 256, total)
    memory = (ctypes.c_ubyte * 200).from_address(host)
    with driver.stream() as stream:
        memory[:] = range(200)
        driver.upload_later(pointer, host, 200, stream)
        driver.synchronize(stream)
        memory[:] = [7] * 200
        driver.download_later(host, pointer, 200, stream)
        assert bytes(memory) == bytes([7] * 200)
        driver.synchronize(stream)
        assert bytes(memory) == bytes(range(200))
        driver.clear(pointer, 100, stream)
        driver.download_later(host, pointer, 200, stream)
        event = driver.create_event()
        driver.record(event, stream)
        driver.clear(pointer, 200, stream)
        driver.download_later(host, pointer, 200, stream)
        driver.begin_capture(stream)
        driver.wait(event)  # of what came before it, whoever captures
        assert bytes(memory) == bytes(100) + bytes(range(100, 200))
        driver.free_graph(driver.end_capture(stream))
        driver.synchronize(stream)
        assert bytes(memory) == bytes(200)
        driver.destroy_event(event)
    driver.free_host(host)
    driver.free(pointer)
    assert driver.memory() == (free, total)


def test_a_stream_is_captured_and_replayed(told: Told) -> None:
    driver = Driver(fake_cuda())
    with driver.stream() as stream:
        driver.begin_capture(stream)
        graph = driver.end_capture(stream)
        driver.replay(graph, stream)
        driver.synchronize(stream)
        driver.free_graph(graph)
    captured = graph - 1  # the fake driver counts its handles
    assert told.calls()[1:] == [
        "cuStreamCreate 1", f"cuStreamBeginCapture_v2 {stream:#x} 2", f"cuStreamEndCapture {stream:#x}",
        f"cuGraphInstantiateWithFlags {captured:#x} 0", f"cuGraphDestroy {captured:#x}",
        f"cuGraphLaunch {graph:#x} {stream:#x}", f"cuStreamSynchronize {stream:#x}",
        f"cuGraphExecDestroy {graph:#x}", f"cuStreamDestroy_v2 {stream:#x}",
    ]  # fmt: skip


def test_the_context_before_comes_back_after_an_error(told: Told) -> None:
    device = Device(Driver(fake_cuda()))
    with pytest.raises(ZeroDivisionError), device.current():
        raise ZeroDivisionError
    assert told.calls()[-2:] == ["cuCtxPushCurrent_v2 0xc0", "cuCtxPopCurrent_v2"]


def test_no_driver() -> None:
    with pytest.raises(EnvironmentLackError, match=r"no NVIDIA driver: libnowhere.so.1[^\n]*\n[^\n]*\n[^\n]*$"):
        Driver("libnowhere.so.1")


def test_no_gpu(told: Told) -> None:
    with pytest.raises(EnvironmentLackError, match=r"no GPU 3 here: cuDeviceGet failed: CUDA_ERROR_MADE_UP \(101\)"):
        Device(Driver(fake_cuda()), 3)
    told(FAIL="cuInit:100")
    with pytest.raises(EnvironmentLackError, match="is here, but cuInit failed: CUDA_ERROR_NO_DEVICE"):
        Driver(fake_cuda())


def test_a_driver_that_lacks_a_function() -> None:
    with pytest.raises(EnvironmentLackError, match="has no function cuGraphLaunch\nexpected a driver for CUDA 12"):
        Driver(fake_cuda("cuGraphLaunch"))


@pytest.mark.parametrize("function", sorted({*FUNCTIONS} - {"cuGetErrorName", "cuGetErrorString"}))
def test_every_refusal_is_told(function: str, told: Told) -> None:
    """Whatever fails is named with CUDA's words; a stream made before is given back."""
    told(FAIL=f"{function}:700", ARGUMENTS="")
    with pytest.raises(
        (EngineError, EnvironmentLackError),
        match=rf"{function} failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\), an illegal memory access was encountered",
    ):
        everything()
    if told.calls("cuStreamBeginCapture_v2"):  # a stream had been made
        assert told.calls("cuStreamDestroy_v2")


def everything() -> None:
    driver = Driver(fake_cuda())
    device = Device(driver)
    driver.version()
    with device.current():
        driver.number("cuCtxGetDevice")
        module = driver.handle("cuModuleLoadData", b"an image")
        kernel = driver.handle("cuModuleGetFunction", module, b"a kernel")
        driver.call("cuFuncSetAttribute", kernel, 8, 0)
        with driver.stream() as stream:
            driver.launch(kernel, (1, 1, 1), 32, 0, stream, None)
            driver.begin_capture(stream)
            graph = driver.end_capture(stream)
            driver.replay(graph, stream)
            driver.free_graph(graph)
            driver.synchronize(stream)
        driver.call("cuModuleUnload", module)
        driver.memory()
        pointer, host = driver.allocate(16), driver.allocate_host(16)
        with driver.stream() as stream:
            driver.clear(pointer, 16, stream)
            driver.upload_later(pointer, host, 16, stream)
            driver.download_later(host, pointer, 16, stream)
            event = driver.create_event()
            driver.record(event, stream)
            driver.wait(event)
            driver.destroy_event(event)
        driver.free_host(host)
        driver.upload(pointer, bytes(16))
        driver.download(pointer, 16)
        driver.free(pointer)
    device.close()


def test_a_status_without_words(told: Told) -> None:
    driver = Driver(fake_cuda())
    told(FAIL="cuStreamSynchronize:999")
    with pytest.raises(EngineError, match=r"\(999\), unknown$"):
        driver.synchronize(0)
