"""How close to its limits the same bundle came in earlier checks on the same backend.

Reports are strangers' files: what cannot be read, or is not what its schema says, is left out and counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import validate
from mdm.tools.check.finding import LEVELS, Verdict
from mdm.tools.check.forms.as_json import REPORT_SCHEMA, float_of, parse_report
from mdm.tools.check.forms.wording import worst_used
from mdm.tools.check.report import Report

MOST_FILES = 200  # the newest
REPORT = "report.json"


@dataclass(frozen=True)
class Point:
    created: datetime
    verdict: Verdict
    used: dict[str, float]  # level -> worst share of a limit; without the levels that have none


@dataclass(frozen=True)
class Trend:
    points: list[Point]  # in time order; the last is the report's own
    skipped: int = 0  # files that are no sound reports


def trend(folder: Path, report: Report) -> Trend:
    """The reports below the folder that are older than this one, of the same bundle name and backend, and this one."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, it takes a name that is too long
        raise InputError(f"history '{folder}' is no folder\nexpected one with report.json files, at any depth")
    own = own_point(report)
    points, skipped = [], 0
    for path in newest(folder):
        try:
            point = point_of(parse_report(path), report)
        except (InputError, ValueError):  # ValueError: a thirteenth month
            skipped += 1
            continue
        if point is not None and point.created < own.created:
            points.append(point)
    return Trend([*sorted(points, key=lambda point: point.created), own], skipped)


def newest(folder: Path) -> list[Path]:
    return [path for _, path in sorted(report_files(folder), reverse=True)[:MOST_FILES]]


def report_files(folder: Path) -> Iterator[tuple[float, Path]]:
    """With their times. Links are not followed, and nothing but plain files is opened: reading a pipe would hang."""
    for path, _, names in os.walk(folder):
        found = Path(path, REPORT)
        if REPORT in names and found.is_file() and not found.is_symlink():
            yield found.stat().st_mtime, found


def point_of(found: dict[str, Any], report: Report) -> Point | None:
    """None: of another bundle or backend. Those are not validated, which takes longer than reading them."""
    if (found.get("bundle"), found.get("backend")) != (report.bundle, report.backend):
        return None
    validate(found, REPORT_SCHEMA, REPORT)
    shares: dict[str, float] = {}
    for finding in found["findings"]:
        if finding["used"] is not None:
            used, level = float_of(finding["used"]), finding["level"]
            shares[level] = max(shares.get(level, 0.0), math.inf if math.isnan(used) else used)
    return Point(datetime.fromisoformat(found["created"]), Verdict(found["verdict"]), shares)


def own_point(report: Report) -> Point:
    shares = {level: used for level in LEVELS if (used := worst_used(report.of_level(level))) is not None}
    created = datetime.fromisoformat(report.created) if report.created else datetime.now(UTC)
    return Point(created, report.verdict, shares)
