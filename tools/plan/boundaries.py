"""The edges of our plugins: which types they are given, and what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from onnx import NodeProto

from mdm.plugins.contract import ACTIVATIONS, OPERATORS
from mdm.plugins.errors import InputError
from mdm.plugins.functions import attributes_of
from mdm.plugins.tensorrt.node import Described, Node
from mdm.tools.plan.tensors import UNKNOWN, Tensor

Find = Callable[[str], object]  # is told what is wrong


@dataclass(frozen=True)
class Boundary:
    """The types that nodes of one operator take and give."""

    operator: str
    takes: tuple[tuple[str, str], ...]  # input, type
    gives: str


def at_plugins(nodes: Iterable[NodeProto], tensors: Mapping[str, Tensor], find: Find) -> tuple[Counter[Boundary], int]:
    """How many nodes have which types, and bytes of workspace: of the one that wants most, since one runs at a time."""
    found: Counter[Boundary] = Counter()
    room = 0
    for node in nodes:
        try:
            ours = Node(OPERATORS[node.op_type], attributes_of(node)["has"])
            ours.expect(len(node.input))
        except InputError as error:
            find(str(error))
            continue
        inputs = [tensors.get(name, UNKNOWN) for name in node.input]
        gives = tensors.get(node.output[0], UNKNOWN) if node.output else UNKNOWN
        names = [spec.name for spec in ours.inputs]
        found[Boundary(node.op_type, tuple((n, t.type) for n, t in zip(names, inputs, strict=True)), gives.type)] += 1
        described = [Described(tensor.shape or (), tensor.type) for tensor in (*inputs, gives)]
        wrong = [place for place in range(len(described)) if not ours.takes(place, described)]
        for place in wrong:
            find(_refusal(node, ours, [*names, "y"], described, place))
        if wrong or any(tensor.shape is None for tensor in inputs):
            continue
        try:
            ours.check(described[:-1])
        except InputError as error:
            find(str(error))
        else:
            room = max(room, ours.workspace(described[:-1]))
    return found, room


def _refusal(node: NodeProto, ours: Node, names: list[str], described: list[Described], place: int) -> str:
    if place < len(ours.inputs) and not ours.inputs[place].activation:
        expected = "float32"
    else:
        expected = (
            f"{described[0].dtype or 'the type'} as '{names[0]}' is" if place else f"one of {', '.join(ACTIVATIONS)}"
        )
    return (
        f"{node.op_type}: '{names[place]}' is {described[place].dtype or 'of a type that is not known'}, "
        f"at node '{node.name:.60}'\n"
        f"expected {expected}: TensorRT casts nothing by itself"
    )
