"""Level "blocks": a graph part by part against the model, and where they first part ways.

Two comparisons. The blueprint's outputs with the PyTorch model's, both in float64: nothing but a mistake of the
exporter can tell them apart. Then the bundle's graph on its backend with the blueprint, tensor by tensor (`bisect.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import ModelProto

from mdm.export.truth import Arrays, points_of
from mdm.plugins.errors import MdmError, in_one_line
from mdm.runtime.ort import engine_errors
from mdm.tools.check.finding import Array, Finding, Limits, Verdict, difference
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes.bisect import bisect
from mdm.tools.check.nodes.sessions import session_on
from mdm.tools.check.nodes.submodel import Run
from mdm.tools.check.nodes.wiring import operator_of
from mdm.tools.check.report import BlockErrors, Divergence
from mdm.tools.check.standards.live import ReferenceStandard, words_of

LEVEL = "blocks"
DEFAULT = "ort-cpu"  # of mdm check
# Of graph and model, both in float64. What stays is the graph's constants, kept in float32: the frequencies of time
# alone bring 1e-6.
SAME = Limits(1e-5, 1e-5, "both in float64")


@dataclass(frozen=True)
class Placer:
    """`folder`: for the sub-models of what diverges."""

    standard: ReferenceStandard
    multiples: Multiples
    folder: Path | None

    def __call__(self, graph: str) -> Iterator[Finding | BlockErrors | Divergence]:
        """A finding for each seed; the errors along the graph for the first, up to the first that diverges."""
        if graph not in self.standard.blueprint.built:
            said = "this version of the exporter does not draw it (an image autoencoder is named with --autoencoder)"
            yield Finding(LEVEL, graph, "", "", Verdict.SKIPPED, said)
            return
        for seed in self.standard.seeds:
            spec = self.standard.blueprint.spec(graph)
            points = points_of(spec, self.standard.blueprint.plan.config)
            point = points[seed % len(points)]
            case = f"seed {seed}, {words_of(point)}"
            inputs = self.standard.blueprint.truth.inputs(spec, point, seed)
            yield from self.drawn_right(graph, case, inputs)
            try:
                errors, divergence = self.bisected(graph, inputs)
            except MdmError as error:
                yield Finding(LEVEL, graph, "nodes", case, Verdict.FAIL, in_one_line(error))
                return
            name = self.standard.model.backend.name
            if divergence and divergence.reproduce and name != DEFAULT:  # elsewhere it may be right
                divergence = replace(divergence, reproduce=f"{divergence.reproduce} --backend {name}")
            yield summary(graph, case, errors, divergence)
            if divergence or seed == self.standard.seeds[0]:
                yield errors
            if divergence:
                yield divergence
                return

    def bisected(self, graph: str, inputs: Arrays) -> tuple[BlockErrors, Divergence | None]:
        blueprint = self.standard.blueprint
        return bisect(
            graph, onnx.load_from_string(self.standard.model.bundle.graph_bytes(graph)), blueprint.model(graph),
            lambda name: blueprint.value(graph, name), inputs, self.on_engine(graph), self.multiples,
            None if self.folder is None else self.folder / graph,
        )  # fmt: skip

    def drawn_right(self, graph: str, case: str, inputs: Arrays) -> Iterator[Finding]:
        """The blueprint's outputs in float64, against the model's."""
        blueprint = self.standard.blueprint
        truth = blueprint.truth.outputs(blueprint.spec(graph), inputs)
        drawn = blueprint.evaluation(graph, exact=True).run(inputs)
        for name, expected in truth.items():
            found = drawn[name].numpy()
            if found.dtype.kind != "f":
                continue  # decisions: of their numbers is spoken
            error = difference(found, expected)
            off = not SAME.used(error) <= 1
            said = f"the exporter draws '{name}' otherwise than the model: off by {error.rms:.2g}" if off else ""
            yield Finding(
                LEVEL, graph, f"blueprint, {name}", case, Verdict.FAIL if off else Verdict.PASS, said, found.shape,
                error, None, SAME,
            )  # fmt: skip

    def on_engine(self, graph: str) -> Run:
        backend = self.standard.model.backend

        def run(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
            operators = {operator_of(node.domain, node.op_type) for node in model.graph.node}
            session = session_on(backend, model.SerializeToString(), graph, operators)
            with engine_errors(f"a part of graph '{graph}'"):
                return list(session.run(wanted, feeds))

        return run


def summary(graph: str, case: str, errors: BlockErrors, divergence: Divergence | None) -> Finding:
    """The bisection in one line, with the part whose own error is the largest multiple of its floor."""
    times = max((own / floor for own, floor in zip(errors.own, errors.own_floor, strict=True) if floor), default=0.0)
    if divergence is None:
        return Finding(LEVEL, graph, "nodes", case, Verdict.PASS, figures=(("times floor", times),))
    said = f"{divergence.node} ({divergence.op}) {divergence.said}"
    return Finding(
        LEVEL, graph, "nodes", case, Verdict.FAIL, said, figures=(("times floor", times),),
        reproduce=divergence.reproduce,
    )  # fmt: skip
