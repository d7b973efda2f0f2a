"""Mamba-2's GPU kernels against the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.gpu import torch_launch

AXES = {"L": (70, 17, 64, 1, 33), "N": (16, 128, 64, 32), "P": (64, 32), "G": (1, 2), "B": (1, 2)}
SIZES = {"B": 1, "L": 70, "H": 2, "P": 64, "G": 1, "N": 16}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("narrow", {}),
        ("wide", {"multiprocessors": 1, "every": 3}),
        ("small chunks", {"capability": (8, 0), "every": 2}),
    ],
)
def test_one_launch(hold_kernels: Any, name: str, gpu: dict[str, Any]) -> None:
    hold_kernels(SSD_SCAN, name, AXES, **gpu)


@pytest.mark.usefixtures("short_segments")
def test_segments(hold_kernels: Any) -> None:
    hold_kernels(SSD_SCAN, "segments", AXES | {"L": (70, 49), "N": (16, 128, 64)}, every=2)


def test_a_weak_decay_behind_a_strong_one(make: Any, error_of: Any, figure: Any) -> None:
    """After one token that ends all memory come weak ones, which the memory of what follows hangs on."""
    inputs = make(SSD_SCAN, SIZES, 0, "float32")
    inputs["dt"][:] = -4.0
    inputs["dt"][:, 3] = 3000.0  # a log decay of -48000: float32 keeps 0.004 of it
    inputs["x"][:, 3] = 0.0  # else its own output, 3000 times the others', hides them
    inputs["A"][:] = -16.0
    figure(
        "ssd_scan, weak decays behind a strong one",
        error_of(SSD_SCAN, inputs, torch_launch.run(SSD_SCAN, inputs)),
        1e-6,
    )

    step = torch.nn.functional.softplus(inputs["dt"][0, :64, 0])
    total = (step * -16.0).cumsum(0)
    true = (step * -16.0).double().cumsum(0)
    lost = (total[-1] - total[4]).double() - (true[-1] - true[4])
    assert lost.abs() > 1e-3, "the case would not find float32 sums"


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.usefixtures("short_segments")
def test_what_is_masked_leaves_no_trace(make: Any, multiprocessors: int) -> None:
    inputs = make(SSD_SCAN, SIZES, 15, "bfloat16")
    off = inputs["mask"] == 0
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in ("x", "dt", "Bm"):
        changed[name][off] = 7.0
    one, other = (torch_launch.run(SSD_SCAN, given, multiprocessors=multiprocessors) for given in (inputs, changed))
    assert torch.equal(one[~off], other[~off])
    assert not torch.equal(one[off], other[off])  # x through D


def test_absent_inputs_are_not_read(make: Any) -> None:
    inputs = make(SSD_SCAN, SIZES, 0, "float32")
    plan = torch_launch.plan_of(SSD_SCAN, inputs)
    expected = torch_launch.run_plan(plan, inputs, torch.empty_like(inputs["x"]))
    poison = {name: torch.full_like(value, torch.nan) for name, value in make(SSD_SCAN, SIZES, 15, "float32").items()}
    poison["states"] = torch.full((1, 2, 16, 64), torch.nan)
    assert torch.equal(torch_launch.run_plan(plan, poison | inputs, torch.empty_like(inputs["x"])), expected)
