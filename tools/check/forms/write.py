"""The four forms of a report in one folder: report.json, junit.xml, report.html, summary.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mdm.plugins.errors import InputError
from mdm.tools.check.forms.as_html import as_html
from mdm.tools.check.forms.as_json import as_json
from mdm.tools.check.forms.as_junit import as_junit
from mdm.tools.check.forms.as_markdown import as_markdown
from mdm.tools.check.forms.history import REPORT, trend
from mdm.tools.check.report import Report
from mdm.tools.result_files import writing


def make_folder(folder: Path) -> None:
    """To be called before a check, too: hours of work would be lost on a wrong name."""
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"the report cannot be written to '{folder}': it is no folder\nname a folder")
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the report cannot be written to '{folder}': it may not be written to\nname another folder")


def write_report(report: Report, folder: Path, history: Path | None = None) -> list[Path]:
    """`history`: a folder with earlier reports. All forms are written before the first takes its name."""
    make_folder(folder)
    earlier = None if history is None else trend(history, report)
    texts = {
        REPORT: json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False),
        "junit.xml": as_junit(report),
        "report.html": as_html(report, earlier),
        "summary.md": as_markdown(report, earlier),
    }
    temporary = {folder / f".{name}.{os.getpid()}.part": folder / name for name in texts}
    try:
        for (part, path), text in zip(temporary.items(), texts.values(), strict=True):
            with writing(path):
                part.write_bytes(text.encode("utf-8", "replace"))  # a file's name can hold what UTF-8 cannot
        for part, path in temporary.items():
            with writing(path):
                os.replace(part, path)
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)
    return list(temporary.values())
