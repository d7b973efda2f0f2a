"""One GPU as the backend uses it: memory, one stream, and captures of what is put on that stream.

Everything happens in the order of the stream. `wait` and `pull` wait, and so does what frees memory. One thread at a
time has the GPU, so what another thread does is never caught in a capture. Memory is given back between runs, not when
Python happens to drop it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import EngineError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.runtime.backend import Array

ALIGNED = 256  # bytes, as TensorRT wants its tensors


class _Held:
    """What a GPU's user has of it. The last of Gpu and its memory gives it all back.

    But for the context: TensorRT's objects may go after this one, and need it. The driver takes it when the process
    ends.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.dropped: list[tuple[Callable[[int], None], int]] = []  # how to free, and what
        self.scratch: list[int] = []  # one or none
        self.events: list[int] = []  # that nobody waits for
        self.stream = 0
        with device.current():
            self.stream = device.driver.create_stream()

    def drop(self, free: Callable[[int], None], handle: int) -> None:
        self.dropped.append((free, handle))

    def free(self) -> None:
        self.device.driver.synchronize(self.stream)
        while self.dropped:
            free, handle = self.dropped.pop()
            free(handle)

    def __del__(self) -> None:
        if sys.is_finalizing() or not self.stream:
            return
        driver = self.device.driver
        self.dropped += [(driver.free, pointer) for pointer in self.scratch]
        self.dropped += [(driver.destroy_event, event) for event in self.events]
        with suppress(EngineError), self.device.current():  # a GPU that failed frees nothing any more
            self.free()
            driver.destroy_stream(self.stream)


class Gpu:
    def __init__(self, number: int = 0) -> None:
        self.driver = Driver()
        self.device = Device(self.driver, number)
        self._lock = RLock()
        self._held = _Held(self.device)
        self.stream = self._held.stream
        self.scratch_size = 0

    @contextmanager
    def mine(self) -> Iterator[None]:
        """This thread has the GPU."""
        with self._lock, self.device.current():
            yield

    def mark(self) -> int:
        """All that is on the stream by now: for `wait`, once. To wait for the stream itself would break the capture
        that another thread has begun on it."""
        events = self._held.events
        event = events.pop() if events else self.driver.create_event()
        self.driver.record(event, self.stream)
        return event

    def wait(self, event: int) -> None:
        """Until that is done. Others may put more on the stream meanwhile."""
        with self.device.current():
            self.driver.wait(event)
        self._held.events.append(event)

    # ------------------------------------------------------------------------------------------------------- memory

    def allocate(self, size: int, owner: object) -> int:
        """Device memory that lives as long as its owner."""
        self.sweep()
        pointer = self.driver.allocate(size)
        self.drop_with(owner, self.driver.free, pointer)
        return pointer

    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Zeros in host memory that the GPU copies from and to by itself."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        pointer = self.driver.allocate_host(max(1, size))
        memory = (ctypes.c_ubyte * size).from_address(pointer)
        self.drop_with(memory, self.driver.free_host, pointer)  # arrays hold on to it
        ctypes.memset(pointer, 0, size)
        return np.ctypeslib.as_array(memory).view(kind).reshape(shape)

    def drop_with(self, owner: object, free: Callable[[int], None], handle: int) -> None:
        """Free it after the owner is gone."""
        weakref.finalize(owner, self._held.drop, free, handle).atexit = False

    def sweep(self) -> None:
        """Free what was dropped: not while a capture goes on, and not before the stream is done with it."""
        if self._held.dropped:
            with self.mine():
                self._held.free()

    def scratch(self, size: int) -> int:
        """Memory for what a run needs only while it runs: one piece for all, since no two run at once. It moves when
        it grows, which `scratch_size` shows."""
        held = self._held.scratch
        if size > self.scratch_size:
            while held:
                self._held.drop(self.driver.free, held.pop())
            self.scratch_size = 0
            self.sweep()
            held.append(self.driver.allocate(size))
            self.scratch_size = size
        return held[0] if held else 0

    def memory_in_use(self) -> int:
        """Bytes of the whole device, whoever has them."""
        with self.device.current():
            free, total = self.driver.memory()
        return total - free

    # ------------------------------------------------------------------------------------------------------- captures

    def capture(self, launch: Callable[[], None]) -> int:
        """What `launch` puts on the stream, recorded and not run: for `replay`, until `free_graph`."""
        self.sweep()
        try:
            self.driver.begin_capture(self.stream)
            launch()
        except BaseException:
            with suppress(EngineError):  # the capture is broken: this says so again
                self.driver.free_graph(self.driver.end_capture(self.stream))
            raise
        return self.driver.end_capture(self.stream)


class GpuBuffer:
    """A tensor on the GPU, and its copy on this side, which copies go from and to in the order of the stream."""

    def __init__(self, gpu: Gpu, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self._gpu = gpu
        with gpu.mine():
            self.host = gpu.pinned(shape, dtype)
            self.pointer = gpu.allocate(max(1, self.host.nbytes), self)
            gpu.driver.clear(self.pointer, self.host.nbytes, gpu.stream)

    def push(self) -> None:
        with self._gpu.mine():
            self._gpu.driver.upload_later(self.pointer, self.host.ctypes.data, self.host.nbytes, self._gpu.stream)

    def pull(self) -> None:
        with self._gpu.mine():
            self._gpu.driver.download_later(self.host.ctypes.data, self.pointer, self.host.nbytes, self._gpu.stream)
            done = self._gpu.mark()
        self._gpu.wait(done)

    def address(self, row: int) -> int:
        return self.pointer + row * self.host.strides[0]
