"""The report: one text that is Markdown too, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mdm.plugins.gpu.torch_launch import LIMITS
from mdm.tools.gpu_check.about import About
from mdm.tools.gpu_check.cases import COMPILED, GOALS, MAMBA_SELECTIVE, MAMBA_SSD, Goal
from mdm.tools.gpu_check.counted import scan_name
from mdm.tools.gpu_check.measure import Ceilings, Time
from mdm.tools.gpu_check.sanitize import Sanitized
from mdm.tools.gpu_check.tables import short, table
from mdm.tools.gpu_check.times import Row
from mdm.tools.gpu_check.verify import Verified

FAULTS_SHOWN = 20
NAMED = 3  # scans of a note; of more it gives the number


@dataclass
class Report:
    """The parts that ran."""

    about: About
    verified: Verified | None = None
    sanitized: list[Sanitized] = field(default_factory=list)
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether what ran is right. Goals do not count."""
        return (self.verified is None or self.verified.holds) and all(one.holds for one in self.sanitized)


@dataclass(frozen=True)
class Verdict:
    """On one part of a goal."""

    goal: str
    found: str
    met: bool | None  # None: not measured


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    for goal in GOALS:
        yield from _verdicts(goal, next((row for row in rows if row.case == goal.case), None))


def _verdicts(goal: Goal, row: Row | None) -> Iterator[Verdict]:
    what = scan_name(goal.case)
    of_floor = row and row.times_floor
    yield Verdict(
        f"{what}: at most {goal.of_floor} times its floor",
        f"{of_floor:.2f} times" if of_floor else "not measured",
        of_floor <= goal.of_floor if of_floor else None,
    )
    faster = row and row.faster_than(goal.rival)
    yield Verdict(
        f"{what}: at least {goal.faster} times as fast as {goal.rival}",
        f"{faster:.2f} times" if faster else f"not measured: {row.notes.get(goal.rival) if row else 'not timed'}",
        faster >= goal.faster if faster else None,
    )


def markdown(report: Report) -> str:
    about = report.about
    lines = [
        f"# GPU check: {about.name}",
        "",
        f"{about.date}, `{about.command}`",
        "",
        f"{about.multiprocessors} multiprocessors of compute capability {'.'.join(map(str, about.capability))}, "
        f"at most {about.clock / 1e9:.3g} GHz; "
        + ", ".join(f"{name} {value}" for name, value in about.software.items()),
    ]
    if about.told:
        lines += ["", "nvidia-smi: " + ", ".join(f"{name} {value}" for name, value in about.told.items())]
    if report.verified is not None:
        lines += ["", *_verified(report.verified)]
    if report.sanitized:
        lines += ["", "## compute-sanitizer", ""]
        lines += [f"* {one.tool}: {'' if one.done else 'not run: '}{one.said}" for one in report.sanitized]
    if report.ceilings is not None:
        lines += ["", *_ceilings(report.ceilings)]
    if report.rows:
        lines += ["", *_times(report.rows)]
    return "\n".join([*lines, ""])


def _verified(found: Verified) -> Iterator[str]:
    yield "## Right against float64"
    yield ""
    yield f"{found.runs} runs of {found.cases} scans, {found.captured} also from a graph: {len(found.faults)} faults."
    if found.late:
        yield f"For {found.late} scans no time was left."
    yield ""
    rows = [
        (f"{kernel} {dtype}", image, str(tally.runs), f"{tally.worst:.2g}", f"{LIMITS[dtype]:.2g}")
        for (kernel, dtype, image), tally in sorted(found.tallies.items())
    ]
    yield from table(("kernel", "image", "runs", "worst error", "limit"), rows)
    for title, told in (
        ("Faults", [f"{fault.kernels}, {fault.case}: {fault.what}" for fault in found.faults]),
        ("Kernels that never ran", found.untried),
        ("Scans that could not be tried", [f"{case}: {why}" for case, why in sorted(found.skipped.items())]),
        ("Kernels that do not run here", [f"{key}: {why}" for key, why in sorted(found.left_out.items())]),
    ):
        if told:
            yield from ("", f"{title}:", "", *(f"* {line}" for line in told[:FAULTS_SHOWN]))
            if len(told) > FAULTS_SHOWN:
                yield f"* and {len(told) - FAULTS_SHOWN} more"


def _ceilings(found: Ceilings) -> Iterator[str]:
    yield "## Ceilings measured here"
    yield ""
    yield f"* copy within device memory: {found.bandwidth / 1e12:.3g} TB/s, read and written"
    yield f"* bfloat16 matrix product: {2 * found.products / 1e12:.3g} T operations/s"
    yield f"* a replay of next to nothing: {found.empty.median:.1f} µs, which is in every time below"


def _times(rows: list[Row]) -> Iterator[str]:
    yield "## Times"
    yield ""
    yield "Microseconds of a captured graph with cold caches: median (a tenth of the runs is faster, a tenth slower). "
    yield "The floor is counted, with the ceilings above. Rivals: median, and in brackets how many times ours."
    yield ""
    rivals = (MAMBA_SSD, MAMBA_SELECTIVE, COMPILED)
    head = ("scan", "ours µs", "floor µs", "bound by", "times floor", "of copy", "of matrix", *rivals)
    yield from table(head, [(*_ours(row), *(_rival(row, name) for name in rivals)) for row in rows])
    notes: dict[str, list[str]] = {}
    for row in rows:
        for name, why in row.notes.items():
            notes.setdefault(f"{name}: {why}", []).append(scan_name(row.case))
    if notes:
        yield ""
        for note, scans in notes.items():
            yield f"* {note} ({'; '.join(scans) if len(scans) <= NAMED else f'{len(scans)} scans'})"
    yield from ("", "## Goals", "")
    words = {True: "met", False: "MISSED", None: "not measured"}
    yield from table(("goal", "found", ""), [(v.goal, v.found, words[v.met]) for v in verdicts(rows)])


def _ours(row: Row) -> tuple[str, ...]:
    return (
        scan_name(row.case), _time(row.ours), short(row.floor), row.binding, f"{row.times_floor:.2f}",
        f"{row.bandwidth_share:.0%}", f"{row.products_share:.0%}",
    )  # fmt: skip


def _time(time: Time) -> str:
    return f"{short(time.median)} ({short(time.low)}-{short(time.high)})"


def _rival(row: Row, name: str) -> str:
    times = row.faster_than(name)
    return f"{short(row.rivals[name].median)} ({times:.2f}x)" if times else ""


def as_json(report: Report) -> dict[str, Any]:
    made: dict[str, Any] = {"holds": report.holds, "about": asdict(report.about)}
    if report.verified is not None:
        tallies = [
            {"kernel": kernel, "dtype": dtype, "image": image, "limit": LIMITS[dtype], "runs": tally.runs}
            | {"worst": tally.worst if math.isfinite(tally.worst) else str(tally.worst)}
            for (kernel, dtype, image), tally in sorted(report.verified.tallies.items())
        ]
        made["verified"] = asdict(replace(report.verified, tallies={})) | {"tallies": tallies}
    made["sanitized"] = [asdict(one) for one in report.sanitized]
    made["ceilings"] = report.ceilings and asdict(report.ceilings)
    made["times"] = [
        asdict(row) | {"case": vars(row.case) | {"operator": row.case.operator.name}, "times_floor": row.times_floor}
        for row in report.rows
    ]
    made["goals"] = [asdict(verdict) for verdict in verdicts(report.rows)] if report.rows else []
    return made


def write(report: Report, out: Path) -> list[Path]:
    """Both forms, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, content in (
        ("gpu_check.md", markdown(report)),
        ("gpu_check.json", json.dumps(as_json(report), indent=1, allow_nan=False) + "\n"),
    ):
        partial = out / f"{name}.part"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out / name)
        files.append(out / name)
    return files
