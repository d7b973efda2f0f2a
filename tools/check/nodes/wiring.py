"""What reads what in a graph, and which node of a bundle's graph is which node of the blueprint.

A node is fixed if it computes from constants alone, such as a weight's Transpose: it is no step of its own but travels
with the nodes that read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from onnx import ModelProto, TensorProto, helper

from mdm.plugins.contract import DOMAIN, OPERATORS
from mdm.plugins.errors import InputError
from mdm.tools.check.nodes.evaluator import lies_outside, tensor_of

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}  # fmt: skip
# Operators whose output does not have the type of their first input.
OTHER_TYPES: dict[str, int] = {
    "Shape": TensorProto.INT64, "ArgMax": TensorProto.INT64, "Less": TensorProto.BOOL, "Equal": TensorProto.BOOL,
}  # fmt: skip
DECIDE = ("Less", "Equal", "ArgMax")  # a small difference can make a large one behind them


class Wiring:
    """Nodes are told by their number in the file."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.model, self.nodes = model, list(graph.node)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.weights]
        self.outputs = [o.name for o in graph.output]
        self.maker: dict[str, int] = {}
        self.fixed: set[int] = set()
        self.types: dict[str, int] = {i.name: i.type.tensor_type.elem_type for i in graph.input}
        self.types |= {name: tensor.data_type for name, tensor in self.weights.items()}
        self.reads: list[list[str]] = []  # by node: the tensors it takes from other nodes that are not fixed
        for number, node in enumerate(self.nodes):
            from_nodes = [n for n in dict.fromkeys(node.input) if n and n not in self.weights]
            reads = [n for n in from_nodes if self.maker.get(n) not in self.fixed]
            self.reads.append(reads)
            if not reads:
                self.fixed.add(number)
            self.maker |= dict.fromkeys(node.output, number)
            self.types |= dict.fromkeys(node.output, self.type_of(number))

    def type_of(self, number: int) -> int:
        node = self.nodes[number]
        if node.op_type == "Cast":
            return next(int(a.i) for a in node.attribute if a.name == "to")
        if node.op_type in OTHER_TYPES:
            return OTHER_TYPES[node.op_type]
        like = node.input[1 if node.op_type == "Where" else 0]
        kind: int = self.types.get(like, TensorProto.FLOAT)
        return kind

    def with_fixed(self, numbers: Iterable[int]) -> list[int]:
        """These nodes and the fixed ones that travel with them, in the file's order."""
        todo, found = list(numbers), set[int]()
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                makers = (self.maker.get(name) for name in self.nodes[number].input)
                todo += [maker for maker in makers if maker is not None and maker in self.fixed]
        return sorted(found)

    def taken(self, numbers: Iterable[int]) -> list[str]:
        """What these nodes read of others, constants left out."""
        inside = set(numbers)
        reads = [name for number in sorted(inside) for name in self.reads[number]]
        return [name for name in dict.fromkeys(reads) if self.maker.get(name) not in inside]

    def weights_of(self, numbers: Iterable[int]) -> list[str]:
        read = [name for number in numbers for name in self.nodes[number].input]
        return [name for name in dict.fromkeys(read) if name in self.weights]


@dataclass(frozen=True)
class Pair:
    """A node of the file and the blueprint's of the same name; None where there is none."""

    name: str
    file: int | None
    drawn: int | None


class Pairing:
    """File and blueprint in one order that suits both. Tensors go by the blueprint's names, `key`."""

    def __init__(self, file: Wiring, drawn: Wiring) -> None:
        self.file, self.drawn = file, drawn
        matched = self._matched()
        pairs = [Pair(file.nodes[f].name, f, d) for f, d in matched.items()]
        pairs += [Pair(node.name, n, None) for n, node in enumerate(file.nodes) if n not in matched]
        known = set(matched.values())
        pairs += [Pair(node.name, None, n) for n, node in enumerate(drawn.nodes) if n not in known]
        self.key = {name: name for name in file.inputs}  # tensor of the file -> its name here
        for pair in pairs:
            if pair.file is not None:
                theirs = file.nodes[pair.file].output
                ours = [f"file:{t}" for t in theirs] if pair.drawn is None else drawn.nodes[pair.drawn].output
                self.key |= dict(zip(theirs, ours, strict=True))
        self.pairs = self._ordered([pair for pair in pairs if not self._fixed(pair)])
        self.last_use: dict[str, int] = {}  # key -> place of the last pair that reads it
        for place, pair in enumerate(self.pairs):
            self.last_use |= dict.fromkeys(self._read(pair), place)

    def _matched(self) -> dict[int, int]:
        """Node of the file -> node of the blueprint; a name that occurs twice says nothing."""
        file, drawn = self.file, self.drawn
        counts = Counter(node.name for node in file.nodes)
        at = {node.name: number for number, node in enumerate(drawn.nodes)}
        matched = {
            f: at[node.name] for f, node in enumerate(file.nodes)
            if node.name in at and counts[node.name] == 1
            and len(node.output) == len(drawn.nodes[at[node.name]].output)
        }  # fmt: skip
        if 2 * len(matched) < len(drawn.nodes):
            raise InputError(
                f"graph '{drawn.model.graph.name}' shares {len(matched)} of {len(drawn.nodes)} node names with what "
                "this version exports\nit was written by another version, and its nodes cannot be placed\n"
                "export the checkpoint again with this version, or check with the version that wrote it"
            )
        return matched

    def _fixed(self, pair: Pair) -> bool:
        return (pair.file is None or pair.file in self.file.fixed) and (
            pair.drawn is None or pair.drawn in self.drawn.fixed
        )

    def _read(self, pair: Pair) -> set[str]:
        theirs = [] if pair.file is None else self.file.reads[pair.file]
        ours = [] if pair.drawn is None else self.drawn.reads[pair.drawn]
        return {self.key[name] for name in theirs} | set(ours)

    def made(self, pair: Pair) -> set[str]:
        theirs = [] if pair.file is None else self.file.nodes[pair.file].output
        ours = [] if pair.drawn is None else self.drawn.nodes[pair.drawn].output
        return {self.key[name] for name in theirs} | set(ours)

    def _ordered(self, pairs: list[Pair]) -> list[Pair]:
        """Each after all that either side reads; else as in the file, and what it lacks as late as it may be."""
        following, late = {}, len(self.file.nodes)
        for pair in sorted((p for p in pairs if p.drawn is not None), key=lambda p: p.drawn or 0, reverse=True):
            late = late if pair.file is None else pair.file
            following[pair] = late
        rank = {pair: (pair.file if pair.file is not None else following[pair], pair.file is not None, pair.drawn or 0)
                for pair in pairs}  # fmt: skip
        maker = {key: pair for pair in pairs for key in self.made(pair)}
        before = {pair: {maker[key] for key in self._read(pair) if key in maker} for pair in pairs}
        behind: dict[Pair, list[Pair]] = {pair: [] for pair in pairs}
        for pair, earlier in before.items():
            for one in earlier:
                behind[one].append(pair)
        ready = [(rank[pair], number) for number, pair in enumerate(pairs) if not before[pair]]
        numbers = {pair: number for number, pair in enumerate(pairs)}
        heapify(ready)
        order = []
        while ready:
            pair = pairs[heappop(ready)[1]]
            order.append(pair)
            for later in behind[pair]:
                before[later].discard(pair)
                if not before[later]:
                    heappush(ready, (rank[later], numbers[later]))
        if len(order) < len(pairs):
            stuck = next(pair for pair in pairs if before[pair])
            raise InputError(
                f"graph '{self.drawn.model.graph.name}': node '{stuck.name}' reads what the blueprint makes of it\n"
                "the file's order of nodes is not the exporter's, and its errors cannot be placed"
            )
        return order

    # ---------------------------------------------------------------------------------- how a node is unlike ours

    def unlike(self, pair: Pair) -> str:
        """What is not as the exporter writes it, of a node or the fixed ones before it. Empty where nothing is."""
        if pair.file is None or pair.drawn is None:
            return "the exporter writes no such node" if pair.drawn is None else "the file lacks it"
        found = [self._unlike(pair.file, pair.drawn)]
        theirs = {self.file.nodes[n].name: n for n in self.file.with_fixed([pair.file]) if n != pair.file}
        ours = {self.drawn.nodes[n].name: n for n in self.drawn.with_fixed([pair.drawn]) if n != pair.drawn}
        found += [f"{name} {said}" for name in theirs.keys() & ours.keys()
                  if (said := self._unlike(theirs[name], ours[name]))]  # fmt: skip
        return "; ".join(said for said in found if said)

    def _unlike(self, theirs: int, ours: int) -> str:
        a, b = self.file.nodes[theirs], self.drawn.nodes[ours]
        if (a.domain, a.op_type) != (b.domain, b.op_type):
            return f"is {operator_of(a.domain, a.op_type)} where the exporter writes {operator_of(b.domain, b.op_type)}"
        is_scan = a.domain == DOMAIN and a.op_type in OPERATORS
        has_a, has_b = ({x.name: helper.get_attribute_value(x) for x in node.attribute} for node in (a, b))
        if is_scan and has_a.get("has", 0) != has_b.get("has", 0):
            operator = OPERATORS[a.op_type]
            there, wanted = ([i.name for i in operator.present(has.get("has", 0))] for has in (has_a, has_b))
            lacks, more = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
            parts = [f"{verb} input {', '.join(n)}" for verb, n in (("lacks", lacks), ("has in addition", more)) if n]
            return f"{' and '.join(parts)}, other than the exporter writes it"
        for name in sorted(has_a.keys() | has_b.keys()):
            if has_a.get(name) != has_b.get(name):
                return f"has {name} {has_a.get(name)} where the exporter writes {has_b.get(name)}"
        if len(a.input) != len(b.input):
            return f"has {len(a.input)} inputs where the exporter writes {len(b.input)}"
        for mine, right in zip(a.input, b.input, strict=True):
            if self.key.get(mine, mine) != right:
                return f"reads {mine} where the exporter writes {right}"
            if mine in self.file.weights and right in self.drawn.weights and (said := self._unlike_values(mine, right)):
                return said
        return ""

    def _unlike_values(self, theirs: str, ours: str) -> str:
        a, b = self.file.weights[theirs], self.drawn.weights[ours]
        if a.data_type != b.data_type or list(a.dims) != list(b.dims):
            kinds = [f"{TensorProto.DataType.Name(t.data_type).lower()} {list(t.dims)}" for t in (a, b)]
            return f"reads {theirs} as {kinds[0]} where the exporter writes {kinds[1]}"
        if lies_outside(a) or lies_outside(b):
            return ""
        x, y = tensor_of(a), tensor_of(b)
        if torch.equal(x, y):
            return ""
        shown = [str(v.flatten()[:4].tolist()) for v in (x, y)] if x.numel() > 1 else [f"{v.item():g}" for v in (x, y)]
        return f"reads {theirs} with the value {shown[0]} where the exporter writes {shown[1]}"


def operator_of(domain: str, op_type: str) -> str:
    return ".".join(part for part in (domain, op_type) if part)
