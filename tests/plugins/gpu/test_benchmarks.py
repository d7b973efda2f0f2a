"""plugins/BENCHMARKS.md says what the package's commands say."""

from __future__ import annotations

from pathlib import Path

from mdm.plugins.gpu.counts import CHIPS
from mdm.plugins.gpu.pack import SHIPPED, Pack
from mdm.tools.gpu_check.counted import counted

TEXT = (Path(__file__).parents[3] / "plugins/BENCHMARKS.md").read_text()


def test_the_counts_are_the_commands() -> None:
    assert "\n".join(counted(CHIPS["H200"])) in TEXT


def test_the_pack_is_as_described() -> None:
    assert f"the pack: {len(Pack.open(SHIPPED).entries)} kernels" in TEXT
    assert f"| {SHIPPED.stat().st_size / 1e6:.1f} MB," in TEXT
