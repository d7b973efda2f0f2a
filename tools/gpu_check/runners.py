"""What runs a plan: the shipped pack through the driver library, or the Triton sources themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mdm.plugins.errors import EnvironmentLackError
from mdm.plugins.gpu import torch_launch
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.pack import PTX, Pack, architecture, key_of
from mdm.plugins.gpu.scan import Scans
from mdm.plugins.gpu.variants import KERNELS, Plan, Variant, choose, serves, variants
from mdm.tools.gpu_check.cases import Case

Buffers = Mapping[str, Tensor]


class Runner(Protocol):
    name: str
    device: str  # torch's word
    kernels: frozenset[str]  # the keys of all that there are

    def plan(self, case: Case) -> Plan:
        """This GPU's own."""

    def prepare(self, variant: Variant) -> str:
        """Load or compile -> the image it runs from."""

    def launch(self, plan: Plan, buffers: Buffers) -> None:
        """Kernel by kernel, with a buffer for every pointer: those of absent inputs too."""

    def run(self, plan: Plan, buffers: Buffers) -> None:
        """As a program runs it."""


class PackRunner:
    def __init__(self, device: Device, pack: Path) -> None:
        self._loaded = Kernels(Pack.open(pack), device)
        self._scans = Scans(self._loaded)
        self.name, self.device = f"the pack {pack.name} ({self._loaded.pack.made_by})", "cuda"
        self.kernels = frozenset(self._loaded.pack.entries)

    def plan(self, case: Case) -> Plan:
        return self._scans.plan(case.operator, case.dtype, case.sizes, case.has)

    def prepare(self, variant: Variant) -> str:
        self._loaded.prepare([variant])
        name = architecture(self._loaded.pack.entry(variant), self._loaded.device.capability)
        return "PTX" if name == PTX else f"sm_{name}"

    def launch(self, plan: Plan, buffers: Buffers) -> None:
        for launch in plan.launches:
            arguments = [
                buffers.get(name, buffers["y"]).data_ptr() if type_.startswith("*") else launch.numbers[name]
                for name, type_, _ in KERNELS[launch.variant.kernel].arguments
            ]
            self._loaded.launch(launch.variant, launch.grid, arguments, _stream())

    def run(self, plan: Plan, buffers: Buffers) -> None:
        self._scans.run(plan, {name: buffers[name].data_ptr() for name in plan.pointers}, _stream())


class SourceRunner:
    """Triton compiles on the GPU; on the CPU its interpreter runs the sources."""

    def __init__(self, device: str, multiprocessors: int, capability: tuple[int, int]) -> None:
        self.name, self.device = "the Triton sources", device
        self._gpu = multiprocessors, capability
        self.kernels = frozenset(key_of(variant) for variant in variants() if serves(variant, capability))

    def plan(self, case: Case) -> Plan:
        return choose(case.operator, case.dtype, case.sizes, case.has, *self._gpu)

    def prepare(self, variant: Variant) -> str:
        if key_of(variant) not in self.kernels:
            raise EnvironmentLackError(f"the kernel '{key_of(variant)}' is for other architectures")
        return "source"

    def launch(self, plan: Plan, buffers: Buffers) -> None:
        for launch in plan.launches:
            torch_launch.run_launch(launch, buffers)

    run = launch


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def open_pack(pack: Path) -> PackRunner:
    return PackRunner(Device(Driver()), pack)


def open_sources() -> SourceRunner:
    device = Device(Driver())
    return SourceRunner("cuda", device.multiprocessors, device.capability)
