"""Memory that shows what a kernel must not do: guards before and behind every tensor, and NaN where nothing is given.

All of it is filled with bytes of 255, which are NaN in every float type. So a read beyond a tensor, of an absent input
or of scratch that nothing wrote puts NaN into y, and a write beyond y or scratch changes a guard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from mdm.plugins.gpu.variants import Plan
from mdm.tools.bench.operator_inputs import operator_inputs
from mdm.tools.gpu_check.cases import Case

# Under compute-sanitizer: every tensor has an allocation of its own, and memcheck sees what goes beyond it.
ALONE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
GUARD = 256 if ALONE in os.environ else 1 << 16  # bytes before and behind; else as much as a row of y and more
FILL = 255


class Guarded:
    """One tensor between its guards."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
        size = prod(shape) * dtype.itemsize
        self._memory = torch.full((GUARD + size + GUARD,), FILL, dtype=torch.uint8, device=device)
        self.tensor = self._memory[GUARD : GUARD + size].view(dtype).view(*shape)

    @classmethod
    def holding(cls, values: Tensor, device: str) -> Guarded:
        made = cls(values.shape, values.dtype, device)
        made.tensor.copy_(values)
        return made

    def refill(self) -> None:
        self._memory.fill_(FILL)

    def spoiled(self) -> str:
        """Where a guard was written to, or nothing."""
        before, behind = (
            (guard != FILL).nonzero() for guard in (self._memory[:GUARD], self._memory[len(self._memory) - GUARD :])
        )
        places = [f"{GUARD - int(before[0])} bytes before its start"] if len(before) else []
        return " and ".join([*places, f"{int(behind[0])} bytes behind its end"] if len(behind) else places)


def inputs_of(case: Case) -> dict[str, Tensor]:
    """The present inputs, on the CPU."""
    arrays = operator_inputs(case.operator, case.sizes, case.has, "float32", case.decay)
    return {
        spec.name: torch.from_numpy(arrays[spec.name]).to(getattr(torch, case.dtype if spec.activation else "float32"))
        for spec in case.operator.present(case.has)
    }


def absent_of(case: Case, device: str) -> dict[str, Guarded]:
    """NaN in place of the inputs that are not there."""
    return {
        spec.name: Guarded(
            [case.sizes[letter] for letter in spec.dims],
            getattr(torch, case.dtype) if spec.activation else torch.float32,
            device,
        )
        for spec in case.operator.present(case.operator.has_all)
        if spec.bit & ~case.has
    }


def scratch_of(plan: Plan, device: str) -> dict[str, Guarded]:
    return {name: Guarded(shape, torch.float32, device) for name, shape in plan.scratch.items()}


def tensors(buffers: Mapping[str, Guarded]) -> dict[str, Tensor]:
    return {name: buffer.tensor for name, buffer in buffers.items()}
