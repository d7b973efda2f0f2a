"""A stand-in for the NVIDIA driver."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mdm.tools import gpus

DRIVER = """
#include <cstring>
extern "C" {
int cuInit(unsigned) { return STATUS; }
int cuGetErrorString(int, const char** said) { *said = "no CUDA-capable device is detected"; return 0; }
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGetName(char* name, int size, int n) { std::strncpy(name, n ? "Second" : "First", size); return 0; }
int cuDeviceGetAttribute(int* value, int what, int device) { *value = what == 75 ? 9 : device; return 0; }
int cuDeviceTotalMem_v2(unsigned long* bytes, int) { *bytes = 150000000000ul; return 0; }
}
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """driver(status): an NVIDIA driver with two GPUs, whose cuInit returns the status."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")

    def make(status: int) -> None:
        library = tmp_path / f"libcuda{status}.so"
        command = [compiler, f"-DSTATUS={status}", "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
        subprocess.run(command, input=DRIVER, text=True, check=True)
        monkeypatch.setattr(gpus, "CUDA", str(library))

    return make
