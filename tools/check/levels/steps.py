"""Level "steps": each graph once, on the standard's inputs, every output held to its limits.

What a graph chooses, pieces of text and the selection, is no number: it must be the standard's choice, except where
the standard itself was near a tie.

Letters: B samples, L latent tokens, d latent width, V vocabulary, R columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mdm.plugins.errors import MdmError, in_one_line
from mdm.runtime.model import Model
from mdm.tools.check.finding import Array, Finding, Limits, Verdict, difference, worst_of
from mdm.tools.check.levels.texts import compare_ids, compare_masks, tie_of, tie_of_logits, unrest_of
from mdm.tools.check.limits import TIES, Multiples, amounts, table_limits
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.standard import Case, Standard, State

LEVEL = "steps"


def check_graph(standard: Standard, model: Model, graph: str, multiples: Multiples) -> Iterator[Finding]:
    if reason := model.backend.lacks(graph):
        yield Finding(LEVEL, graph, "", "", Verdict.SKIPPED, reason)
        return
    there = False
    for case in standard.cases(graph):
        there = True
        try:
            loaded = model.backend.graph(graph)
            names = [name for name in loaded.outputs if name in case.expected]
            found = dict(zip(names, loaded.run(names, **case.inputs), strict=True))
        except MdmError as error:
            yield Finding(LEVEL, graph, "", case.label, Verdict.FAIL, in_one_line(error))
            continue
        for name in sorted(set(case.expected) - set(found)):
            yield Finding(LEVEL, graph, name, case.label, Verdict.FAIL, "the graph has no such output")
        yield from compare(model, graph, case, found, standard.precision, multiples)
    if not there:
        yield Finding(LEVEL, graph, "", "", Verdict.SKIPPED, f"{standard.name} has nothing for this graph")


def compare(
    model: Model, graph: str, case: Case, found: State, precision: str, multiples: Multiples
) -> Iterator[Finding]:
    for name, value in found.items():
        truth = case.expected[name]
        if value.shape != truth.shape:
            said = f"its shape is {list(value.shape)}, expected {list(truth.shape)}"
            yield Finding(LEVEL, graph, name, case.label, Verdict.FAIL, said)
        elif value.dtype.kind != truth.dtype.kind:
            said = f"its type is {value.dtype}, expected that of {truth.dtype}"
            yield Finding(LEVEL, graph, name, case.label, Verdict.FAIL, said)
        elif name == "ids":
            yield choice_of_ids(graph, case, value, precision, multiples)
        elif name == "mask_next":
            spread = Spread(model, graph, value.shape[1])
            yield choice_of_mask(graph, case, value, spread, precision, multiples)
        else:
            deployed = None if case.deployed is None else case.deployed[name]
            yield held(LEVEL, graph, name, case.label, value, truth, deployed, table_limits(precision), multiples)


def held(
    level: str, subject: str, part: str, case: str, found: Array, truth: Array, deployed: Array | None,
    table: Limits, multiples: Multiples,
) -> Finding:  # fmt: skip
    """A tensor against the true one: by its noise floor where the model's own answer in deployed types is there."""
    if found.shape != truth.shape:
        said = f"its shape is {list(found.shape)}, expected {list(truth.shape)}"
        return Finding(level, subject, part, case, Verdict.FAIL, said, found.shape)
    error, floor = difference(found, truth), None if deployed is None else difference(deployed, truth)
    limits = multiples.limits_or(table, floor, found.dtype.name)
    said = ""
    if error.bad:
        said = f"{error.bad} of {found.size} values are not finite, the first at {list(error.at)}; they should be"
    elif np.isnan(error.rms):
        said = "the standard's own values are not finite"
    elif limits.used(error) > 1:
        said = amounts(error, limits)
    verdict = Verdict.FAIL if said else Verdict.PASS
    return Finding(level, subject, part, case, verdict, said, found.shape, error, floor, limits)


def choice_of_ids(graph: str, case: Case, found: Array, precision: str, multiples: Multiples) -> Finding:
    """Pieces of text: the largest logit of each token."""
    logits = case.expected["logits"]
    best = np.sort(logits, axis=-1)
    tie = TIES[precision]
    if case.deployed is not None:
        tie = tie_of_logits(case.deployed["logits"], logits, multiples.worst, tie)
    rows = zip(found, case.expected["ids"], best[..., -1] - best[..., -2], strict=True)
    judged = [compare_ids(*row, tie) for row in rows]
    return chosen(graph, "ids", case.label, found, judged)


def choice_of_mask(
    graph: str, case: Case, found: Array, spread: Spread, precision: str, multiples: Multiples
) -> Finding:
    """The selection: the tokens that moved least. A first evaluation selects all, whatever moved."""
    row = spread.columns(case.inputs["row"].astype(np.float64))
    before, given = case.inputs["x0_before"], case.inputs["given"]
    unrest = unrest_of(row, case.expected["x0"], before, given)
    tie = TIES[precision]
    if case.deployed is not None:
        tie = tie_of(unrest_of(row, case.deployed["x0"], before, given), unrest, multiples.worst)
    judged = [compare_masks(*row, tie) for row in zip(found, case.expected["mask_next"], unrest, strict=True)]
    return chosen(graph, "mask_next", case.label, found, [(float(n), verdict, said) for n, verdict, said in judged])


def chosen(graph: str, part: str, case: str, found: Array, judged: list[tuple[float, Verdict, str]]) -> Finding:
    verdict = worst_of(one for _, one, _ in judged)
    said = next((said for _, one, said in judged if one is verdict), "") if verdict is not Verdict.PASS else ""
    figure = (("agreement" if part == "ids" else "flips", sum(number for number, _, _ in judged) / len(judged)),)
    return Finding(LEVEL, graph, part, case, verdict, said, found.shape, figures=figure)
