"""The type and size of every tensor of a graph, once the sizes of its inputs are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from onnx import GraphProto, ModelProto, TensorProto, TypeProto, ValueInfoProto, shape_inference

from mdm.plugins.contract import OPERATORS
from mdm.plugins.errors import InputError
from mdm.tools.plan.folding import Numbers, Shape, as_tensor, fold, of_tensor

# ONNX's number of a type -> our name, bytes of one value. What is not here has no size that a plan could tell.
TYPES: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float32", 4), TensorProto.FLOAT16: ("float16", 2), TensorProto.BFLOAT16: ("bfloat16", 2),
    TensorProto.DOUBLE: ("float64", 8), TensorProto.INT64: ("int64", 8), TensorProto.INT32: ("int32", 4),
    TensorProto.INT8: ("int8", 1), TensorProto.UINT8: ("uint8", 1), TensorProto.BOOL: ("bool", 1),
}  # fmt: skip
NUMBER = {name: number for number, (name, _) in TYPES.items()}
ROUNDS = 8  # of inference: what one leaves open, the numbers that it found may settle
LARGEST = 2**62  # values of a tensor: beyond that a size is a mistake
SAID = 300  # characters of what ONNX says


class Tensor(NamedTuple):
    """What is known of one; "" and None where nothing is."""

    type: str
    shape: Shape | None

    @property
    def bytes(self) -> int | None:
        size = next((size for name, size in TYPES.values() if name == self.type), None)
        return None if size is None or self.shape is None else size * prod(self.shape)


UNKNOWN = Tensor("", None)


class Inferred(NamedTuple):
    tensors: dict[str, Tensor]
    graph: GraphProto  # with the same nodes' subgraphs filled in; nodes that compute sizes only are gone
    fault: str  # what ONNX says against the types, or ""


def infer(model: ModelProto, sizes: Mapping[str, Shape]) -> Inferred:
    """Of the main graph. `sizes`: of its inputs. A node of our operators gives what its first input is, as the
    contract says."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    stored = {tensor.name for tensor in graph.initializer}
    for spec in graph.input:
        if spec.name not in stored:
            _set_shape(spec, sizes)
    for spec in graph.output:
        spec.type.tensor_type.ClearField("shape")
    for node in graph.node:
        if node.op_type in OPERATORS and node.input:
            node.CopyFrom(type(node)(op_type="Identity", input=node.input[:1], output=node.output[:1], name=node.name))
    nodes = list(graph.node)
    numbers: dict[str, Numbers] = {
        tensor.name: found for tensor in graph.initializer if (found := of_tensor(tensor)) is not None
    }
    tensors, fault, inferred = tensors_of(graph), "", False
    for _ in range(ROUNDS):
        shapes = {name: one.shape for name, one in tensors.items() if one.shape is not None}
        if not fold(nodes, shapes, numbers) and inferred:
            break
        _write_numbers(graph, numbers, stored)
        try:
            copy = shape_inference.infer_shapes(copy, check_type=not fault, data_prop=True)
        except Exception as error:  # of ONNX's own classes
            said = " ".join(str(error).split())[:SAID]
            if fault:
                raise InputError(f"ONNX cannot infer its types and shapes: {said}") from error
            fault = said
            continue
        graph, inferred = copy.graph, True
        tensors |= tensors_of(graph)
        if all(one.shape is not None for one in tensors.values()):
            break
    return Inferred(tensors, graph, fault)


def _set_shape(spec: ValueInfoProto, sizes: Mapping[str, Shape]) -> None:
    shape = sizes.get(spec.name)
    rank = len(spec.type.tensor_type.shape.dim)
    if shape is None or rank != len(shape):
        found = "has no such input" if shape is None else f"says {len(shape)} dimensions, the file {rank}"
        raise InputError(f"graph input '{spec.name:.60}' is not as the manifest says: it {found}")
    for dim, size in zip(spec.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size


def _write_numbers(graph: GraphProto, numbers: Mapping[str, Numbers], stored: set[str]) -> None:
    """What was computed becomes a constant, in the place of the node that computes it."""
    left = [node for node in graph.node if not (node.output and node.output[0] in numbers)]
    if len(left) < len(graph.node):
        made = [name for node in graph.node for name in node.output[:1] if name in numbers]
        graph.initializer.extend(as_tensor(name, numbers[name]) for name in made if name not in stored)
        stored.update(made)
        del graph.node[:]
        graph.node.extend(left)


def stored(tensor: TensorProto) -> Tensor:
    """What a file says of numbers that it holds, or has beside it."""
    return Tensor(_type(tensor.data_type), _shape(tensor.dims))


def tensors_of(graph: GraphProto) -> dict[str, Tensor]:
    """What a graph says of its values and initializers."""
    found = {tensor.name: stored(tensor) for tensor in graph.initializer}
    for spec in _values(graph):
        found[spec.name] = tensor_of(spec.type)
    return found


def _values(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def tensor_of(described: TypeProto) -> Tensor:
    tensor = described.tensor_type
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
    shape = _shape(dim.dim_value for dim in tensor.shape.dim) if known else None
    return Tensor(_type(tensor.elem_type), shape)


def _type(number: int) -> str:
    return TYPES[number][0] if number in TYPES else ""


def _shape(sizes: Iterable[int]) -> Shape | None:
    """None for what can be no tensor's."""
    shape = tuple(sizes)
    return shape if all(size >= 0 for size in shape) and prod(shape) <= LARGEST else None
