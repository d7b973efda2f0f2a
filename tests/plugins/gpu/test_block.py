"""Whole networks whose scans are the GPU kernels: norm, modulation, scan orders, projections and convolution around
them, in both families, against the same network in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mdm.plugins.contract import SELECTIVE_SCAN, SSD_SCAN, Operator
from mdm.plugins.gpu import torch_launch
from mdm.reference import mixer
from mdm.reference.backbone import Backbone
from mdm.reference.config import config_from_dict

# Kernels hold a state of 16 and heads of 32.
SIZES: dict[str, Any] = {"width": 48, "blocks": 3, "state": 16}
CASES: dict[str, tuple[Operator, dict[str, Any]]] = {
    "mamba1": (SELECTIVE_SCAN, {**SIZES, "family": "dim"}),
    "mamba2": (SSD_SCAN, {**SIZES, "head": 32}),
    "mamba2, groups, parallel": (SSD_SCAN, {**SIZES, "head": 32, "width": 64, "groups": 2, "scan": "parallel"}),
}


def by_kernel(operator: Operator, calls: list[int], **gpu: Any) -> Any:
    """The operator as the reference calls it, by the kernels."""

    def scan(*required: Tensor, chunk_size: int = 0, **optional: Tensor | None) -> Tensor:
        given = dict(zip((spec.name for spec in operator.required), required, strict=True)) | optional
        inputs = {name: value.detach().contiguous() for name, value in given.items() if value is not None}
        plan = torch_launch.plan_of(operator, inputs, **gpu)
        calls.append(len(plan.launches))
        return torch_launch.run_plan(plan, inputs, torch.empty_like(inputs[operator.inputs[0].name]))

    return scan


@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["one launch", "segments"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("short_segments")
@torch.no_grad()
def test_networks(
    name: str, multiprocessors: int, tiny: Any, figure: Any, off: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, fields = CASES[name]
    config = config_from_dict(tiny(**fields))
    torch.manual_seed(0)
    network = Backbone(config)
    tokens, E = config.side, config.width
    image = torch.randn(2, tokens, tokens, E)
    text = torch.randn(2, 20, E) if config.text_lengths else None
    masks = {} if text is None else {
        "text_mask": (torch.rand(2, 20) < 0.7).float(), "image_mask": (torch.rand(2, tokens, tokens) < 0.7).float()
    }  # fmt: skip
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([0, 2])

    def shown(network: Backbone, dtype: torch.dtype) -> list[Tensor]:
        given = {name: mask.to(dtype) for name, mask in masks.items()}
        return [
            out for out in network(None if text is None else text.to(dtype), image.to(dtype), t, y, **given)
            if out is not None
        ]  # fmt: skip

    truth = shown(copy.deepcopy(network).double(), torch.float64)
    plain = shown(network, torch.float32)
    calls: list[int] = []
    monkeypatch.setattr(mixer, operator.torch_name, by_kernel(operator, calls, multiprocessors=multiprocessors))
    found = shown(network, torch.float32)
    assert max(calls) == (1 if multiprocessors == 1 else 3)  # a text-only mixer may see too few tokens
    assert len(calls) >= config.blocks
    error, floor = (
        max(float(off(mine.numpy(), right.numpy())) for mine, right in zip(outs, truth, strict=True))
        for outs in (found, plain)
    )
    form = "one launch" if multiprocessors == 1 else "segments"
    # 4 times the noise of the reference in float32.
    figure(f"{name} through the GPU kernels, {form}", error, 4 * floor)
