"""NVIDIA TensorRT for RTX: a provider that ONNX Runtime takes in as a plugin, from a Python package of its own.

What is known of it (0.5.0) was seen with its library on a stand-in for CUDA's runtime; on a GPU it has never run here.
It takes GPUs of compute capability 8.6, 8.9 and 12.x, and passes over all others. It takes our graphs whole, the loops
in the functions' bodies too; but nothing of a graph in which it does not know every node.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.runtime.tensorrt.profiles import PROFILES, Shapes

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

PROFILE = PROFILES["throughput"]  # what it builds engines for, when a graph is loaded
PROVIDER = "NvTensorRTRTXExecutionProvider"
MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = 'pip install "mdm-deploy[cpu,rtx]"'
OLDEST = (1, 25)  # the first ONNX Runtime whose "cuda" memory may be a plugin's


def use_rtx(options: SessionOptions, number: int, shapes: Shapes | None = None) -> None:
    """Sessions of these options run on that GPU, and nowhere else. `shapes`: of the inputs; without, each open
    dimension is one from 0 to 32,767, usually 1, which a picture with a text is not."""
    built = {
        f"nv_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, three[index]))}" for name, three in (shapes or {}).items()
        )
        for index, which in enumerate(("min", "opt", "max"))
    }
    options.add_provider_for_devices([rtx_device(number)], built if shapes else {})
    # Else a graph that it does not take would run on the CPU, without a word.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # It is shown each graph before the functions' bodies are put in, and logs every one of our nodes as an error then.
    options.log_severity_level = 4


def rtx_device(number: int) -> Any:
    """A GPU as the provider knows it, by CUDA's number."""
    devices = rtx_devices()
    from onnxruntime import OrtDeviceMemoryType

    # Their order is not CUDA's; the numbers of their memory are.
    numbered = {one.memory_info(OrtDeviceMemoryType.DEFAULT).device_id: one for one in devices}
    if number not in numbered:
        raise InputError(
            f"TensorRT-RTX takes no GPU {number} here\nit takes number {', '.join(map(str, sorted(numbered)))}"
        )
    return numbered[number]


def rtx_devices() -> list[Any]:
    """The GPUs that the provider takes: one at least."""
    if find_spec(MODULE) is None:
        raise EnvironmentLackError(
            f"TensorRT-RTX is not installed: the Python module {MODULE} is missing\n"
            f'{INSTALL}; beside onnxruntime-gpu: pip install "mdm-deploy[gpu,rtx]"'
        )
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < OLDEST:
        raise EnvironmentLackError(
            f"TensorRT-RTX needs ONNX Runtime {'.'.join(map(str, OLDEST))} or newer, found {onnxruntime.__version__}\n"
            "pip install --upgrade onnxruntime"
        )
    register_provider()
    found = [one for one in onnxruntime.get_ep_devices() if one.ep_name == PROVIDER]
    if not found:
        raise EnvironmentLackError(
            "TensorRT-RTX finds no GPU here that it takes: compute capability 8.6, 8.9 or 12 (GeForce RTX 30 to 50)\n"
            "where there is one, update its driver; on another NVIDIA GPU use ort-cuda or tensorrt"
        )
    return found


@cache
def register_provider() -> None:
    """ONNX Runtime takes a library in once in a process."""
    try:
        import onnxruntime

        plugin: Any = import_module(MODULE)
        # The package brings CUDA's runtime and does not find it: the file has a longer name than is asked for.
        for library in Path(plugin.__file__).parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(library))
        onnxruntime.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's own classes; whatever a broken package raises
        said = " ".join(str(error).split("with error:")[-1].split())[:300]
        raise EnvironmentLackError(
            f"TensorRT-RTX cannot be loaded: {said}\nlibcuda and libnvidia-ml come with the NVIDIA driver\n"
            f"the rest with the package: {INSTALL}"
        ) from error
