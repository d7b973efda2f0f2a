"""For TensorRT's tests: the rig, a builder for a machine with no GPU (tests/rig/setup), in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def in_rig(rig: dict[str, str]) -> Callable[..., list[dict[str, Any]]]:
    """in_rig(jobs, plugins=True): what TensorRT says of each model; see rig_child.py. `fails`: how the process ends."""

    def ask(jobs: list[dict[str, Any]], plugins: bool = True, fails: str = "") -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("rig_child.py"))],
            input=json.dumps({"plugins": plugins, "jobs": jobs}), text=True, capture_output=True, env=rig,
            check=False,
        )  # fmt: skip
        if fails:
            assert fails in done.stderr
            return []
        assert done.returncode == 0, done.stderr[-2000:]
        return list(json.loads(done.stdout))

    return ask
