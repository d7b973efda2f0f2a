"""The CUDA driver library, found at run time: no toolkit, no torch. Every refusal names the call and CUDA's words.

    driver = Driver()
    device = Device(driver)              # GPU 0, by its primary context, which torch and ONNX Runtime use too
    with device.current():
        x = driver.allocate(1024)

Handles and device pointers are plain integers. `launch.py` runs kernels with it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

from mdm.plugins.errors import EngineError, EnvironmentLackError

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
# cuda.h's numbers
CAPABILITY = (75, 76)  # device attributes: major, minor
MULTIPROCESSORS = 16  # device attribute
SHARED_LIMIT = 97  # device attribute: bytes of shared memory a block may ask for
DYNAMIC_SHARED = 8  # function attribute: how much of that it does ask for
CAPTURE_RELAXED = 2
EVENT_QUIET = 3  # whoever waits sleeps, and no time is taken

_HANDLE = POINTER(c_void_p)
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuModuleLoadData": (_HANDLE, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_uint64),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoD_v2": (c_uint64, c_char_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_char_p, c_uint64, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
}


class Driver:
    """The library. Each method is one call; `call` is any of FUNCTIONS by name."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            loaded = ctypes.CDLL(library)
        except OSError as error:
            raise EnvironmentLackError(
                f"no NVIDIA driver: {library} cannot be loaded\nfound: {error}\n"
                "install the driver of this machine's GPU; in a container: --gpus all"
            ) from error
        self._functions = {}
        for name, arguments in FUNCTIONS.items():
            if not hasattr(loaded, name):
                raise EnvironmentLackError(
                    f"the NVIDIA driver ({library}) has no function {name}\nexpected a driver for CUDA 12 or newer\n"
                    "update the driver of this machine's GPU"
                )
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        try:
            self.call("cuInit", 0)
        except EngineError as error:
            raise EnvironmentLackError(
                f"the NVIDIA driver ({library}) is here, but {error}\n"
                "nvidia-smi may tell more; in a container: --gpus all"
            ) from error

    def call(self, name: str, *arguments: Any) -> None:
        if status := self._functions[name](*arguments):
            raise EngineError(f"{name} failed: {self.words(status)}")

    def words(self, status: int) -> str:
        """CUDA's name and text for a status."""
        said = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._functions[function](status, byref(text))
            said.append((text.value or b"unknown").decode(errors="replace"))
        return f"{said[0]} ({status}), {said[1]}"

    def handle(self, name: str, *arguments: Any) -> int:
        """Of a function that gives a handle through its first argument."""
        made = c_void_p()
        self.call(name, byref(made), *arguments)
        return made.value or 0

    def number(self, name: str, *arguments: Any) -> int:
        """Of a function that gives an int through its first argument."""
        made = c_int()
        self.call(name, byref(made), *arguments)
        return made.value

    def version(self) -> str:
        """The newest CUDA this driver serves: "12.8"."""
        number = self.number("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def launch(
        self, function: int, grid: Sequence[int], threads: int, shared: int, stream: int, arguments: Any
    ) -> None:
        """`arguments`: a ctypes array of the arguments' addresses; the driver has copied them when this returns."""
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, arguments, None)

    def allocate(self, size: int) -> int:
        made = c_uint64()
        self.call("cuMemAlloc_v2", byref(made), size)
        return made.value

    def free(self, pointer: int) -> None:
        self.call("cuMemFree_v2", pointer)

    def memory(self) -> tuple[int, int]:
        """Bytes of the device: free, and all."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate_host(self, size: int) -> int:
        """Memory of this side that the device reads and writes by itself."""
        return self.handle("cuMemHostAlloc", size, 0)

    def free_host(self, pointer: int) -> None:
        self.call("cuMemFreeHost", pointer)

    def upload(self, pointer: int, data: bytes) -> None:
        self.call("cuMemcpyHtoD_v2", pointer, data, len(data))

    def download(self, pointer: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", data, pointer, size)
        return data.raw

    def upload_later(self, pointer: int, host: int, size: int, stream: int) -> None:
        """In the stream's order, from memory of `allocate_host`, which must stay as it is until then."""
        self.call("cuMemcpyHtoDAsync_v2", pointer, host, size, stream)

    def download_later(self, host: int, pointer: int, size: int, stream: int) -> None:
        self.call("cuMemcpyDtoHAsync_v2", host, pointer, size, stream)

    def clear(self, pointer: int, size: int, stream: int) -> None:
        """Zeros, in the stream's order."""
        self.call("cuMemsetD8Async", pointer, 0, size, stream)

    def create_stream(self) -> int:
        return self.handle("cuStreamCreate", 1)  # 1: does not wait for the default stream

    def destroy_stream(self, stream: int) -> None:
        self.call("cuStreamDestroy_v2", stream)

    @contextmanager
    def stream(self) -> Iterator[int]:
        stream = self.create_stream()
        try:
            yield stream
        finally:
            self.destroy_stream(stream)

    def synchronize(self, stream: int) -> None:
        self.call("cuStreamSynchronize", stream)

    def create_event(self) -> int:
        return self.handle("cuEventCreate", EVENT_QUIET)

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream has to do by now."""
        self.call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Until all of it is done; also while the stream is captured by somebody else."""
        self.call("cuEventSynchronize", event)

    def destroy_event(self, event: int) -> None:
        self.call("cuEventDestroy_v2", event)

    def begin_capture(self, stream: int) -> None:
        """From here on, what is launched on the stream is recorded and does not run."""
        self.call("cuStreamBeginCapture_v2", stream, CAPTURE_RELAXED)

    def end_capture(self, stream: int) -> int:
        """What was recorded, as a graph to be launched with `replay` any number of times."""
        graph = c_void_p()
        self.call("cuStreamEndCapture", stream, byref(graph))
        try:
            return self.handle("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)

    def replay(self, graph: int, stream: int) -> None:
        self.call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self.call("cuGraphExecDestroy", graph)


class Device:
    """One GPU with its primary context, held until `close`."""

    def __init__(self, driver: Driver, number: int = 0) -> None:
        self.driver, self.number = driver, number
        try:
            self._device = driver.number("cuDeviceGet", number)
        except EngineError as error:
            raise EnvironmentLackError(
                f"there is no GPU {number} here: {error}\nnvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES may hide some"
            ) from error
        name = ctypes.create_string_buffer(256)
        driver.call("cuDeviceGetName", name, len(name), self._device)
        self.name = name.value.decode(errors="replace")
        major, minor = (driver.number("cuDeviceGetAttribute", part, self._device) for part in CAPABILITY)
        self.capability = (major, minor)
        self.multiprocessors = driver.number("cuDeviceGetAttribute", MULTIPROCESSORS, self._device)
        self.shared_limit = driver.number("cuDeviceGetAttribute", SHARED_LIMIT, self._device)
        self.context = driver.handle("cuDevicePrimaryCtxRetain", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """This thread's calls go to this device; the context it had before comes back at the end."""
        self.driver.call("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.driver.handle("cuCtxPopCurrent_v2")

    def close(self) -> None:
        self.driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
