"""Mamba-1's GPU kernels against the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mdm.plugins.contract import SELECTIVE_SCAN
from mdm.plugins.gpu import torch_launch

AXES = {"L": (17, 1, 16, 20), "N": (16,), "G": (1, 2), "B": (1, 2)}
SIZES = {"B": 1, "L": 35, "D": 48, "G": 1, "N": 16}


def test_one_launch(hold_kernels: Any) -> None:
    hold_kernels(SELECTIVE_SCAN, "one launch", AXES)


@pytest.mark.usefixtures("short_segments")
def test_segments(hold_kernels: Any) -> None:
    hold_kernels(SELECTIVE_SCAN, "segments", AXES | {"L": (48, 35)}, every=3)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.usefixtures("short_segments")
def test_what_is_masked_leaves_no_trace(make: Any, multiprocessors: int) -> None:
    inputs = make(SELECTIVE_SCAN, SIZES, 15, "bfloat16")
    off = inputs["mask"] == 0
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in ("u", "delta", "Bm"):
        changed[name][off] = 7.0
    one, other = (
        torch_launch.run(SELECTIVE_SCAN, given, multiprocessors=multiprocessors) for given in (inputs, changed)
    )
    assert torch.equal(one[~off], other[~off])
    assert not torch.equal(one[off], other[off])  # u through D


def test_absent_inputs_are_not_read(make: Any) -> None:
    inputs = make(SELECTIVE_SCAN, SIZES, 0, "float32")
    plan = torch_launch.plan_of(SELECTIVE_SCAN, inputs)
    expected = torch_launch.run_plan(plan, inputs, torch.empty_like(inputs["u"]))
    full = make(SELECTIVE_SCAN, SIZES, 15, "float32")
    poison = {name: torch.full_like(value, torch.nan) for name, value in full.items()}
    poison["states"] = torch.full((1, 48, 16), torch.nan)
    assert torch.equal(torch_launch.run_plan(plan, poison | inputs, torch.empty_like(inputs["u"])), expected)
