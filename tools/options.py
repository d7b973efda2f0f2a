"""Options that several verbs share, and the one way a verb prints its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content))


def progress_bar(as_json: bool) -> Progress:
    """A bar on stderr, so that stdout holds results alone; nothing where a program reads along."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=Console(stderr=True), disable=as_json,
    )  # fmt: skip
