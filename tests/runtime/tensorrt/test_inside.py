"""The backend with a stand-in for TensorRT, whose engines compute by ONNX Runtime's CPU on a fake driver's memory: what
the real ones forbid fails there. The tests are in `inside/`; they run in one process that has the stand-in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")


def test_inside(stand_in: dict[str, str], tmp_path: Path) -> None:
    files = sorted(map(str, INSIDE.glob("check_*.py")))
    assert files
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--basetemp", str(tmp_path), *files],
        env={**stand_in, "XDG_CACHE_HOME": str(tmp_path / "caches")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout
