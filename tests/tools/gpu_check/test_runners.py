"""What the pack's runner hands to the launcher; the launcher itself has tests of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.gpu.driver import Device
from mdm.plugins.gpu.pack import key_of
from mdm.plugins.gpu.variants import KERNELS, Variant, choose, serves, variants
from mdm.tools.gpu_check import runners
from mdm.tools.gpu_check.cases import Case, ssd

CASE = Case(SSD_SCAN, "bfloat16", ssd(1, 1024, 2, 32, 16), has=2)


class Kernels:
    """Writes launches down."""

    def __init__(self, pack: SimpleNamespace, device: Device) -> None:
        self.pack, self.device = pack, device
        self.launches: list[tuple[str, Sequence[int], Sequence[int], int]] = []

    def prepare(self, variants: Sequence[Variant]) -> None:
        pass

    def launch(self, variant: Variant, grid: Sequence[int], arguments: Sequence[int], stream: int) -> None:
        self.launches.append((variant.kernel, grid, arguments, stream))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> runners.PackRunner:
    pack = SimpleNamespace(
        made_by="a test", entries={"a": 0}, entry=lambda variant: SimpleNamespace(key=variant.kernel, images={"90": 0})
    )
    monkeypatch.setattr(runners, "Pack", SimpleNamespace(open=lambda path: pack))
    monkeypatch.setattr(runners, "Kernels", Kernels)
    monkeypatch.setattr(runners, "_stream", lambda: 0x55)
    device = SimpleNamespace(multiprocessors=132, capability=(9, 0))
    return runners.PackRunner(device, Path("some.pack"))  # type: ignore[arg-type]


def test_launches(runner: runners.PackRunner) -> None:
    """Kernel by kernel an absent input has its own buffer; in a program's run, y stands for it."""
    plan = runner.plan(CASE)
    assert plan == choose(SSD_SCAN, "bfloat16", CASE.sizes, 2, 132, (9, 0))
    names = {
        name
        for launch in plan.launches
        for name, type_, _ in KERNELS[launch.variant.kernel].arguments
        if type_[0] == "*"
    }
    buffers = {name: torch.zeros(1) for name in sorted(names)}
    pointers = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    kept = runner._loaded.launches  # type: ignore[attr-defined]
    for way, D in ((runner.launch, "D"), (runner.run, "y")):
        way(plan, buffers)
        assert [kernel for kernel, *_ in kept] == ["ssd_segment_states", "carry_states", "ssd_scan"]
        kernel, grid, arguments, stream = kept[-1]
        given = dict(zip((name for name, _, _ in KERNELS[kernel].arguments), arguments, strict=True))
        assert (grid, stream) == (plan.launches[-1].grid, 0x55)
        assert (given["D"], given["z"], given["states"]) == (pointers[D], pointers["z"], pointers["states"])
        assert (given["L"], given["has"]) == (1024, 2 + 16)
        kept.clear()


def test_names(runner: runners.PackRunner) -> None:
    assert runner.name == "the pack some.pack (a test)"
    assert runner.kernels == {"a"}
    assert runner.prepare(runner.plan(CASE).launches[0].variant) == "sm_90"


def test_sources_of_one_architecture() -> None:
    here = runners.SourceRunner("cpu", 132, (9, 0))
    assert here.kernels == {key_of(variant) for variant in variants() if serves(variant, (9, 0))}
    assert here.kernels < {*map(key_of, variants())}
