"""What a graph takes of a GPU's memory: its weights, and an estimate of the tensors between its nodes.

A tensor lives from the node that makes it to the last that reads it, nodes run in the file's order, and every tensor
has memory of its own. TensorRT fuses nodes, which saves some, and gives its tactics workspace, which takes more. What
TensorRT-RTX 1.7.1's builder says it needs: weights within 2% of these; beside them up to 8 MiB, and then of the
tensors and the plugins' workspace together 1.3 to 1.4 times with plugins and 1.1 to 2.7 times by bodies, for three
blocks at real widths; 0.2 to 3.3 times for mdm-tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, inliner

from mdm.plugins.errors import InputError
from mdm.tools.plan.folding import Shape
from mdm.tools.plan.tensors import NUMBER, SAID, UNKNOWN, Inferred, Tensor, infer, stored, tensors_of

LOOPS = ("Scan", "Loop")
Inside = Callable[[NodeProto], "Peak"]


class Peak(NamedTuple):
    """Bytes of the tensors between a graph's nodes, where they are most."""

    bytes: int = 0
    at: str = ""  # the node
    unknown: int = 0  # tensors that are not counted, since their size is not known
    loops: tuple[int | None, ...] = ()  # of each Scan and Loop: how often it runs, None if that is not known

    def around(self, others: Iterable[Peak]) -> Peak:
        """With the loops and the unknown tensors of what lies within."""
        for other in others:
            self = self._replace(unknown=self.unknown + other.unknown, loops=self.loops + other.loops)
        return self


def weights_of(model: ModelProto) -> dict[tuple[str, ...], int]:
    """The bytes of each initializer, by where its values lie: what has two names is there once."""
    found: dict[tuple[str, ...], int] = {}
    for tensor in model.graph.initializer:
        size = stored(tensor).bytes
        place = {entry.key: entry.value for entry in tensor.external_data}
        key = (place.get("location", ""), place.get("offset", "0")) if place else ("", tensor.name)
        found[key] = max(found.get(key, 0), size or 0)
    return found


def bytes_of(specs: Iterable[ValueInfoProto], tensors: Mapping[str, Tensor]) -> int:
    return sum(tensors.get(spec.name, UNKNOWN).bytes or 0 for spec in specs)


def peak(graph: GraphProto, tensors: Mapping[str, Tensor], inside: Inside) -> Peak:
    """Inputs, outputs, and what follows from weights alone lie elsewhere and are not counted. `inside`: what a node
    takes while it runs."""
    elsewhere = {spec.name for spec in (*graph.input, *graph.output)}
    fixed = {"", *(tensor.name for tensor in graph.initializer)}
    last = {name: place for place, node in enumerate(graph.node) for name in _read(node)}
    ends: dict[int, int] = {}
    alive, found, within = 0, Peak(), []
    for place, node in enumerate(graph.node):
        if node.op_type == "Constant" or (node.input and fixed.issuperset(_read(node))):
            fixed.update(node.output)  # TensorRT computes it once, when it builds
            continue
        for name in node.output:
            if not name or name in elsewhere:
                continue
            size = tensors.get(name, UNKNOWN).bytes
            if size is None:
                found = found._replace(unknown=found.unknown + 1)
                continue
            alive += size
            end = last.get(name, place)
            ends[end] = ends.get(end, 0) + size
        within.append(inside(node))
        if alive + within[-1].bytes > found.bytes:
            found = found._replace(bytes=alive + within[-1].bytes, at=node.name)
        alive -= ends.pop(place, 0)
    return found.around(within)


def _read(node: NodeProto) -> Iterator[str]:
    """The names that a node reads, those in its subgraphs too."""
    yield from node.input
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _read(inner)
        yield from (spec.name for spec in graph.output)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


class Memory:
    """Of one model: what its nodes take while they run, and the bodies of functions once for each set of inputs."""

    def __init__(self, model: ModelProto, by_body: Callable[[NodeProto], bool]) -> None:
        self.model, self.by_body = model, by_body
        self.faults: list[str] = []  # what ONNX says against the types in a body
        self._bodies: dict[tuple[str, str, bytes, tuple[Tensor, ...]], Peak] = {}

    def peak(self, inferred: Inferred) -> Peak:
        calls = {node.output[0]: node for node in self.model.graph.node if node.output and self.by_body(node)}

        def inside(node: NodeProto) -> Peak:
            call = calls.get(node.output[0]) if node.output else None
            return self._loops(node, inferred.tensors) if call is None else self._body(call, inferred.tensors)

        return peak(inferred.graph, inferred.tensors, inside)

    def _loops(self, node: NodeProto, tensors: Mapping[str, Tensor]) -> Peak:
        """What the subgraphs of a node take, their ins and outs included: they are slices and copies."""
        found = []
        for graph in subgraphs(node):
            inner = {**tensors, **tensors_of(graph)}
            one = peak(graph, inner, lambda node, inner=inner: self._loops(node, inner))  # type: ignore[misc]
            found.append(one._replace(bytes=one.bytes + bytes_of((*graph.input, *graph.output), inner)))
        most = max(found, key=lambda one: one.bytes, default=Peak())
        loops = (_steps(node, tensors),) if node.op_type in LOOPS else ()
        return Peak(most.bytes, most.at, loops=loops).around(found)

    def _body(self, node: NodeProto, tensors: Mapping[str, Tensor]) -> Peak:
        inputs = [tensors.get(name, UNKNOWN) for name in node.input]
        attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        key = (node.op_type, node.domain, attributes, tuple(inputs))
        if key not in self._bodies:
            self._bodies[key] = self._measure(node, inputs)
        return self._bodies[key]

    def _measure(self, node: NodeProto, inputs: list[Tensor]) -> Peak:
        """The body, put in the place of its call, in a model of nothing else."""
        if any(one.shape is None or not one.type for one in inputs):
            return Peak(unknown=1)
        names = [f"in{place}" for place in range(len(inputs))]
        call = NodeProto()
        call.CopyFrom(node)
        del call.input[:]
        call.input.extend(names)
        specs = [
            helper.make_tensor_value_info(name, NUMBER[one.type], one.shape)
            for name, one in zip(names, inputs, strict=True)
        ]
        ends = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in call.output]
        alone = helper.make_model(
            helper.make_graph([call], "body", specs, ends), opset_imports=self.model.opset_import,
            functions=self.model.functions, ir_version=self.model.ir_version,
        )  # fmt: skip
        try:
            inlined = inliner.inline_local_functions(alone)
        except Exception as error:  # of ONNX's own classes
            raise InputError(
                f"the body of {node.op_type:.60} is not ONNX: {' '.join(str(error).split())[:SAID]}"
            ) from error
        inferred = infer(
            inlined, {name: one.shape for name, one in zip(names, inputs, strict=True) if one.shape is not None}
        )
        if inferred.fault:
            self.faults.append(
                f"the body of {node.op_type:.60} does not take what node '{node.name:.60}' gives: {inferred.fault}"
            )
        return peak(inferred.graph, inferred.tensors, lambda node: self._loops(node, inferred.tensors))


def _steps(node: NodeProto, tensors: Mapping[str, Tensor]) -> int | None:
    """How often a Scan runs, by the length of what it scans; a Loop's count is a value, which nobody knows before."""
    given = {attribute.name: attribute for attribute in node.attribute}
    if (
        node.op_type != "Scan"
        or "num_scan_inputs" not in given
        or not 0 < given["num_scan_inputs"].i <= len(node.input)
    ):
        return None
    first = len(node.input) - given["num_scan_inputs"].i
    axis = given["scan_input_axes"].ints[0] if "scan_input_axes" in given and given["scan_input_axes"].ints else 0
    shape: Shape | None = tensors.get(node.input[first], UNKNOWN).shape
    return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
