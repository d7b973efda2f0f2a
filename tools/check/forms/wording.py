"""What every form of a report says alike: verdicts in words, figures, and which figure of a finding counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mdm.tools.check.finding import SEVERITY, Finding, Verdict
from mdm.tools.check.report import Report

# What the command exits with, and what that means.
EXIT = {Verdict.PASS: "0", Verdict.AMBIGUOUS: "0, or 1 with --ambiguous fail", Verdict.FAIL: "1", Verdict.SKIPPED: "3"}
MEANING = {
    Verdict.PASS: "everything that ran is within its limits",
    Verdict.AMBIGUOUS: "nothing is beyond its limits, but a near tie fell the other way, which rounding alone explains",
    Verdict.FAIL: "the bundle computes something else than the model",
    Verdict.SKIPPED: "nothing was compared, which is no success",
}


@dataclass(frozen=True)
class Measure:
    """One of a finding's errors beside its floor and limit."""

    name: str  # "rms" or "worst"
    error: float | None
    floor: float | None
    limit: float | None

    @property
    def used(self) -> float | None:
        """The share of the limit; infinite where that is no number."""
        if self.error is None or self.limit is None:
            return None
        used = self.error / self.limit
        return math.inf if math.isnan(used) else used


def measures(finding: Finding) -> tuple[Measure, Measure]:
    three = (finding.error, finding.floor, finding.limits)
    return (
        Measure("rms", *(None if one is None else one.rms for one in three)),
        Measure("worst", *(None if one is None else one.worst for one in three)),
    )


def measure_of(finding: Finding) -> Measure | None:
    """The one that takes more of its limit."""
    return None if finding.error is None else max(measures(finding), key=lambda one: one.used or 0.0)


def used_of(finding: Finding) -> float | None:
    """Which share of its limit a finding takes; infinite where that is no number."""
    used = finding.used
    return math.inf if used is not None and math.isnan(used) else used


def worst_used(findings: Iterable[Finding]) -> float | None:
    return max((used for finding in findings if (used := used_of(finding)) is not None), default=None)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first: by verdict, then by the share of the limit."""
    return sorted(findings, key=lambda one: (-SEVERITY.index(one.verdict), -(used_of(one) or 0.0)))


def label(finding: Finding) -> str:
    return " ".join(part for part in (finding.subject, finding.part, finding.case) if part)


def counted(report: Report) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in report.counts().items())


def outcome(report: Report) -> str:
    return f"exit code {EXIT[report.verdict]}: {MEANING[report.verdict]}"


def number(value: float | None) -> str:
    """Two digits, as an error needs no more."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


def exact(value: float) -> str:
    """Five digits, of what is no error."""
    return f"{value:.5g}" if math.isfinite(value) else number(value)


def share(used: float | None) -> str:
    """Of a limit."""
    if used is None:
        return "–"
    if not math.isfinite(used):
        return "∞"
    if used >= 2:
        return f"{number(float(f'{used:.2g}'))} ×"
    return "< 0.1 %" if 0 < used < 1e-3 else f"{100 * used:.2g} %" if used < 1 else f"{100 * used:.0f} %"


def place(at: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, at))}]"
