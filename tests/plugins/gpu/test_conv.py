"""The short convolution's GPU kernel against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mdm.plugins.contract import SHORT_CONV
from mdm.plugins.gpu import torch_launch
from mdm.plugins.gpu.torch_launch import LIMITS

SIZES = {"B": 1, "L": 35, "D": 48, "K": 4}


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_against_the_definition(K: int, dtype: str, make: Any, error_of: Any, figure: Any) -> None:
    """Sequences shorter than the taps, of a block, and past its edge; channels past a block of 128."""
    worst = 0.0
    for turn, L in enumerate((1, 2, 3, 16, 17, 35)):
        inputs = make(SHORT_CONV, {"B": 1 + turn % 2, "L": L, "D": (16, 144, 128)[turn % 3], "K": K}, turn % 2, dtype)
        worst = max(worst, error_of(SHORT_CONV, inputs, torch_launch.run(SHORT_CONV, inputs)))
    figure(f"short_conv, GPU kernel, {K} taps, {dtype}", worst, LIMITS[dtype])


def test_it_sees_the_past_alone(make: Any) -> None:
    """A token changes its own result and the next three, in its own channel and sample."""
    inputs = make(SHORT_CONV, SIZES | {"B": 2}, 1, "float32")
    before = torch_launch.run(SHORT_CONV, inputs)
    inputs["x"][1, 14, 5] += 1.0
    changed = (torch_launch.run(SHORT_CONV, inputs) != before).nonzero().tolist()
    assert changed == [[1, token, 5] for token in (14, 15, 16, 17)]


def test_an_absent_bias_is_not_read(make: Any) -> None:
    inputs = make(SHORT_CONV, SIZES, 0, "float32")
    plan = torch_launch.plan_of(SHORT_CONV, inputs)
    expected = torch_launch.run_plan(plan, inputs, torch.empty_like(inputs["x"]))
    poison = {"bias": torch.full((48,), torch.nan)}
    assert torch.equal(torch_launch.run_plan(plan, poison | inputs, torch.empty_like(inputs["x"])), expected)
