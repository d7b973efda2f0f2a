"""Runs the kernels of a pack on one GPU, through the driver library alone.

    kernels = Kernels(Pack.open(path), Device(Driver()))
    kernels.prepare(variants)                                    # loads; the rest only launches
    kernels.launch(variant, (blocks, 1, 1), [x, y, n, 0.5], stream)

After `prepare` a launch allocates nothing on the GPU and waits for nothing, so it may be captured into a CUDA graph.
Arguments are pointers and numbers in the index's order; Triton's scratch pointers are not among them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.plugins.gpu.driver import DYNAMIC_SHARED, Device
from mdm.plugins.gpu.pack import PTX, Argument, Entry, Pack, architecture, key_of
from mdm.plugins.gpu.variants import Variant

GRID_LIMIT = (2**31 - 1, 65535, 65535)  # CUDA's, on every architecture
# Each argument gets 8 bytes. What a kind takes, as struct writes it, and what it may be.
FORMATS = {"pointer": "Q", "i32": "i4x", "f32": "f4x", "scratch": "Q"}
TYPES: dict[str, tuple[type, ...]] = {"pointer": (int,), "i32": (int,), "f32": (float, int)}


@dataclass(frozen=True)
class Loaded:
    """An entry's function on this device."""

    entry: Entry
    architecture: str
    function: int
    shared: int
    given: tuple[Argument, ...]  # the arguments a caller gives
    layout: struct.Struct


class Kernels:
    """Modules and functions are loaded once and stay as long as the device's context."""

    def __init__(self, pack: Pack, device: Device) -> None:
        self.pack, self.device = pack, device
        self._loaded: dict[str, Loaded] = {}
        self._lock = Lock()

    def prepare(self, variants: Iterable[Variant]) -> None:
        """Load what will be launched. Before a capture this is a must: loading within one breaks it."""
        for variant in variants:
            self._find(variant)

    def launch(self, variant: Variant, grid: Sequence[int], arguments: Sequence[int | float], stream: int = 0) -> None:
        loaded = self._find(variant)
        values = self._packed(loaded, grid, arguments)
        start, count = ctypes.addressof(values), len(loaded.entry.arguments)
        addresses = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        threads = 32 * loaded.entry.warps
        with self.device.current():
            try:
                self.device.driver.launch(loaded.function, grid, threads, loaded.shared, stream, addresses)
            except EngineError as error:
                raise EngineError(
                    f"the kernel '{loaded.entry.key}' ({_image(loaded.architecture)}) failed to launch\n{error}\n"
                    f"with {_shapes(loaded, grid, arguments)}"
                ) from error

    def _find(self, variant: Variant) -> Loaded:
        key = key_of(variant)
        if key not in self._loaded:
            with self._lock:
                if key not in self._loaded:
                    self._loaded[key] = self._load(self.pack.entry(variant))
        return self._loaded[key]

    def _load(self, entry: Entry) -> Loaded:
        name, driver = architecture(entry, self.device.capability), self.device.driver
        image, shared = self.pack.read(entry, name), entry.images[name].shared
        if shared > self.device.shared_limit:
            raise EnvironmentLackError(
                f"the kernel '{entry.key}' ({_image(name)}) needs more shared memory than {self.device.name} has\n"
                f"found {self.device.shared_limit} bytes for a block, expected {shared}\nchoose another variant"
            )
        with self.device.current():
            module = 0
            try:
                module = driver.handle("cuModuleLoadData", image)
                function = driver.handle("cuModuleGetFunction", module, entry.symbol.encode())
                driver.call("cuFuncSetAttribute", function, DYNAMIC_SHARED, shared)
            except EngineError as error:
                if module:
                    with suppress(EngineError):  # the first failure is the one to tell
                        driver.call("cuModuleUnload", module)
                raise EngineError(
                    f"the kernel '{entry.key}' ({_image(name)}) cannot be loaded on {self.device.name}\n{error}\n"
                    f"the driver serves CUDA {driver.version()}: a newer one may load it"
                ) from error
        given = tuple(a for a in entry.arguments if a.kind != "scratch")
        layout = struct.Struct("<" + "".join(FORMATS[a.kind] for a in entry.arguments))
        return Loaded(entry, name, function, shared, given, layout)

    def _packed(
        self, loaded: Loaded, grid: Sequence[int], arguments: Sequence[int | float]
    ) -> ctypes.Array[ctypes.c_char]:
        """The arguments as the kernel takes them, once they are what it was compiled for."""
        where = f"the kernel '{loaded.entry.key}' ({_image(loaded.architecture)})"
        if len(arguments) != len(loaded.given):
            names = ", ".join(a.name for a in loaded.given)
            raise InputError(
                f"{where}: wrong number of arguments\nfound {len(arguments)}, expected {len(loaded.given)}: {names}"
            )
        for argument, value in zip(loaded.given, arguments, strict=True):
            if type(value) not in TYPES[argument.kind]:
                raise InputError(
                    f"{where}: argument '{argument.name}' has the wrong type\n"
                    f"found {type(value).__name__}, expected {argument.kind}"
                )
            if argument.kind == "pointer" and not value:
                raise InputError(
                    f"{where}: argument '{argument.name}' is null, with {_shapes(loaded, grid, arguments)}"
                )
            if argument.divisor > 1 and value % argument.divisor:
                found = f"{value:#x}" if argument.kind == "pointer" else value
                raise InputError(
                    f"{where}: argument '{argument.name}' is misaligned, with {_shapes(loaded, grid, arguments)}\n"
                    f"found {found}, expected a multiple of {argument.divisor}"
                )
        if len(grid) != 3 or not all(0 < size <= most for size, most in zip(grid, GRID_LIMIT, strict=True)):
            raise InputError(
                f"{where}: impossible grid\nfound {tuple(grid)}, expected three sizes from 1 to {GRID_LIMIT}"
            )
        # The scratch pointers come last, and are null: the build refuses kernels that use them.
        values = (*arguments, *[0] * (len(loaded.entry.arguments) - len(loaded.given)))
        try:
            return ctypes.create_string_buffer(loaded.layout.pack(*values), loaded.layout.size)
        except (struct.error, OverflowError) as error:
            raise InputError(
                f"{where}: an argument is too large for its type\nfound {_shapes(loaded, grid, arguments)}\n{error}"
            ) from error


def _image(architecture: str) -> str:
    return "PTX" if architecture == PTX else f"sm_{architecture}"


def _shapes(loaded: Loaded, grid: Sequence[int], arguments: Sequence[int | float]) -> str:
    numbers = (f"{a.name} {v}" for a, v in zip(loaded.given, arguments, strict=True) if a.kind != "pointer")
    return ", ".join((f"grid {tuple(grid)}", *numbers))
