"""Where versions of TensorRT differ: modules and enums of other versions are planted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.runtime.tensorrt import versions
from mdm.runtime.tensorrt.versions import (
    UNTOLD,
    check_refit,
    hardware_level,
    network_flags,
    plugin_of,
    registered_plugins,
    tensorrt_module,
    version_of,
)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """modules(tensorrt="source"): these can be imported, and no other TensorRT."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "rig" not in path)])
    for name in versions.RUNTIMES:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)

    yield write
    for name in versions.RUNTIMES:
        sys.modules.pop(name, None)


def test_the_whole_is_taken_before_what_only_runs(modules: Any) -> None:
    modules(tensorrt_dispatch="__version__ = '11.4.0'")
    with pytest.raises(EnvironmentLackError, match="the Python module tensorrt is missing"):
        tensorrt_module()
    assert tensorrt_module(lean=True).__name__ == "tensorrt_dispatch"
    modules(tensorrt_lean="__version__ = '10.3.0'")
    assert tensorrt_module(lean=True).__name__ == "tensorrt_lean"
    modules(tensorrt="__version__ = '11.4.0.106'")
    assert tensorrt_module(lean=True).__name__ == tensorrt_module().__name__ == "tensorrt"


def test_what_to_install_is_said(modules: Any) -> None:
    for lean in (False, True):
        with pytest.raises(EnvironmentLackError) as caught:
            tensorrt_module(lean)
        assert 'pip install "mdm-deploy[tensorrt]"' in str(caught.value)
        assert ("tensorrt-lean" in str(caught.value)) == lean


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('libnvinfer.so.11 is\\nnot here')", "ImportError: libnvinfer.so.11 is not here"),
        ("raise OSError('wrong ELF class')", "OSError: wrong ELF class"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("__version__ = '10.2.0.19'", "found 10.2.0.19, expected 10.3 or newer"),
        ("__version__ = '8.6.1'", "found 8.6.1, expected 10.3 or newer"),
    ],
)
def test_one_that_does_not_do(modules: Any, source: str, said: str) -> None:
    modules(tensorrt=source, tensorrt_lean="__version__ = '11.4.0'")
    for lean in (False, True):  # what is broken is told, not passed over
        with pytest.raises(EnvironmentLackError) as caught:
            tensorrt_module(lean)
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
        sys.modules.pop("tensorrt", None)


def test_versions_are_compared_as_numbers() -> None:
    assert version_of("11.4.0.106") == (11, 4, 0, 106)
    assert version_of("10.13.0") > version_of("10.9.0") > version_of("10.9")
    assert version_of("") == ()
    assert len(version_of("9" * 10000)) == 4  # whatever a stranger's record holds


def test_networks_are_strongly_typed_where_that_is_a_choice() -> None:
    old = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    new = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(PREFER_JIT_PYTHON_PLUGINS=1))
    assert (network_flags(old), network_flags(new)) == (2, 0)


def test_what_a_version_cannot_build_for_is_said() -> None:
    old = SimpleNamespace(
        __version__="10.8.0.43", HardwareCompatibilityLevel=SimpleNamespace(NONE="none", AMPERE_PLUS="ampere")
    )
    assert [hardware_level(old, name) for name in ("this", "ampere-plus")] == ["none", "ampere"]
    with pytest.raises(EnvironmentLackError, match=r"same-capability\nfound 10.8.0.43, expected 10.9 or newer"):
        hardware_level(old, "same-capability")


def test_a_version_whose_engines_lose_biases() -> None:
    for sound in ("11.2.1", "11.4.0.106", "10.3.0", "11.30.0"):
        check_refit(sound)
    with pytest.raises(InputError, match=r"may lose a bias.*\nfound 11.3.0"):
        check_refit("11.3.0")


class Layer:
    def __init__(self, type_: str, core: Any) -> None:
        self.type = type_
        self.plugin = SimpleNamespace(get_capability_interface={"core": core}.get)


def test_what_a_layer_is() -> None:
    """10.3 tells nothing of a C++ plugin; what is no plugin is not asked."""
    trt = SimpleNamespace(
        LayerType=SimpleNamespace(PLUGIN_V3="plugin"), IPluginV3Layer=Layer,
        PluginCapabilityType=SimpleNamespace(CORE="core"),
    )  # fmt: skip
    scan = SimpleNamespace(plugin_name="MambaSsdScan", plugin_version="1", plugin_namespace="mdm")
    assert plugin_of(trt, Layer("plugin", scan)) == ("MambaSsdScan", "1", "mdm")
    assert plugin_of(trt, Layer("plugin", None)) == UNTOLD
    assert plugin_of(trt, SimpleNamespace(type="add")) is None


def test_registered_plugins() -> None:
    creator = SimpleNamespace(name="MambaSsdScan", plugin_version="1", plugin_namespace="mdm")
    for creators, expected in (([creator], [("MambaSsdScan", "1", "mdm")]), (None, [])):
        registry = SimpleNamespace(all_creators=creators)
        trt = SimpleNamespace(get_plugin_registry=lambda registry=registry: registry)
        assert registered_plugins(trt) == expected
