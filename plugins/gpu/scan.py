"""Our operators on one GPU, by the kernels of a pack.

    scans = Scans(Kernels(Pack.open(SHIPPED), Device(Driver())))
    plan = scans.plan(SSD_SCAN, "bfloat16", sizes, has)                     # loads its kernels
    scans.run(plan, {"x": x, "dt": dt, ..., "y": y}, stream)                # device pointers; a capture may hold it

A plan may ask for scratch buffers, which the caller gives too: `run` allocates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from mdm.plugins.contract import Operator
from mdm.plugins.errors import InputError
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.variants import KERNELS, Launch, Plan, choose


class Scans:
    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def plan(self, operator: Operator, dtype: str, sizes: Mapping[str, int], has: int) -> Plan:
        """How a node of these sizes (the contract's letters) runs on this GPU."""
        device = self.kernels.device
        plan = choose(operator, dtype, sizes, has, device.multiprocessors, device.capability)
        self.kernels.prepare(launch.variant for launch in plan.launches)
        return plan

    def run(self, plan: Plan, pointers: Mapping[str, int], stream: int = 0) -> None:
        """`pointers`: those that the plan names. What is not named is not read, whatever else is given."""
        lacking = [name for name in plan.pointers if name not in pointers]
        if lacking:
            kernel = plan.launches[-1].variant.kernel
            raise InputError(
                f"the kernel '{kernel}' lacks pointers for: {', '.join(lacking)}\n"
                f"found {', '.join(pointers) or 'none'}, expected {', '.join(plan.pointers)}"
            )
        for launch in plan.launches:
            self.kernels.launch(launch.variant, launch.grid, arguments_of(launch, plan, pointers), stream)


def arguments_of(launch: Launch, plan: Plan, pointers: Mapping[str, int]) -> list[int]:
    """In the kernel's order. An absent input gets the pointer of y, which is aligned."""
    return [
        (pointers[name if name in plan.pointers else "y"]) if type_.startswith("*") else launch.numbers[name]
        for name, type_, _ in KERNELS[launch.variant.kernel].arguments
    ]
