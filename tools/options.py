"""Options that several verbs share, and the one way a verb prints its result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class Bytes(click.ParamType[int]):
    """A size as people write it: 4GB, 512 MiB, or a plain number of bytes."""

    name = "size"
    UNITS = ("", "K", "M", "G", "T")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)(I?)B?", str(value).strip().upper())
        if found is None or (size := self.in_bytes(*found.groups())) < 1:
            self.fail(f"{value!r} is not a size of memory such as 4GB or 512MiB", param, ctx)
        return size

    def in_bytes(self, number: str, unit: str, binary: str) -> int:
        return int(float(number) * (1024 if binary else 1000) ** self.UNITS.index(unit))


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def engine_options(command: F) -> F:
    """What a bundle is run on: `backend`, `threads`, `memory`, `profile`, as `mdm.runtime.load` takes them."""
    for option in (
        click.option("--profile", help="Of TensorRT's engines those built with it. Default: the newest."),
        click.option("--memory", type=Bytes(), help="What the engine may take, such as 4GB. Default: no limit."),
        click.option("--threads", type=int, help="Threads of the CPU. Default: one a core."),
        click.option(
            "--backend",
            default="ort-cpu",
            show_default=True,
            help="What runs the graphs: ort-cpu, ort-cuda, tensorrt or tensorrt-rtx.",
        ),
    ):
        command = option(command)
    return command


def print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content))


def progress_bar(as_json: bool, transient: bool = False) -> Progress:
    """A bar on stderr, so that stdout holds results alone; nothing where a program reads along.

    A `transient` one is for a terminal only, and is wiped away when it stops.
    """
    console = Console(stderr=True, quiet=as_json)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, disable=as_json or (transient and not console.is_terminal), transient=transient,
    )  # fmt: skip
