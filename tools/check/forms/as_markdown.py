"""summary.md: what a CI job's page shows. Nothing in a name or message can break out of its cell or become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mdm.tools.check.finding import LEVELS, Finding, Verdict
from mdm.tools.check.forms.history import Trend
from mdm.tools.check.forms.wording import counted, label, measure_of, number, outcome, ranked, share, used_of
from mdm.tools.check.report import Divergence, Report

SIGNS = {Verdict.PASS: "✅", Verdict.AMBIGUOUS: "🟡", Verdict.FAIL: "❌", Verdict.SKIPPED: "⚪"}
MOST = 200  # findings told of one by one: GitHub shows 1 MiB of a summary
RUNS = 10  # of the trend
BREAK = "  \n"  # a line end that stays one


def as_markdown(report: Report, history: Trend | None = None) -> str:
    blocks = [
        f"## {SIGNS[report.verdict]} {report.verdict}: {escaped(report.bundle)} on {escaped(report.backend)}",
        f"{counted(report)}. Compared with {escaped(report.against)}; {outcome(report)}.",
    ]
    open_findings = [one for one in report.findings if one.verdict in (Verdict.FAIL, Verdict.AMBIGUOUS)]
    if open_findings:
        blocks += ["### What did not pass", *(told(one) for one in ranked(open_findings)[:MOST])]
        if len(open_findings) > MOST:
            blocks.append(f"{len(open_findings) - MOST} more are in report.html.")
    if report.divergences:
        blocks += ["### Where it first diverges", *map(divergence, report.divergences)]
    for level in LEVELS:
        findings = report.of_level(level)
        if findings:
            blocks += [f"### {level.capitalize()}", level_table(findings)]
    if history is not None:
        blocks += ["### Trend", trend_table(history)]
    if report.command:
        blocks += ["Make this report again:", fenced(report.command)]
    return "\n\n".join(blocks) + "\n"


def told(finding: Finding) -> str:
    measure = measure_of(finding)
    head = f"**{SIGNS[finding.verdict]} {finding.verdict}** {finding.level}: **{escaped(label(finding))}**"
    lines = [f"{head}. {escaped(finding.said)}".strip()]
    if measure is not None:
        limit = f"limit {number(measure.limit)}, used {share(used_of(finding))}"
        lines.append(f"{measure.name} error {number(measure.error)}, floor {number(measure.floor)}, {limit}.")
    return BREAK.join(lines) + (f"\n\n{fenced(finding.reproduce)}" if finding.reproduce else "")


def divergence(one: Divergence) -> str:
    shapes = ", ".join(f"{name} {shape}" for name, shape in [*one.inputs.items(), *one.outputs.items()])
    lines = [
        f"**{escaped(one.graph)}**: node **{escaped(one.node)}** ({escaped(one.op)}, {escaped(one.dtype)}) of "
        f"{escaped(one.module)}. {escaped(one.said)}",
        f"Own error {number(one.error)}, floor {number(one.floor)}. Shapes: {escaped(shapes)}.",
    ]
    if one.folder:
        lines.append(f"The smallest sub-model with its inputs: {escaped(one.folder)}")
    return BREAK.join(lines) + (f"\n\n{fenced(one.reproduce)}" if one.reproduce else "")


def level_table(findings: Sequence[Finding]) -> str:
    """The worst finding of each subject."""
    worst: dict[str, Finding] = {}
    for finding in ranked(findings):
        worst.setdefault(finding.subject, finding)
    rows = []
    for subject, finding in worst.items():
        measure = measure_of(finding)
        figures = ["–"] * 3
        if measure is not None:
            figures = [f"{number(measure.error)} {measure.name}", number(measure.floor), number(measure.limit)]
        verdict = f"{SIGNS[finding.verdict]} {finding.verdict}"
        which = " ".join(part for part in (finding.part, finding.case) if part)
        rows.append([verdict, escaped(subject), escaped(which), *figures, share(used_of(finding))])
    return table(["verdict", "subject", "worst at", "error", "floor", "limit", "used"], rows)


def trend_table(history: Trend) -> str:
    levels = [level for level in LEVELS if any(level in point.used for point in history.points)]
    rows = [
        [f"{point.created:%Y-%m-%d %H:%M}", point.verdict.value, *(share(point.used.get(level)) for level in levels)]
        for point in history.points[-RUNS:]
    ]
    left_out = f"\n\n{history.skipped} files were no sound reports and are left out." if history.skipped else ""
    return table(["created (UTC)", "verdict", *levels], rows) + left_out


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Plain text on one line."""
    line = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$@:-])", r"\\\1", line)


def fenced(text: str) -> str:
    """As it is, in a block that no run of backticks inside can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{printable(text)}\n{fence}"


def printable(text: str) -> str:
    """Who shows the file in a terminal is not steered by it."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
