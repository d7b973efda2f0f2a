"""Runs the Triton kernels themselves on torch tensors: on the CPU in Triton's interpreter, else compiled, on a GPU.

    os.environ["TRITON_INTERPRET"] = "1"             # before Triton is imported
    y = run(SSD_SCAN, {"x": x, "dt": dt, "A": A, "Bm": Bm, "C": C})

For tests and for tuning; a program runs the kernel pack, which needs neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdm.plugins.contract import Operator
from mdm.plugins.gpu.variants import KERNELS, Launch, Plan, choose

# What the kernels are held to, of max |error| / max |value|. Half types: y is rounded once, and the operands of the
# products before.
LIMITS = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}


def run(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    multiprocessors: int | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """y, by the plan for this GPU or for the one described; on the CPU that is an H200 unless it is described."""
    first = inputs[operator.inputs[0].name]
    y = torch.empty_like(first)
    return run_plan(plan_of(operator, inputs, multiprocessors, capability), inputs, y)


def plan_of(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    multiprocessors: int | None = None,
    capability: tuple[int, int] | None = None,
) -> Plan:
    first = inputs[operator.inputs[0].name]
    if first.is_cuda:
        properties = torch.cuda.get_device_properties(first.device)
        multiprocessors = multiprocessors or properties.multi_processor_count
        capability = capability or (properties.major, properties.minor)
    present = [spec for spec in operator.inputs if spec.name in inputs]
    sizes = {letter: size for spec in present for letter, size in zip(spec.dims, inputs[spec.name].shape, strict=True)}
    has = sum(spec.bit for spec in present)
    dtype = str(first.dtype).removeprefix("torch.")
    return choose(operator, dtype, sizes, has, multiprocessors or 132, capability or (9, 0))


def run_plan(plan: Plan, inputs: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """Run every launch on these inputs, contiguous as in the contract."""
    scratch = {name: torch.full(shape, torch.nan, device=y.device) for name, shape in plan.scratch.items()}
    for launch in plan.launches:
        run_launch(launch, {**inputs, **scratch, "y": y})
    return y


def run_launch(launch: Launch, buffers: Mapping[str, Tensor]) -> None:
    variant, kernel = launch.variant, KERNELS[launch.variant.kernel]
    if not buffers["y"].is_cuda:
        _mend_interpreter()
    arguments = [
        # Whatever stands for an absent input is not read.
        buffers.get(name, buffers["y"]) if type_.startswith("*") else launch.numbers[name]
        for name, type_, _ in kernel.arguments
    ]
    function = getattr(import_module(kernel.module), variant.kernel)
    function[launch.grid](*arguments, **variant.constants, num_warps=variant.warps, num_stages=variant.stages)


@cache
def _mend_interpreter() -> None:
    """Triton 3.9's interpreter cuts bfloat16 off instead of rounding it, and multiplies matrices of it as the integers
    that their bits spell. A GPU does neither."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)
        return cast(self, source, to)

    def float_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *more)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, float_dot
