"""The plugin registry, and the classes that plugins in Python are made of."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from mdm.plugins.contract import DOMAIN, OPERATORS, VERSION

from .enums import PluginCapabilityType, PluginFieldType, Severity, TensorRTPhase
from .words import error, needs, say


class PluginField:
    def __init__(self, name: str = "", data: Any = None, type: PluginFieldType = PluginFieldType.UNKNOWN) -> None:
        self.name, self.type = needs(name, str, "PluginField"), needs(type, PluginFieldType, "PluginField")
        self.data = np.array([], np.int8) if data is None else np.asarray(data)
        self.size = self.data.size


class PluginFieldCollection(list[PluginField]):
    def __init__(self, fields: Iterable[PluginField] = ()) -> None:
        super().__init__(needs(field, PluginField, "PluginFieldCollection") for field in fields)


class DimsExprs(list[Any]): ...


class IPluginV3:
    def __init__(self) -> None: ...


class IPluginV3OneCore:
    def __init__(self) -> None: ...


class IPluginV3OneBuild:
    def __init__(self) -> None: ...


class IPluginV3OneRuntime:
    def __init__(self) -> None: ...


class IPluginCreatorV3One:
    def __init__(self) -> None: ...


class FromLibrary(IPluginV3):
    """A plugin of a C++ library: what is known of it here."""

    def __init__(self, name: str, fields: PluginFieldCollection) -> None:
        self.plugin_name, self.plugin_version, self.plugin_namespace = name, str(VERSION), DOMAIN
        self.fields = fields

    def clone(self) -> FromLibrary:
        return self

    def get_capability_interface(self, type: PluginCapabilityType) -> FromLibrary:
        return self

    def attach_to_context(self, context: object) -> FromLibrary:
        return self

    def get_fields_to_serialize(self) -> PluginFieldCollection:
        return self.fields


class LibraryCreator(IPluginCreatorV3One):
    """One of our operators, from a library that is taken for ours if it exports what TensorRT asks for."""

    def __init__(self, name: str) -> None:
        self.name, self.plugin_version, self.plugin_namespace = name, str(VERSION), DOMAIN
        self.field_names = PluginFieldCollection(PluginField(one) for one in OPERATORS[name].attributes)

    def create_plugin(self, name: str, fields: PluginFieldCollection, phase: TensorRTPhase) -> FromLibrary:
        return FromLibrary(self.name, fields)


Key = tuple[str, str, str]


class IPluginRegistry:
    """Of the process. Creators in Python are their owner's to keep: TensorRT has pointers to them."""

    __slots__ = ("_creators", "_libraries")

    def __init__(self) -> None:
        self._creators: dict[Key, Any] = {}
        self._libraries: dict[int, tuple[ctypes.CDLL, list[LibraryCreator]]] = {}

    @property
    def all_creators(self) -> list[Any]:
        return [found for key in self._creators if (found := self._find(key)) is not None]

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        needs(creator, IPluginCreatorV3One, "register_creator")
        key = (creator.name, creator.plugin_version, plugin_namespace)
        if key in self._creators:
            say(Severity.ERROR, f"IPluginRegistry::registerCreator: a creator of {key} is registered already")
            return False
        self._creators[key] = weakref.ref(creator)
        return True

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        found = self._find((type, version, plugin_namespace))
        if found is None:
            error(
                "IPluginRegistry::getCreator", f"no plugin: {type}, version: {version}, namespace:{plugin_namespace}."
            )
        return found

    def _find(self, key: Key) -> Any:
        if key not in self._creators:
            return None
        found = self._creators[key]()
        if found is None:  # TensorRT would follow a pointer to nowhere
            raise SystemExit(f"the creator of {key} was registered and is gone: who registers it has to keep it")
        return found

    def load_library(self, plugin_path: str) -> Any:
        needs(plugin_path, str, "load_library")
        try:
            library = ctypes.CDLL(plugin_path)
        except OSError as failure:
            say(Severity.ERROR, f"IPluginRegistry::loadLibrary: Error Code 6: API Usage Error ({failure})")
            return None
        if not hasattr(library, "getCreators") or not hasattr(library, "setLoggerFinder"):
            say(Severity.ERROR, f"IPluginRegistry::loadLibrary: {plugin_path} exports no getCreators")
            return None
        creators = [LibraryCreator(name) for name in OPERATORS]
        if not all(self.register_creator(creator, DOMAIN) for creator in creators):
            return None
        self._libraries[library._handle] = library, creators
        return library._handle

    def deregister_library(self, handle: Any) -> None:
        _, creators = self._libraries.pop(handle)
        self._creators = {key: found for key, found in self._creators.items() if found() not in creators}


_registry = IPluginRegistry()


def get_plugin_registry() -> IPluginRegistry:
    return _registry


def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
    return True


def plugin_of(key: Key, fields: dict[str, list[int]], phase: TensorRTPhase) -> Any:
    """An instance from a registered creator, as a node or a plan describes it; None where none is registered."""
    creator = _registry._find(key)
    if creator is None:
        return None
    listed = {field.name for field in creator.field_names}
    given = [
        PluginField(name, np.array(value, np.int32), PluginFieldType.INT32)
        for name, value in fields.items()
        if name in listed
    ]
    plugin = creator.create_plugin(key[0], PluginFieldCollection(given), phase)
    return needs(plugin, IPluginV3, "create_plugin").clone()


def key_of(plugin: Any) -> Key:
    core = plugin.get_capability_interface(PluginCapabilityType.CORE)
    return core.plugin_name, core.plugin_version, core.plugin_namespace


def fields_of(plugin: Any) -> dict[str, list[int]]:
    """What a plugin wants to find again in the plan."""
    runtime = plugin.get_capability_interface(PluginCapabilityType.RUNTIME)
    return {field.name: [int(value) for value in np.ravel(field.data)] for field in runtime.get_fields_to_serialize()}
