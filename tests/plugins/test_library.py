"""Finding and registering the native library, and what is said where that fails."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import onnxruntime
import pytest

from mdm.plugins import cpu_library_path, library, register
from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.functions import operator_model
from mdm.tools.bench.operator_inputs import operator_inputs

SIZES = {"B": 1, "L": 3, "H": 2, "P": 4, "N": 5, "G": 1}


def test_registering_twice_is_an_error_at_once() -> None:
    options = onnxruntime.SessionOptions()
    register(options)
    with pytest.raises(InputError, match="registered twice"):
        register(options)
    register(onnxruntime.SessionOptions())  # other options are another matter


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FILE", "nowhere.so")
    with pytest.raises(EnvironmentLackError, match=r"install g\+\+ or clang\+\+") as caught:
        cpu_library_path()
    assert len(str(caught.value).splitlines()) <= 3


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "import onnxruntime; from mdm.plugins import register; register(onnxruntime.SessionOptions())"
    environment = {**os.environ, "MDM_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "MDM_CPU_ISA is 'sse9', which this machine or this build does not have" in done.stderr


def test_a_runtime_that_is_too_old_is_told_so(session: Any) -> None:
    """A made-up ONNX Runtime 1.16: it has API version 1, to make a status with, and no version 17.

    A session of the real one goes on running.
    """
    running, inputs = session(operator_model(SSD_SCAN, 0), native=True), operator_inputs(SSD_SCAN, SIZES, 0)
    said: list[bytes] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda _, text: said.append(text) or 1
    )
    table = (ctypes.c_void_p * 300)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda v: ctypes.addressof(table) if v < 17 else None)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.cast(version, ctypes.c_void_p).value)
    version = ctypes.c_char_p(b"1.16.3")
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    register_custom_ops = ctypes.CDLL(str(cpu_library_path())).RegisterCustomOps
    register_custom_ops.restype = ctypes.c_void_p
    assert register_custom_ops(None, base) == 1
    assert said == [b"mdm: this ONNX Runtime is 1.16.3, expected 1.17 or newer"]
    assert running.run(None, inputs)[0].shape == inputs["x"].shape


def test_plugins_import_neither_torch_nor_onnx() -> None:
    code = "import sys, mdm.plugins; print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_library_needs_no_cpp_runtime() -> None:
    """It runs beside whatever C++ library ONNX Runtime brings."""
    needed = subprocess.run(["readelf", "-d", str(cpu_library_path())], capture_output=True, text=True, check=False)
    if needed.returncode:
        pytest.skip("no readelf here")
    assert "libstdc++" not in needed.stdout


def test_onnx_runtime_reports_to_nobody() -> None:
    """Its Linux builds have telemetry from 1.29 on, which says so where it finds no folder to keep its state in."""
    code = "import mdm.runtime, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    nowhere = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    nowhere |= {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "XDG_STATE_HOME": "/dev/null"}
    run = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
    assert "telemetry" not in run.stderr.lower()
