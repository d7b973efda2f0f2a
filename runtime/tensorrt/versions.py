"""Where TensorRT 10.3 to 11.4 differ in what we call, and what is said where a version has not got something.

All else that we call is the same in both: `set_device_memory`, `device_memory_size_v2`,
`get_device_memory_size_for_profile_v2`, `weight_streaming_budget_v2`, `infer_shapes`, `IProgressMonitor`,
`OnnxParserRefitter`, `plugins_to_serialize` and `get_creator` are in the Python bindings since 10.1 or longer. Calls
without those `_v2`, and `create_execution_context_without_device_memory`, ended with 10.16.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module
from typing import Any

from mdm.plugins.errors import EnvironmentLackError, InputError

OLDEST = "10.3"
RUNTIMES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")
# What an engine is to run on, as TensorRT calls it, and since when it does.
HARDWARE = {
    "this": ("NONE", OLDEST),
    "same-capability": ("SAME_COMPUTE_CAPABILITY", "10.9"),
    "ampere-plus": ("AMPERE_PLUS", OLDEST),
}
# Before, the parser took an operator's body in the file rather than a plugin: its release notes, issue 4113.
PLUGINS_FIRST = "10.7"
DROPS_BIASES = "11.3"  # with REFIT, not with REFIT_IDENTICAL: its release notes

Kind = tuple[str, str, str]  # a plugin's name, version and namespace
UNTOLD: Kind = ("", "", "")


def tensorrt_module(lean: bool = False) -> Any:
    """TensorRT's Python module; with `lean` also one that only runs version-compatible engines, if it is all there
    is."""
    for name in RUNTIMES if lean else RUNTIMES[:1]:
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _broken(name, error) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise _broken(name, error) from error
        else:
            found = str(module.__version__)
            if version_of(found) < version_of(OLDEST):
                raise EnvironmentLackError(
                    f"TensorRT is too old\nfound {found}, expected {OLDEST} or newer\n"
                    'pip install --upgrade "mdm-deploy[tensorrt]"'
                )
            return module
    also = ", for version-compatible engines alone: pip install tensorrt-lean" if lean else ""
    raise EnvironmentLackError(
        "TensorRT is not installed: the Python module tensorrt is missing\n"
        f'pip install "mdm-deploy[tensorrt]"{also}'
    )  # fmt: skip


def _broken(name: str, error: Exception) -> EnvironmentLackError:
    return EnvironmentLackError(
        f"TensorRT is installed, but its Python module {name} cannot be imported\n"
        f"found {type(error).__name__}: {' '.join(str(error).split())[:300]}\n"
        'pip install --force-reinstall "mdm-deploy[tensorrt]"'
    )


def version_of(text: str) -> tuple[int, ...]:
    """For comparing: (11, 4, 0, 106)."""
    return tuple(int(number) for number in re.findall(r"\d{1,9}", text)[:4])


def network_flags(trt: Any) -> int:
    """10 builds strongly typed networks if asked to; 11 knows no others, and may lose the flag."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if typed is None else 1 << int(typed)


def hardware_level(trt: Any, hardware: str) -> Any:
    """One of HARDWARE, as a setting of a build."""
    name, since = HARDWARE[hardware]
    level = getattr(trt.HardwareCompatibilityLevel, name, None)
    if level is None:
        raise EnvironmentLackError(
            f"this TensorRT cannot build for --hardware {hardware}\nfound {trt.__version__}, expected {since} or newer"
        )
    return level


def check_refit(version: str) -> None:
    """An error where engines that can be refitted compute something else."""
    if version_of(version)[:2] == version_of(DROPS_BIASES):
        raise InputError(
            f"--refit: engines of TensorRT {DROPS_BIASES} may lose a bias, say its release notes\n"
            f"found {version}\nuse another version, or --strip, which is not concerned"
        )


def plugin_of(trt: Any, layer: Any) -> Kind | None:
    """Which plugin a layer of a network is; none where it is no plugin.

    The bindings hand out every layer as an ILayer. Before 10.4 they do not tell what a C++ plugin is.
    """
    if layer.type != trt.LayerType.PLUGIN_V3:
        return None
    layer.__class__ = trt.IPluginV3Layer
    core = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    return UNTOLD if core is None else (core.plugin_name, core.plugin_version, core.plugin_namespace)


def registered_plugins(trt: Any) -> list[Kind]:
    creators = trt.get_plugin_registry().all_creators or ()
    return [(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in creators]


def load_lean_runtime() -> None:
    """A version-compatible engine carries TensorRT's lean runtime, whose library pip puts where TensorRT finds it only
    if it is loaded already."""
    with suppress(ImportError):
        import_module("tensorrt_lean_libs")
