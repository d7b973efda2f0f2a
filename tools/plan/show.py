"""A plan as tables for a person, at most 100 columns wide, and as plain values for a program."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdm.plugins.contract import SELECTIVE_SCAN, SSD_SCAN
from mdm.tools.inspect import plain_table, shown
from mdm.tools.plan.boundaries import Boundary
from mdm.tools.plan.plan import Finding, GraphPlan, Plan

WIDTH = 100
MOST_NAMED = 3  # op types of a graph


def show(plan: Plan, title: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(shown(title), style="bold")
    for table in (nodes(plan.graphs), memory(plan), boundaries(plan.graphs), targets(plan)):
        if table.row_count:
            console.print(table)
    console.print()
    for finding in plan.findings:
        console.print(said_of(finding), style="bold" if finding.stops else "")
    for line in advice(plan):
        console.print(line)


def nodes(graphs: Sequence[GraphPlan]) -> Table:
    columns: dict[str, Callable[[GraphPlan], str]] = {
        "plugins": lambda graph: _count(graph.placement.plugins),
        "bodies": lambda graph: _count(graph.placement.bodies),
        "loops x turns": _loops,
        "nobody": lambda graph: _count(graph.placement.nobody),
        "TensorRT": lambda graph: _count(graph.placement.tensorrt),
        "most of these": _most,
    }
    told = {name: cells for name, cell in columns.items() if any(cells := [cell(graph) for graph in graphs])}
    table = plain_table("graph", *told, title="\nWho computes the nodes")
    for graph, *cells in zip(graphs, *told.values(), strict=True):
        table.add_row(shown(graph.name), *map(shown, cells))
    return table


def _most(graph: GraphPlan) -> str:
    placed = graph.placement.tensorrt
    named = [f"{name} {count}" for name, count in placed.most_common(MOST_NAMED)]
    more = len(placed) - MOST_NAMED
    return ", ".join(named + [f"{more} more"] * (more > 0))


def _count(placed: Counter[str]) -> str:
    return str(placed.total() or "")


def _loops(graph: GraphPlan) -> str:
    turns = {n for n in graph.peak.loops if n is not None}
    return f"{len(graph.peak.loops)} x {_span(turns) if turns else '?'}" if graph.peak.loops else ""


def _span(numbers: set[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}-{most}"


def memory(plan: Plan) -> Table:
    table = plain_table(
        "graph", "weights", "between nodes", "in and out", "workspace", "together",
        title="\nMemory at the profile's largest shapes",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for graph in plan.graphs:
        parts = (graph.weights, graph.peak.bytes, graph.bindings, graph.workspace, graph.memory)
        table.add_row(shown(graph.name), *map(size, parts))
    return table


def size(number: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B" if number else "-"


def boundaries(graphs: Iterable[GraphPlan]) -> Table:
    table = plain_table("plugin", "graphs", "nodes", "takes", "gives", title="\nTypes at the plugins")
    for boundary, (count, names) in _merged(graphs).items():
        table.add_row(
            shown(boundary.operator), str(len(names)), str(count), shown(_takes(boundary)), boundary.gives or "?"
        )
    return table


def _merged(graphs: Iterable[GraphPlan]) -> dict[Boundary, tuple[int, list[str]]]:
    found: dict[Boundary, tuple[int, list[str]]] = {}
    for graph in graphs:
        for boundary, count in graph.boundaries.items():
            before, names = found.get(boundary, (0, []))
            found[boundary] = before + count, [*names, graph.name]
    return found


def _takes(boundary: Boundary) -> str:
    by_type: dict[str, list[str]] = {}
    for name, kind in boundary.takes:
        by_type.setdefault(kind or "?", []).append(name)
    return ", ".join(f"{kind}: {' '.join(names)}" for kind, names in by_type.items())


def targets(plan: Plan) -> Table:
    table = plain_table("target", "takes them", "what to know", title="\nWho takes these graphs")
    for one in plan.targets:
        table.add_row(one.target, one.takes, one.why)
    return table


def said_of(finding: Finding) -> Text:
    where = f" ({', '.join(finding.graphs)})" if finding.graphs else ""
    return shown(("Stops a build: " if finding.stops else "Note: ") + "; ".join(finding.message.splitlines()) + where)


def advice(plan: Plan) -> Iterator[str]:
    yield (
        "Between nodes is an estimate that counts each tensor alone: TensorRT fuses nodes, and gives its tactics "
        "workspace. TensorRT-RTX's builder took up to 8 MiB and, at real widths, "
        f"{'1.3 to 1.4' if plan.plugins else '1.1 to 2.7'} times that."
    )
    if len(plan.graphs) > 1:
        together = sum(graph.weights for graph in plan.graphs)
        yield (
            f"Engines share no weights: these {len(plan.graphs)} side by side hold {size(together)} of them, "
            f"the bundle {size(plan.distinct)}. Build those you run: --graph."
        )
    if any(graph.placement.bodies[SELECTIVE_SCAN.name] for graph in plan.graphs):
        yield "The body of a Mamba-1 scan is a loop over tokens, one after another: slow on a GPU. The plugin is not."
    elif any(graph.placement.bodies[SSD_SCAN.name] for graph in plan.graphs):
        yield "The body of a Mamba-2 scan is a loop over chunks of tokens: slower than the plugin."
    if plan.stops and plan.plugins:
        yield "mdm build would stop. If only our plugins are in the way, --bodies builds by the operators' ONNX bodies."


def as_values(plan: Plan) -> dict[str, Any]:
    return {
        "fits": not plan.stops,
        "graphs": [_graph(graph) for graph in plan.graphs],
        "weights": {"side_by_side": sum(graph.weights for graph in plan.graphs), "distinct": plan.distinct},
        "targets": [asdict(one) for one in plan.targets],
        "findings": [asdict(one) for one in plan.findings],
        "advice": list(advice(plan)),
    }


def _graph(graph: GraphPlan) -> Mapping[str, Any]:
    placed = graph.placement
    return {
        "graph": graph.name,
        "nodes": graph.nodes,
        "plugins": dict(placed.plugins),
        "bodies": dict(placed.bodies),
        "tensorrt": dict(placed.tensorrt.most_common()),
        "nobody": dict(placed.nobody),
        "loops": list(graph.peak.loops),
        "types": [
            {"operator": one.operator, "nodes": count, "takes": dict(one.takes), "gives": one.gives}
            for one, count in graph.boundaries.items()
        ],
        "memory": {
            "weights": graph.weights,
            "between_nodes": graph.peak.bytes,
            "largest_at": graph.peak.at,
            "in_and_out": graph.bindings,
            "workspace": graph.workspace,
            "together": graph.memory,
        },
    }
