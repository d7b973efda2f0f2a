"""What TensorRT says: to the logger that the process's first builder or runtime was given, and to no other."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

from .enums import Severity


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity.__members__.values()

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("an ILogger has a method log")


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self.min_severity = needs(min_severity, Severity, "Logger")

    def log(self, severity: Severity, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr, flush=True)


_first: list[ILogger] = []


def use(logger: Any) -> ILogger:
    """The logger for a builder, runtime or refitter: TensorRT has one for the process."""
    needs(logger, ILogger, "logger")
    if not _first:
        _first.append(logger)
    elif _first[0] is not logger:
        say(Severity.WARNING, "the logger differs from one already registered, and is ignored")
    return _first[0]


def say(severity: Severity, text: str) -> None:
    (_first[0] if _first else Logger()).log(severity, text)


def error(where: str, text: str) -> None:
    say(Severity.ERROR, f"{where}: Error Code 3: API Usage Error ({text})")


def needs(value: Any, type_: Any, what: str) -> Any:
    """As pybind11 refuses an argument."""
    if not isinstance(value, type_):
        raise TypeError(f"{what}: incompatible arguments: {value!r:.80} is {type(value).__name__}, not {type_}")
    return value


_happened: Counter[str] = Counter()


def planted(kind: str) -> bool:
    """Whether this time it is to fail, by STAND_IN_FAILS."""
    _happened[kind] += 1
    failing = f"{kind}:{_happened[kind]}" in os.environ.get("STAND_IN_FAILS", "").split(",")
    if failing:
        say(Severity.ERROR, f"{kind} fails, as STAND_IN_FAILS asks")
    return failing
