"""Whether the nodes of our operators became plugins.

TensorRT's parser takes an operator's ONNX body without a word where it finds no plugin of the name, version and
namespace that a node asks for. Such an engine computes the same, many times slower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mdm.plugins.contract import DOMAIN, VERSION
from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told
from mdm.runtime.tensorrt.versions import UNTOLD, Kind

# Of the fields of onnx.proto, those on the way to a node's attributes; and a model's functions.
GRAPH, NODE, OPERATOR, ATTRIBUTE, NAME, TEXT = 7, 1, 4, 5, 1, 4
FUNCTIONS = 25
WANTED = {"plugin_version": "1", "plugin_namespace": ""}  # what the parser takes where an attribute is absent


def check_plugins(
    operators: Mapping[str, int], plugins: Sequence[Kind], registered: Iterable[Kind], model: Path
) -> list[Kind]:
    """`operators`: how many nodes of each a graph has, by the bundle's manifest; `plugins`: those of the network ->
    the kinds of them, each once."""
    ours = {name.partition(".")[2]: count for name, count in operators.items() if name.startswith(f"{DOMAIN}.")}
    if UNTOLD in plugins and len(plugins) == sum(ours.values()):  # as many as there should be
        return [(name, str(VERSION), DOMAIN) for name in sorted(ours)]
    became = Counter(name for name, _, _ in plugins)
    for name, count in ours.items():
        if became[name] < count:
            asked = sorted({_said(version, namespace) for version, namespace in asks_for(model, name)})
            there = sorted({_said(version, namespace) for known, version, namespace in registered if known == name})
            raise InputError(
                f"{count - became[name]} of {count} nodes of operator {told(name)} find no plugin, and would run by "
                f"their ONNX bodies\nthe file asks for {' and '.join(asked) or 'one'}; "
                f"registered: {' and '.join(there) or 'none of this name'}\n"
                "export the bundle again, or build with --bodies"
            )
    return sorted({*plugins})


def _said(version: str, namespace: str) -> str:
    return f"version {told(version)} of namespace {told(namespace)}"


def asks_for(model: Path, operator: str) -> Iterator[tuple[str, str]]:
    """The plugin's version and namespace that the nodes of an operator name, as far as the file can be read. This
    package is not to need onnx where engines are built."""
    try:
        for graph in _fields(model.read_bytes(), GRAPH):
            for node in _fields(graph, NODE):
                if operator.encode() in _fields(node, OPERATOR):
                    texts = {
                        name.decode(): text.decode()
                        for attribute in _fields(node, ATTRIBUTE)
                        for name, text in zip(_fields(attribute, NAME), _fields(attribute, TEXT), strict=False)
                    }
                    version, namespace = ({**WANTED, **texts}[name] for name in WANTED)
                    yield version, namespace
    except (OSError, ValueError, IndexError):
        return


def without_functions(model: bytes) -> bytes:
    """The file without its operators' bodies, for a parser that would take them rather than a plugin."""
    return b"".join(model[start:end] for number, start, _, end in _parts(model) if number != FUNCTIONS)


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """A protobuf message's fields of this number, which hold bytes."""
    return (message[value:end] for number, _, value, end in _parts(message) if number == wanted)


def _parts(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """A message's fields: number, where it starts, where its value does, where it ends."""
    at = 0
    while at < len(message):
        start = at
        key, at = _number(message, at)
        kind, value = key & 7, at
        if kind == 0:
            _, at = _number(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, value = _number(message, at)
            at = value + size
        else:
            raise ValueError(f"{kind} is no kind of field")
        yield key >> 3, start, value, at


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
        if message[at - 1] < 128:
            return value, at
