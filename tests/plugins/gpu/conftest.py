"""For the GPU kernels: Triton's interpreter, which runs them on the CPU, and the cases they are tried on.

Where a GPU is, set MDM_TEST_GPU: the same tests then run the compiled kernels on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

# Triton reads it when it is imported; the build's own processes set it back.
if "MDM_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm.plugins.contract import Operator
from mdm.plugins.gpu import torch_launch
from mdm.plugins.gpu.torch_launch import LIMITS
from mdm.tools.bench.operator_inputs import operator_inputs

DEVICE = "cuda" if "MDM_TEST_GPU" in os.environ else "cpu"
# With "slow" the state outlives segments.
DECAYS = ("slow", "typical", "strong", "none", "zero step")
Inputs = dict[str, Tensor]


def tensors(operator: Operator, sizes: dict[str, int], has: int, dtype: str, decay: str = "typical") -> Inputs:
    arrays = operator_inputs(operator, sizes, has, "float32", decay)
    if decay == "slow":
        arrays["A"] = arrays["A"] * 0.02
    activations = {spec.name for spec in operator.inputs if spec.activation}
    return {
        name: torch.from_numpy(array).to(getattr(torch, dtype) if name in activations else torch.float32).to(DEVICE)
        for name, array in arrays.items()
    }


@pytest.fixture(scope="session")
def make() -> Callable[..., Inputs]:
    return tensors


@pytest.fixture(scope="session")
def error_of(exact: Any, off: Any) -> Callable[[Operator, Inputs, Tensor], float]:
    """The error of y against the float64 recurrence, relative to the largest value."""

    def error(operator: Operator, inputs: Inputs, y: Tensor) -> float:
        arrays: dict[str, NDArray[Any]] = {name: value.float().cpu().numpy() for name, value in inputs.items()}
        return float(off(y.float().cpu().numpy().astype(np.float64), exact(operator, arrays)))

    return error


@pytest.fixture
def hold_kernels(error_of: Any, figure: Any) -> Callable[..., None]:
    """hold_kernels(operator, name, axes, every=1, **gpu): every `has` or every third, with the values of the axes, of
    types and of decays turning at paces of their own, so that most pairs of values meet."""

    def hold(operator: Operator, name: str, axes: dict[str, tuple[int, ...]], every: int = 1, **gpu: Any) -> None:
        worst = dict.fromkeys(LIMITS, 0.0)
        for turn, has in enumerate(range(0, 16, every)):
            sizes = {
                axis: values[turn // (1 + place) % len(values)] for place, (axis, values) in enumerate(axes.items())
            }
            sizes |= {"H": 2 * sizes["G"], "D": 48 * sizes["G"]}
            dtype, decay = tuple(LIMITS)[turn % 3], DECAYS[turn % 5]
            inputs = tensors(operator, sizes, has, dtype, decay)
            error = error_of(operator, inputs, torch_launch.run(operator, inputs, **gpu))
            assert error <= LIMITS[dtype], f"{sizes}, has {has}, {dtype}, {decay}: {error:.3g}"
            worst[dtype] = max(worst[dtype], error)
        for dtype, error in worst.items():
            figure(f"{operator.torch_name}, GPU kernel, {name}, {dtype}", error, LIMITS[dtype])

    return hold
