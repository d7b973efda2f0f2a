"""report.html: a report as one page that needs no network and runs no script.

From top to bottom: what came out, what was compared, what failed, and then the evidence. Nothing in it can load or run
anything: the policy in its head allows its own styles and pictures alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mdm.tools.check.finding import LEVELS, Finding, Verdict
from mdm.tools.check.forms.charts import Line, headroom, log_chart
from mdm.tools.check.forms.history import Point, Trend
from mdm.tools.check.forms.html_samples import picture_cards, text_cards
from mdm.tools.check.forms.markup import Content, Markup, tag
from mdm.tools.check.forms.wording import (
    counted,
    exact,
    label,
    measure_of,
    measures,
    number,
    outcome,
    place,
    ranked,
    share,
    used_of,
    worst_used,
)
from mdm.tools.check.report import BlockErrors, Divergence, Drift, Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
ICONS = {Verdict.PASS: "✓", Verdict.AMBIGUOUS: "≈", Verdict.FAIL: "✗", Verdict.SKIPPED: "–"}
SHOWN_ROWS, SHOWN_CARDS, SHOWN_GRAPHS = 10, 12, 2  # before the rest is folded away
MOST_LETTERS = 18  # of a part's name below a chart
OPEN = (Verdict.FAIL, Verdict.AMBIGUOUS)


def as_html(report: Report, history: Trend | None = None) -> str:
    title = f"{report.verdict}: {report.bundle} on {report.backend}"
    sections = [made for make in SECTIONS for made in make(report)] + (trend(history) if history else [])
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("title", title), tag("style", STYLE),
    )  # fmt: skip
    body = tag("body", banner(report), tag("main", about(report), sections, seconds(report)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def banner(report: Report) -> Markup:
    verdict = report.verdict
    words = [
        tag("p", f"mdm check: {report.bundle} on {report.backend} against {report.against}", class_="kind"),
        tag("h1", icon(verdict), verdict.value),
        tag("p", counted(report), class_="counts"),
        tag("p", outcome(report)),
    ]
    return tag("header", tag("div", words), class_=f"banner {verdict.lower()}")


def about(report: Report) -> list[Markup]:
    compared = {
        "bundle": report.bundle, "backend": report.backend, "against": report.against, "created": report.created,
        "limits": ", ".join(f"{multiple:g} × floor ({name})" for name, multiple in report.multiples.items()),
    }  # fmt: skip
    made = [tag("h2", "What was compared"), facts({name: value for name, value in compared.items() if value})]
    if report.command:
        made.append(tag("pre", report.command))
    if report.fingerprint:
        made += [tag("h3", "Fingerprint"), facts(report.fingerprint)]
    return [tag("section", made)]


def failures(report: Report) -> list[Markup]:
    cards = [divergence_card(one) for one in report.divergences]
    cards += [finding_card(one) for one in ranked(report.findings) if one.verdict in OPEN]
    if not cards:
        return []
    folded = fold(f"{len(cards) - SHOWN_CARDS} more", cards[SHOWN_CARDS:])
    return [tag("section", tag("h2", "What did not pass"), cards[:SHOWN_CARDS], folded)]


def divergence_card(one: Divergence) -> Markup:
    told: dict[str, Content] = {
        "graph": one.graph, "node": one.node, "module": one.module, "op": one.op, "type": one.dtype,
        "inputs": shapes(one.inputs), "outputs": shapes(one.outputs),
        "own error": f"{number(one.error)} rms, floor {number(one.floor)}{times(one.error, one.floor)}",
        "sub-model": one.folder,
    }  # fmt: skip
    told = {name: value for name, value in told.items() if value}
    title = tag("h3", icon(Verdict.FAIL), f"{one.graph} first diverges at {one.node}")
    return tag("article", title, tag("p", one.said), facts(told), command(one.reproduce), class_="card fail")


def shapes(tensors: dict[str, list[int]]) -> list[Markup]:
    return [tag("div", f"{name} {place(tuple(shape))}") for name, shape in tensors.items()]


def times(error: float, floor: float) -> str:
    return f": {number(error / floor)} times as much" if floor > 0 else ""


def finding_card(finding: Finding) -> Markup:
    tags = [tag("span", word, class_="tag") for word in (finding.level, finding.verdict.value)]
    title = tag("h3", icon(finding.verdict), label(finding), tags)
    content: list[Content] = [title, tag("p", finding.said)]
    error, limits = finding.error, finding.limits
    if error is not None:
        rows = [
            (one.name, number(one.error), number(one.floor), number(one.limit), share(one.used))
            for one in measures(finding)
        ]
        figures = table(("", "error", "floor", "limit", "used"), rows, "figures")
        told: dict[str, Content] = {
            "shape": place(finding.shape), "worst at": place(error.at),
            "there": f"bundle {exact(error.found)}, model {exact(error.truth)}",
            "cosine": exact(error.cosine), "99 % within": number(error.p99),
            "limit from": limits.source if limits else None,
            "not finite": f"{error.bad} values" if error.bad else None,
        }  # fmt: skip
        told |= {name: exact(value) for name, value in finding.figures}
        known = facts({name: value for name, value in told.items() if value})
        content.append(tag("div", figures, known, class_="beside"))
    return tag("article", content, command(finding.reproduce), class_=f"card {finding.verdict.lower()}")


def icon(verdict: Verdict) -> Markup:
    return tag("span", ICONS[verdict], class_="icon", aria_hidden="true")


def command(text: str) -> list[Markup]:
    return [tag("p", "Reproduce", class_="note"), tag("pre", text)] if text else []


def levels(report: Report) -> list[Markup]:
    heads = ("level", *(verdict.value for verdict in Verdict), "most of a limit used")
    rows = []
    for level in LEVELS:
        verdicts = [finding.verdict for finding in report.of_level(level)]
        if verdicts:
            name = tag("a", level, href=f"#{level}")
            counts = [str(verdicts.count(verdict)) for verdict in Verdict]
            rows.append((name, *counts, used_cell(worst_used(report.of_level(level)))))
    if not rows:
        return []
    note = "Bars show the share of the limit that is used, logarithmic from 0.1 % to 10 times. The line is the limit."
    overview = tag("section", tag("h2", "Levels"), table(heads, rows, "overview"), tag("p", note, class_="note"))
    return [overview, *(level_section(level, report.of_level(level)) for level in LEVELS if report.of_level(level))]


def level_section(level: str, findings: Sequence[Finding]) -> Markup:
    columns, style = (6, "findings") if any(finding.error is not None for finding in findings) else (2, "plain")
    heads = ("what", "verdict", "error", "floor", "limit", "limit used")[:columns]
    rows = [level_row(finding)[:columns] for finding in ranked(findings)]
    shown = max(SHOWN_ROWS, sum(finding.verdict in OPEN for finding in findings))
    rest = [table(heads, rows[shown:], style)] if rows[shown:] else []
    count = f"{len(rows)} findings, worst first" if len(rows) > 1 else "1 finding"
    title = tag("h3", level.capitalize(), tag("span", count, class_="tag"), id=level)
    folded = fold(f"{len(rows) - shown} more, which use less of their limits", rest)
    return tag("section", title, table(heads, rows[:shown], style), folded)


def level_row(finding: Finding) -> Sequence[Content]:
    measure, error = measure_of(finding), finding.error
    notes = [finding.case] if finding.case else []
    notes += [place(finding.shape)] if finding.shape else []
    notes += [f"worst at {place(error.at)}"] if error is not None and error.at else []
    notes += [f"{name} {exact(value)}" for name, value in finding.figures]
    what = [
        tag("b", finding.subject), " ", finding.part, tag("div", " · ".join(notes), class_="note") if notes else None,
        tag("div", finding.said) if finding.said else None,
    ]  # fmt: skip
    verdict = tag("span", f"{ICONS[finding.verdict]} {finding.verdict}", class_=f"verdict {finding.verdict.lower()}")
    figures: list[Content] = ["–"] * 3
    if measure is not None:
        name = tag("span", measure.name, class_="note")
        figures = [[number(measure.error), " ", name], number(measure.floor), number(measure.limit)]
    return (what, verdict, *figures, used_cell(used_of(finding)))


def used_cell(used: float | None) -> Content:
    return "–" if used is None else tag("div", headroom(used), tag("span", share(used)), class_="used")


def drifts(report: Report) -> list[Markup]:
    if not report.drifts:
        return []
    note = (
        "Error of the latents after each evaluation: with errors building up, and with every step from the true state."
    )
    charts = [drift_chart(drift) for drift in report.drifts]
    shown, more = (tag("div", some, class_="charts") for some in (charts[:SHOWN_CARDS], charts[SHOWN_CARDS:]))
    rest = fold(f"{len(charts) - SHOWN_CARDS} more runs", [more] if len(charts) > SHOWN_CARDS else [])
    return [tag("section", tag("h2", "Drift"), tag("p", note, class_="note"), shown, rest)]


def drift_chart(drift: Drift) -> Markup:
    lines = [
        Line("building up", drift.free, "first"), Line("its floor", drift.free_floor or [], "first floor"),
        Line("step by step", drift.forced, "second"), Line("its floor", drift.forced_floor or [], "second floor"),
        Line("limit of a step", drift.limit or [], "limit"),
    ]  # fmt: skip
    names = [str(index + 1) for index in range(max(len(drift.free), len(drift.forced)))]
    drawn = [line for line in lines if line.values]
    return log_chart(f"{drift.task}, seed {drift.seed}", drawn, "evaluation", "rms error, relative", names)


def blocks(report: Report) -> list[Markup]:
    if not report.blocks:
        return []
    note = "In graph order: what each part adds from true inputs, and what has built up behind it."
    charts = [block_chart(one) for one in report.blocks]
    rest = fold(f"{len(charts) - SHOWN_GRAPHS} more graphs", charts[SHOWN_GRAPHS:])
    return [
        tag("section", tag("h2", "Error along the graph"), tag("p", note, class_="note"), charts[:SHOWN_GRAPHS], rest)
    ]


def block_chart(one: BlockErrors) -> Markup:
    lines = [
        Line("the part alone", one.own, "first"), Line("its floor", one.own_floor, "first floor"),
        Line("built up", one.grown, "second"), Line("its floor", one.grown_floor, "second floor"),
    ]  # fmt: skip
    parts = [short_name(part) for part in one.parts]
    return log_chart(one.graph, lines, "part", "rms error, relative", parts, width=1000, height=300)


def short_name(part: str) -> str:
    """A block by its number; a stretch of other nodes by the first of them."""
    block, first = re.fullmatch(r"(low\.)?backbone\.blocks\.(\d+)", part), part.split(" to ")[0]
    if block:
        return f"{'low ' if block[1] else ''}block {block[2]}"
    tail = ".".join(first.split(".")[-2:])
    return tail if len(tail) <= MOST_LETTERS else f"{tail[: MOST_LETTERS - 1]}…"


def samples(report: Report) -> list[Markup]:
    made = []
    if report.pictures:
        cards = tag("div", picture_cards(report.pictures), class_="pairs")
        made.append(tag("section", tag("h2", "Pictures"), cards))
    if report.texts:
        made.append(tag("section", tag("h2", "Texts"), text_cards(report.texts)))
    return made


def trend(history: Trend) -> list[Markup]:
    earlier = len(history.points) - 1
    said = f"Earlier reports of this bundle and backend: {earlier}." + " The dotted line is the limit." * bool(earlier)
    said += f" {history.skipped} files were no sound reports and are left out." if history.skipped else ""
    known = {level: [point for point in history.points if level in point.used] for level in LEVELS}
    charts = [trend_chart(level, points) for level, points in known.items() if points and earlier]
    return [tag("section", tag("h2", "Trend"), tag("p", said, class_="note"), tag("div", charts, class_="charts"))]


def trend_chart(level: str, points: Sequence[Point]) -> Markup:
    line = Line("most used", [point.used[level] for point in points], "first")
    names = [f"{point.created:%m-%d}" for point in points]
    return log_chart(level, [line], "", "share of limit", names, 300, 180, at_one=True)


def seconds(report: Report) -> list[Markup]:
    if not report.seconds:
        return []
    rows = [(level, f"{taken:.1f}") for level, taken in report.seconds.items()]
    rows.append(("all", f"{sum(report.seconds.values()):.1f}"))
    return [tag("section", tag("h2", "Time taken"), table(("level", "seconds"), rows, "figures"))]


def facts(told: Mapping[str, Content]) -> Markup:
    return tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in told.items()], class_="facts")


def table(heads: Sequence[str], rows: Sequence[Sequence[Content]], style: str) -> Markup:
    head = tag("thead", tag("tr", [tag("th", name, scope="col") for name in heads]))
    body = tag("tbody", [tag("tr", [tag("td", cell) for cell in row]) for row in rows])
    return tag("table", head, body, class_=style)


def fold(said: str, content: Sequence[Content]) -> list[Markup]:
    return [tag("details", tag("summary", said), content)] if content else []


SECTIONS: tuple[Callable[[Report], list[Markup]], ...] = (failures, levels, drifts, blocks, samples)
