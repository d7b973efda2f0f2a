# Runs in a process of its own, in the rig or with the stand-in: the public names of a `tensorrt`.
#
# Out: {class or function: {"properties": names, "methods": {name: the arguments' names, of each overload},
# "numbers": of an enumeration}}

import enum
import inspect
import json
import re
import sys

import tensorrt


def own(cls):
    """What TensorRT's classes give, not what Python's list, tuple or bytearray does."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("tensorrt")]
    return {name: value for base in reversed(bases) for name, value in vars(base).items() if name[0] != "_"}


def arguments(name, function, method=True):
    """Of a function in Python, or of pybind11's by its documentation; without the object."""
    if inspect.isfunction(function):
        overloads = [[*inspect.signature(function).parameters][method:]]
    else:
        overloads = [
            re.findall(r"(?:^|, )(\w+):", one) for one in re.findall(rf"{name}\((.*)\) ->", function.__doc__ or "")
        ]
    return [[one for one in names if one != "self"] for names in overloads]


def described(cls):
    members = {name: int(value) for name, value in getattr(cls, "__members__", {}).items()}
    is_enum = issubclass(cls, enum.Enum)
    found = {} if is_enum else {name: value for name, value in own(cls).items() if name not in members}
    methods = {name: value for name, value in found.items() if callable(value) and not isinstance(value, type)}
    return {
        "properties": sorted(name for name in found if name not in methods),
        "methods": {name: arguments(name, getattr(cls, name)) for name in methods},
        "numbers": members,
    }


told = {}
for name in (name for name in dir(tensorrt) if name[0] != "_"):
    found = getattr(tensorrt, name)
    if isinstance(found, type):
        told[name] = described(found)
    elif callable(found):
        told[name] = {"properties": [], "methods": {name: arguments(name, found, method=False)}, "numbers": {}}
json.dump(told, sys.stdout)
