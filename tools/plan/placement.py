"""Who computes each node when TensorRT reads a graph: a plugin of ours, TensorRT itself, or a function in the file.

The parser's order since TensorRT 10.7 (its source, and tried in `tests/plugins/tensorrt`; before, functions came first,
which mdm build leaves out there): a plugin that the node names, if it is loaded; an operator of its own, by the type
alone, whatever the domain; a function of the file, by the name alone; a plugin whose namespace is the node's domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from onnx import ModelProto, NodeProto

from mdm.plugins.contract import DOMAIN, OPERATORS, VERSION
from mdm.plugins.errors import InputError
from mdm.tools.plan.memory import subgraphs
from mdm.tools.plan.targets import TAKES

MOST_NODES = 10**6  # with every function in the place of its calls; the largest model of ours has 50,000


class By(Enum):
    PLUGIN = "plugin"
    BODY = "body"
    TENSORRT = "tensorrt"
    NOBODY = "nobody"


@dataclass
class Placement:
    """Of one graph, bodies and subgraphs included: how many nodes of which operators."""

    plugins: Counter[str] = field(default_factory=Counter)
    bodies: Counter[str] = field(default_factory=Counter)  # calls
    tensorrt: Counter[str] = field(default_factory=Counter)
    nobody: Counter[str] = field(default_factory=Counter)
    unnamed: Counter[str] = field(default_factory=Counter)  # ours, that go to bodies since they do not name our plugin


class Parser:
    """What TensorRT's parser does with the nodes of a file."""

    def __init__(self, model: ModelProto, plugins: bool) -> None:
        self.model, self.plugins = model, plugins
        self.functions = {function.name: function for function in model.functions}
        self._contents: dict[str, Counter[tuple[By, str]]] = {}

    def by(self, node: NodeProto) -> By:
        if self.plugins and node.op_type in OPERATORS and _names_ours(node):
            return By.PLUGIN
        if node.op_type in TAKES:
            return By.TENSORRT
        if node.op_type in self.functions:
            return By.BODY
        if self.plugins and node.op_type in OPERATORS and node.domain == DOMAIN:
            return By.PLUGIN
        return By.NOBODY

    def place(self) -> Placement:
        found = Placement()
        for (by, name), count in self._count(self.model.graph.node, ()).items():
            held = {By.PLUGIN: found.plugins, By.BODY: found.bodies, By.TENSORRT: found.tensorrt}
            held.get(by, found.nobody)[name] += count
        for node in self.model.graph.node:
            if self.plugins and node.op_type in OPERATORS and self.by(node) is By.BODY:
                found.unnamed[node.op_type] += 1
        return found

    def _count(self, nodes: Iterable[NodeProto], callers: tuple[str, ...]) -> Counter[tuple[By, str]]:
        found: Counter[tuple[By, str]] = Counter()
        for node in every(nodes):
            if node.op_type == "Constant":  # a value, and no work
                continue
            by = self.by(node)
            name = node.op_type if by is not By.NOBODY else f"{node.domain}.{node.op_type}".lstrip(".")
            found[by, name] += 1
            if by is By.BODY:
                found.update(self._within(node.op_type, callers))
            if found.total() > MOST_NODES:
                raise InputError(f"the file's functions unfold to more than {MOST_NODES} nodes")
        return found

    def _within(self, function: str, callers: tuple[str, ...]) -> Counter[tuple[By, str]]:
        if function in callers:
            raise InputError(f"the file's function '{function:.60}' calls itself")
        if function not in self._contents:
            self._contents[function] = self._count(self.functions[function].node, (*callers, function))
        return self._contents[function]


def every(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those in their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from every(graph.node)


def _names_ours(node: NodeProto) -> bool:
    named = {attribute.name: attribute.s for attribute in node.attribute}
    return (
        named.get("plugin_namespace", b"") == DOMAIN.encode()
        and named.get("plugin_version", b"1") == str(VERSION).encode()
    )
