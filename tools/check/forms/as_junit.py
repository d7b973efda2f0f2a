"""junit.xml: one test case for each finding, as CI services read it.

JUnit knows no AMBIGUOUS. It is written as skipped, with its reason: CI services show that apart from a pass and do not
turn red for it, while a note in `system-out` is out of sight.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from mdm.tools.check.finding import LEVELS, Finding, Verdict
from mdm.tools.check.forms.wording import Measure, exact, label, measure_of, number, place, share, used_of
from mdm.tools.check.report import Report

# All that XML 1.0 cannot hold, not even as a reference.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONGEST = 2000  # characters of a line: a reproduce command is far shorter


def as_junit(report: Report) -> str:
    suites = element(None, "testsuites", name="mdm check", **tally(report.findings))
    for level in LEVELS:
        findings = report.of_level(level)
        if not findings:
            continue
        seconds = f"{report.seconds.get(level, 0.0):.3f}"
        suite = element(suites, "testsuite", name=f"mdm.check.{level}", time=seconds, **tally(findings))
        if report.created:
            suite.set("timestamp", sound(report.created))
        about = {"bundle": report.bundle, "backend": report.backend, "against": report.against}
        properties(suite, about | report.fingerprint)
        for finding in findings:
            add_case(suite, finding)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def add_case(suite: ElementTree.Element, finding: Finding) -> None:
    case = element(suite, "testcase", classname=f"mdm.check.{finding.level}", name=label(finding))
    measure = measure_of(finding)
    properties(case, figures(finding, measure))
    if finding.verdict is Verdict.FAIL:
        failure = element(case, "failure", message=one_line(finding.said or "beyond its limit"), type="ParityError")
        failure.text = sound("\n".join(explained(finding, measure)))
    elif finding.verdict in (Verdict.AMBIGUOUS, Verdict.SKIPPED):
        said = f"{finding.verdict}: {finding.said}" if finding.verdict is Verdict.AMBIGUOUS else finding.said
        element(case, "skipped", message=one_line(said))


def figures(finding: Finding, measure: Measure | None) -> dict[str, str]:
    made: dict[str, float] = {}
    if finding.error is not None:
        made = {"rms": finding.error.rms, "worst": finding.error.worst, "cosine": finding.error.cosine}
    if measure is not None and measure.floor is not None:
        made[f"{measure.name} floor"] = measure.floor
    if measure is not None and measure.limit is not None:
        made[f"{measure.name} limit"] = measure.limit
    if (used := used_of(finding)) is not None:
        made["used"] = used
    return {name: f"{value:.6g}" for name, value in (made | dict(finding.figures)).items()}


def explained(finding: Finding, measure: Measure | None) -> list[str]:
    """At most seven lines."""
    lines = [finding.said or "beyond its limit"]
    if measure is not None and finding.error is not None:
        error, limits = finding.error, finding.limits
        lines.append(f"{measure.name} error {number(measure.error)}, floor {number(measure.floor)}")
        if limits is not None:
            used = share(used_of(finding))
            lines.append(f"limit {number(measure.limit)} ({limits.source}), used: {used}")
        where = f"worst at {place(error.at)} of {place(finding.shape)}"
        lines.append(f"{where}: found {exact(error.found)}, truth {exact(error.truth)}")
        if error.bad:
            lines.append(f"{error.bad} values are not finite")
    if finding.reproduce:
        lines += ["reproduce:", finding.reproduce]
    return [one_line(line) for line in lines]


def tally(findings: list[Finding]) -> dict[str, str]:
    verdicts = [finding.verdict for finding in findings]
    skipped = verdicts.count(Verdict.SKIPPED) + verdicts.count(Verdict.AMBIGUOUS)
    counts = {"tests": len(verdicts), "failures": verdicts.count(Verdict.FAIL), "errors": 0, "skipped": skipped}
    return {name: str(count) for name, count in counts.items()}


def properties(parent: ElementTree.Element, values: dict[str, str]) -> None:
    if values:
        holder = element(parent, "properties")
        for name, value in values.items():
            element(holder, "property", name=name, value=value)


def element(parent: ElementTree.Element | None, tag: str, **attributes: str) -> ElementTree.Element:
    made = ElementTree.Element(tag, {name: sound(value) for name, value in attributes.items()})
    if parent is not None:
        parent.append(made)
    return made


def sound(text: str) -> str:
    return NO_XML.sub("\ufffd", text)


def one_line(text: str) -> str:
    return " ".join(text.splitlines())[:LONGEST]
