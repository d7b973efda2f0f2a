"""report.json: a report as strict JSON, and back as a plain dictionary that its schema has checked.

JSON has no NaN and no infinity: they are written as the texts "nan", "inf" and "-inf", which keeps them apart. Of a
pair of pictures the task, the seed and the measures are kept, not the pixels.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import parse_json, validate
from mdm.tools.check.finding import Finding
from mdm.tools.check.report import SCHEMA, Report

MAX_BYTES = 16 * 2**20  # of a report that is read: one of 10,000 findings takes 8 MB
REPORT_SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("report.schema.json").read_bytes())


def as_json(report: Report) -> dict[str, Any]:
    made: dict[str, Any] = {"schema": SCHEMA, "verdict": report.verdict.value, "counts": report.counts()}
    return made | cast(dict[str, Any], plain(report))


def plain(value: Any) -> Any:
    """Of dataclasses, arrays and numbers what JSON knows."""
    if is_dataclass(value):
        made = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Finding):
            made |= {"used": value.used, "figures": dict(value.figures)}
        return {name: plain(inner) for name, inner in made.items() if not isinstance(inner, np.ndarray)}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def float_of(value: float | str) -> float:
    """A number of report.json."""
    return float(value)


def parse_report(path: Path) -> dict[str, Any]:
    """A report.json that may be a stranger's, not yet checked against the schema."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}") from error
    value = parse_json(content, f"'{path}'", MAX_BYTES)
    if not isinstance(value, dict):
        raise InputError(f"'{path}' holds no object, expected a report of mdm check")
    return cast(dict[str, Any], value)


def read_report(path: Path) -> dict[str, Any]:
    report = parse_report(path)
    validate(report, REPORT_SCHEMA, f"'{path}'")
    return report
