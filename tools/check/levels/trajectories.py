"""Level "trajectories": whole runs of a task, evaluation by evaluation.

Free-running errors build up; teacher-forced, every evaluation starts from the true state. One bad step shows as a peak
of the second, slow growth only in the first. Before that, the table itself: with the standard's noise estimates it has
to lead where the standard's own solver went.

How far a free run drifts is no measure of arithmetic: a sample that is near a decision multiplies its rounding a
hundredfold (measured in fp16), and another rounding would not. So each of its evaluations is held to the floor from
where the backend itself stood; if all are right, a run that still ends far away is AMBIGUOUS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mdm.plugins.errors import MdmError, in_one_line
from mdm.tools.check.finding import Array, Difference, Finding, Limits, Verdict, difference, worst_of
from mdm.tools.check.levels.texts import compare_masks, tie_of, unrest_of
from mdm.tools.check.limits import TIES, Multiples, amounts, steadied, table_limits
from mdm.tools.check.report import Drift
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.standard import Deployed, Run, State, Walk
from mdm.tools.check.standards.walk import OnBackend, walk

LEVEL = "trajectories"
# Of a table's path, by the types that the standard has its estimates and its points in. In float32 an estimate's
# rounding is multiplied by sigma / alpha, some 800 at the start of a run.
PATH_LIMIT = {("float64", "float64"): 1e-9, ("float64", "float32"): 1e-6}
COARSE = 1e-3


def check_run(
    run: Run, engine: OnBackend, spread: Spread, precision: str, multiples: Multiples
) -> Iterator[Finding | Drift]:
    if run.points is not None:
        yield check_table(run, run.points)
    try:
        walked = walk(run, engine.advance)
        ours = None if run.deployed is None else run.deployed.walk(run)
    except MdmError as error:
        yield Finding(LEVEL, run.task, "", run.label, Verdict.FAIL, in_one_line(error))
        return
    free, forced = errors(run, walked.free), errors(run, walked.forced)
    table, single = table_limits(precision, run=True), [table_limits(precision)] * len(run)
    if "mask" in run.states[0]:
        yield check_selection(run, walked, ours, spread, TIES[precision], multiples)
    if run.deployed is None or ours is None:
        yield judged(run, "free-running", free, None, [table] * len(run))
        yield judged(run, "teacher-forced", forced, None, single)
        yield Drift(run.task, run.seed, mean(free), mean(forced), limit=[limit.rms for limit in single])
        return
    floor, single = limits_of(run, walked, run.deployed, precision, multiples)
    shadows = judged(run, "free-running", shadowed(run, walked, run.deployed), floor, both_sides(single))
    yield far_or_near(shadows, free, table)
    yield judged(run, "teacher-forced", forced, floor, single)
    yield Drift(
        run.task, run.seed, mean(free), mean(forced), mean(errors(run, ours.free)), mean(floor),
        [limit.rms for limit in single],
    )  # fmt: skip


def limits_of(
    run: Run, walked: Walk, deployed: Deployed, precision: str, multiples: Multiples
) -> tuple[list[Difference], list[Limits]]:
    """The floor of each evaluation, and its limit."""
    floors, dtype = steadied(errors(run, deployed.walk(run).forced)), walked.free[0]["base"].dtype.name
    return floors, [multiples.limits_or(table_limits(precision), floor, dtype) for floor in floors]


def shadowed(run: Run, walked: Walk, deployed: Deployed) -> list[Difference]:
    """The free run's evaluations, each against what the model makes, in the graph's types, of the state before it."""
    off = []
    for k, after in enumerate(walked.free):
        before = run.states[0] if k == 0 else walked.free[k - 1]
        if "mask" in before:
            before = before | {"mask": run.states[k]["mask"]}
        found, expected = run.result(after, k), run.result(deployed.advance(run, k, before), k)
        # Whoever is not finite first has the backend at fault: the standard's own run is.
        off.append(difference(np.where(np.isfinite(expected), found, np.nan), np.nan_to_num(expected)))
    return off


def all_right(run: Run, walked: Walk, deployed: Deployed, precision: str, multiples: Multiples) -> bool:
    """Whether every evaluation of a free run is within its limit from where the backend stood."""
    _, limits = limits_of(run, walked, deployed, precision, multiples)
    off = shadowed(run, walked, deployed)
    return all(limit.used(error) <= 1 for limit, error in zip(both_sides(limits), off, strict=True))


def both_sides(limits: Sequence[Limits]) -> list[Limits]:
    """Of a difference in which either side rounds, and may take its limit: it is compared with no exact value."""
    return [Limits(2 * one.rms, 2 * one.worst, f"twice {one.source}") for one in limits]


def far_or_near(finding: Finding, free: Sequence[Difference], table: Limits) -> Finding:
    """A free run whose evaluations are all right, by where it ends."""
    end = (("error at the end", free[-1].rms),)
    if finding.verdict is Verdict.PASS and not table.used(free[-1]) <= 1:
        said = f"ends {free[-1].rms:.2g} off, though every evaluation is right from where it stood: a near decision"
        return replace(finding, verdict=Verdict.AMBIGUOUS, said=said, figures=end)
    return replace(finding, figures=end)


def mean(errors: Sequence[Difference]) -> list[float]:
    return [error.rms for error in errors]


def check_table(run: Run, points: Array) -> Finding:
    """The path of the runtime's table, evaluation by evaluation to its end, against the standard's own solver."""
    off = [difference(run.result(run.states[k + 1], k), point) for k, point in enumerate(points)]
    limit = PATH_LIMIT.get((run.recorded, points.dtype.name), COARSE)
    limits = Limits(limit, limit, f"for estimates recorded in {run.recorded}")
    return judged(run, "table", off, None, [limits] * len(off))


def check_selection(
    run: Run, walked: Walk, ours: Walk | None, spread: Spread, tie: float, multiples: Multiples
) -> Finding:
    """The tokens that each evaluation selects for the next one, from the true state: flips are for near ties alone."""
    given, flips, verdicts = run.inputs["given"], 0, [(Verdict.PASS, "")]
    for k in range(1, len(run) - 1):  # the first one selects all, the last one for nobody
        before, after = run.states[k]["x0_before"], run.states[k + 1]
        row = spread.columns(run.rows[k])
        unrest = unrest_of(row, after["x0_before"], before, given)
        if ours is not None:
            tie = tie_of(unrest_of(row, ours.forced[k]["x0"], before, given), unrest, multiples.worst)
        for found, truth, moved in zip(walked.forced[k]["mask"], after["mask"], unrest, strict=True):
            count, verdict, said = compare_masks(found, truth, moved, tie)
            flips += count
            verdicts.append((verdict, f"evaluation {k + 1}: {said}"))
    verdict = worst_of(one for one, _ in verdicts)
    said = "" if verdict is Verdict.PASS else next(said for one, said in verdicts if one is verdict)
    return Finding(LEVEL, run.task, "selection", run.label, verdict, said, figures=(("flips", float(flips)),))


def errors(run: Run, states: Sequence[State]) -> list[Difference]:
    return [difference(run.result(state, k), run.result(run.states[k + 1], k)) for k, state in enumerate(states)]


def judged(
    run: Run, part: str, found: Sequence[Difference], floors: Sequence[Difference] | None, limits: Sequence[Limits]
) -> Finding:
    """The evaluation that takes most of its limit speaks for all."""
    used = [limit.used(error) for error, limit in zip(found, limits, strict=True)]
    k = int(np.argmax(used))
    error, limit = found[k], limits[k]
    said = ""
    if not used[k] <= 1:
        said = f"after evaluation {k + 1} of {len(run)}: "
        said += amounts(error, limit) if np.isfinite(error.rms) else "not finite"
    shape = run.states[0]["base"].shape
    verdict = Verdict.FAIL if said else Verdict.PASS
    return Finding(LEVEL, run.task, part, run.label, verdict, said, shape, error, floors[k] if floors else None, limit)
