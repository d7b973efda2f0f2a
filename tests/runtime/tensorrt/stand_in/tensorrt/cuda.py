"""The fake driver, as TensorRT uses it: memory, host functions on streams, and what is told of either."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from itertools import count

from .enums import Severity
from .words import say

GRANULE = 256  # bytes: how addresses are aligned
HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)


@cache
def driver() -> ctypes.CDLL:
    loaded = ctypes.CDLL("libcuda.so.1")
    loaded.fake_cuda_block.restype = c_uint64
    loaded.fake_cuda_block.argtypes = [c_uint64, c_size_t]
    loaded.cuMemFree_v2.argtypes = [c_uint64]
    loaded.cuMemAlloc_v2.argtypes = [c_void_p, c_size_t]
    loaded.cuLaunchHostFunc.argtypes = [c_void_p, HOST_FUNCTION, c_void_p]
    loaded.cuStreamIsCapturing.argtypes = [c_void_p, c_void_p]
    loaded.cuCtxPushCurrent_v2.argtypes = [c_void_p]
    return loaded


def capability() -> str:
    """Of GPU 0: "9.0". Needs no context."""
    device, parts = c_int(), (c_int(), c_int())
    if driver().cuInit(0) or driver().cuDeviceGet(byref(device), 0):
        raise OSError("there is no GPU")
    for attribute, part in zip((75, 76), parts, strict=True):
        driver().cuDeviceGetAttribute(byref(part), attribute, device)
    return ".".join(str(part.value) for part in parts)


def has_context() -> bool:
    """Whether this thread has a current context. TensorRT would take GPU 0's where it has none, whichever is meant."""
    current = c_void_p()
    return driver().cuCtxGetCurrent(byref(current)) == 0 and bool(current.value)


def capturing(stream: int) -> bool | None:
    """None: there is no such stream."""
    status = c_int()
    return None if driver().cuStreamIsCapturing(stream, byref(status)) else bool(status.value)


def block(pointer: int, size: int) -> int:
    """The serial of the allocation that holds all these bytes; 0 if none does."""
    return int(driver().fake_cuda_block(pointer, size))


def free_memory() -> int:
    free, total = c_size_t(), c_size_t()
    driver().cuMemGetInfo_v2(byref(free), byref(total))
    return free.value


class Memory:
    """Memory of the device that is TensorRT's; goes with this object."""

    def __init__(self, size: int) -> None:
        pointer = c_uint64()
        if status := driver().cuMemAlloc_v2(byref(pointer), size):
            raise MemoryError(f"allocating {size} bytes on the device: status {status}")
        self.start, self.size = pointer.value, size
        weakref.finalize(self, _free, self.start).atexit = False


def _free(start: int) -> None:
    context = c_void_p()
    driver().cuDevicePrimaryCtxRetain(byref(context), 40)
    driver().cuCtxPushCurrent_v2(context)
    status = driver().cuMemFree_v2(start)
    driver().cuCtxPopCurrent_v2(byref(context))
    driver().cuDevicePrimaryCtxRelease_v2(40)
    if status:
        say(Severity.INTERNAL_ERROR, f"an engine or a context went where memory cannot be freed: status {status}")


_waiting: dict[int, tuple[Callable[[], object], bool]] = {}
_numbers = count(1)


@HOST_FUNCTION
def _run(number: int) -> None:
    work, again = _waiting[number]
    try:
        work()
    except Exception as failure:
        say(Severity.INTERNAL_ERROR, f"the GPU: {type(failure).__name__}: {failure}")
        driver().fake_cuda_fail()
    if not again:
        del _waiting[number]


def enqueue(stream: int, work: Callable[[], object], again: bool) -> bool:
    """Let the stream do this in its turn. `again`: a graph that captured it may, any number of times."""
    number = next(_numbers)
    _waiting[number] = work, again
    return not driver().cuLaunchHostFunc(stream, _run, number)
