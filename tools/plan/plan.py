"""What a build of a bundle's graphs would do: where nodes go, types at the plugins, memory, targets, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from onnx import ModelProto

from mdm.plugins.errors import InputError
from mdm.plugins.gpu.variants import check_model
from mdm.runtime.bundle import Bundle
from mdm.runtime.tensorrt.profiles import Profile, shapes_of
from mdm.tools.plan.boundaries import Boundary, at_plugins
from mdm.tools.plan.folding import Shape
from mdm.tools.plan.memory import LOOPS, Memory, Peak, bytes_of, weights_of
from mdm.tools.plan.placement import By, Parser, Placement, every
from mdm.tools.plan.targets import DATA, Asked, Verdict, refused_types, verdicts
from mdm.tools.plan.tensors import UNKNOWN, Tensor, infer


@dataclass
class Finding:
    """Something wrong: it stops a build, or a reader should know it."""

    message: str
    stops: bool
    graphs: list[str] = field(default_factory=list)  # none: the whole model


@dataclass(frozen=True)
class GraphPlan:
    name: str
    nodes: int
    placement: Placement
    boundaries: Counter[Boundary]
    weights: int  # bytes, as all below
    peak: Peak  # of the tensors between nodes
    bindings: int  # inputs and outputs
    workspace: int  # of the plugins

    @property
    def memory(self) -> int:
        return self.weights + self.peak.bytes + self.bindings + self.workspace


@dataclass
class Plan:
    plugins: bool  # else by bodies
    graphs: list[GraphPlan] = field(default_factory=list)
    distinct: int = 0  # bytes of weights, those that graphs share counted once
    targets: list[Verdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        return any(finding.stops for finding in self.findings)

    def find(self, graph: str | None, message: str, stops: bool = True) -> None:
        """Said once, whatever the graphs that it is true of."""
        known = next((one for one in self.findings if one.message == message), None)
        if known is None:
            known = Finding(message, stops)
            self.findings.append(known)
        if graph is not None and graph not in known.graphs:
            known.graphs.append(graph)


def make_plan(bundle: Bundle, graphs: Iterable[str], profiles: Sequence[Profile], plugins: bool) -> Plan:
    plan, asked = Plan(plugins), Asked()
    weights: dict[tuple[str, ...], int] = {}
    if plugins:
        try:
            check_model(bundle.manifest["config"])
        except InputError as error:
            plan.find(None, str(error))
    for name in graphs:
        model = read_model(bundle, name)
        held = weights_of(model)
        most = [{i: three[2] for i, three in shapes_of(bundle.manifest, name, one).items()} for one in profiles]
        made = plan_graph(name, model, most, sum(held.values()), plan, asked)
        plan.graphs.append(made)
        weights |= {key if key[0] else (name, *key): size for key, size in held.items()}
        if made.workspace > (limit := max(profile.workspace for profile in profiles)):
            plan.find(
                name,
                f"the plugins want a workspace of {made.workspace} bytes\nthe profile gives {limit}: write a larger "
                '"workspace" in its file, or build with --bodies',
            )
    plan.distinct = sum(weights.values())
    plan.targets = verdicts(asked)
    return plan


def read_model(bundle: Bundle, name: str) -> ModelProto:
    content = bundle.graph_bytes(name)
    try:
        model = ModelProto.FromString(content)
    except Exception as error:  # protobuf's own class
        raise InputError(f"graph '{name}' of bundle '{bundle.path}' is not an ONNX file: {error}") from error
    # Of a name that is no text protobuf makes bytes, and tells nobody.
    if any(isinstance(one, bytes) for one in _names(model)):
        raise InputError(f"graph '{name}' of bundle '{bundle.path}' has a name that is no text")
    return model


def _names(model: ModelProto) -> Iterator[str | bytes]:
    graph = model.graph
    for spec in (*graph.input, *graph.output, *graph.initializer):
        yield spec.name
    for function in model.functions:
        yield function.name
    for node in every([*graph.node, *(node for function in model.functions for node in function.node)]):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def plan_graph(
    name: str, model: ModelProto, most: Sequence[Mapping[str, Shape]], weights: int, plan: Plan, asked: Asked
) -> GraphPlan:
    """One graph, at the largest shapes of each profile; `weights` in bytes. What is wrong goes into `plan`, what it
    needs into `asked`."""
    parser, find = Parser(model, plan.plugins), partial(plan.find, name)
    placement = parser.place()
    memory = Memory(model, lambda node: parser.by(node) is By.BODY)
    ours = [node for node in model.graph.node if parser.by(node) is By.PLUGIN]
    peaks: list[Peak] = []
    bindings = workspace = 0
    for sizes in most:  # types are the same for every profile: the last one's are kept
        inferred = infer(model, sizes)
        peaks.append(memory.peak(inferred))
        bindings = max(bindings, bytes_of((*model.graph.input, *model.graph.output), inferred.tensors))
        boundaries, room = at_plugins(ours, inferred.tensors, find)
        workspace = max(workspace, room)
        if inferred.fault:
            find(f"the types do not fit together: {inferred.fault}")
    ask(asked, model, placement, inferred.tensors)
    for operator in placement.nobody:
        find(f"operator '{operator:.60}': TensorRT has none of this name, the file no function, and we no plugin")
    for said in refused_types(data_types(model, parser, inferred.tensors)):
        find(f"TensorRT does not take {said}")
    for fault in dict.fromkeys(memory.faults):
        find(fault)
    for operator, count in placement.unnamed.items():
        find(f"{count} nodes {operator} do not name our plugin, and go by their bodies", stops=False)
    if unknown := max(peak.unknown for peak in peaks):
        find(f"{unknown} tensors have sizes that only a run knows: it takes more memory than is said", stops=False)
    if plan.plugins and any(placement.tensorrt[operator] for operator in LOOPS):
        find("a loop is left beside the plugins: a GPU takes its turns one after another", stops=False)
    return GraphPlan(
        name, len(model.graph.node), placement, boundaries, weights,
        max(peaks, key=lambda peak: peak.bytes), bindings, workspace,
    )  # fmt: skip


def ask(asked: Asked, model: ModelProto, placement: Placement, tensors: Mapping[str, Tensor]) -> None:
    """Add what this graph needs of whoever runs it."""
    asked.ir = max(asked.ir, model.ir_version)
    asked.opset = max([asked.opset, *(entry.version for entry in model.opset_import if not entry.domain)])
    asked.plugins |= bool(placement.plugins)
    asked.operators |= set(placement.tensorrt)
    asked.types |= {tensor.type for tensor in tensors.values()}


def data_types(model: ModelProto, parser: Parser, tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Of TensorRT's own operators in the main graph: the types of their data."""
    found: dict[str, set[str]] = {}
    for node in model.graph.node:
        place = DATA.get(node.op_type, 0)
        if parser.by(node) is By.TENSORRT and place < len(node.input):
            found.setdefault(node.op_type, set()).add(tensors.get(node.input[place], UNKNOWN).type)
    return found
