"""The native CPU library of our operators: where it is, what it runs on, how ONNX Runtime gets it.

options = onnxruntime.SessionOptions()
register(options)          # before the session is made
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mdm.plugins.errors import EnvironmentLackError, InputError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

FILE = "libmdm_ort_cpu.so"
REGISTERED = "mdm.scan_library"  # config entry of session options that have the library
INSTRUCTION_SETS = ("avx512", "avx2", "portable")  # best first; MDM_CPU_ISA names one


def cpu_library_path() -> Path:
    """The library of this installation."""
    path = Path(str(files("mdm.plugins") / FILE))  # an editable install keeps it apart from the sources
    if not path.is_file():
        raise EnvironmentLackError(
            "The native scan library was not built: no C++ compiler was found when mdm-deploy was installed.\n"
            "Models run without it, several times slower, by the function bodies in their files.\n"
            "To build it: install g++ or clang++, then install mdm-deploy again."
        )
    return path


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.mdm_instruction_set.restype = ctypes.c_char_p
    library.mdm_multiply_add.restype = ctypes.c_double
    library.mdm_multiply_add.argtypes = [ctypes.c_int64]
    return library


def instruction_set() -> str:
    """The instruction set the kernels of this process use: the machine's best, or what MDM_CPU_ISA asks for."""
    name: bytes | None = _library(cpu_library_path()).mdm_instruction_set()
    if name is None:
        raise InputError(
            f"MDM_CPU_ISA is '{os.environ.get('MDM_CPU_ISA')}', which this machine or this build does not have\n"
            f"expected one of: {', '.join(INSTRUCTION_SETS)}, as far as the machine goes"
        )
    return name.decode()


def multiply_adds(rounds: int) -> float:
    """Run that many rounds of multiply-adds of floats in registers on this thread -> how many there were."""
    return float(_library(cpu_library_path()).mdm_multiply_add(rounds))


def register(session_options: SessionOptions) -> None:
    """Give the sessions made with these options the native operators."""
    path = cpu_library_path()
    instruction_set()
    try:
        session_options.get_session_config_entry(REGISTERED)
    except RuntimeError:
        pass  # no such entry: not registered yet
    else:
        # ONNX Runtime itself would only complain when a session is made, and not say of what.
        raise InputError("the scan library is registered twice with one SessionOptions: register it once")
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's own classes, one for each status code
        raise EnvironmentLackError(f"ONNX Runtime refused the scan library: {' '.join(str(error).split())}") from error
    session_options.add_session_config_entry(REGISTERED, str(path))
