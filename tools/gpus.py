"""The GPUs of this machine, as the NVIDIA driver tells them; it needs no toolkit for that."""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

from mdm.plugins.errors import EnvironmentLackError
from mdm.plugins.machine import read

CUDA = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"  # the NVIDIA driver's
CAPABILITY = (75, 76)  # major and minor, among CUDA's device attributes


def gpus() -> list[tuple[str, int]]:
    """What to say of each GPU, and its memory in bytes."""
    try:
        cuda = ctypes.CDLL(CUDA)
    except OSError as error:
        raise EnvironmentLackError(
            f"no NVIDIA driver ({CUDA}), so none\nwhere there is one, install its driver; in a container: --gpus all"
        ) from error

    def call(function: str, *arguments: Any) -> None:
        if status := getattr(cuda, function)(*arguments):
            said = ctypes.c_char_p()
            cuda.cuGetErrorString(status, ctypes.byref(said))
            raise EnvironmentLackError(
                f"the NVIDIA driver is here, but {function} says: {(said.value or b'unknown').decode()}\n"
                "where there is a GPU, nvidia-smi may tell more; in a container: --gpus all"
            )

    def number(function: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        answer = kind()
        call(function, ctypes.byref(answer), *arguments)
        return int(answer.value)

    call("cuInit", 0)
    cuda_version = divmod(number("cuDriverGetVersion"), 1000)
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", read("proc/driver/nvidia/version"))
    found = []
    for device in range(number("cuDeviceGetCount")):
        name = ctypes.create_string_buffer(256)
        call("cuDeviceGetName", name, len(name), device)
        capability = ".".join(str(number("cuDeviceGetAttribute", part, device)) for part in CAPABILITY)
        size = number("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t)
        said = f"{name.value.decode()}, compute capability {capability}, {size / 1e9:.0f} GB; "
        said += f"driver {driver[1] if driver else 'unknown'} for CUDA {cuda_version[0]}.{cuda_version[1] // 10}"
        found.append((said, size))
    return found
