"""The verb `mdm bench` and its parts."""

from __future__ import annotations

import click

from mdm.tools.bench.export import command as export
from mdm.tools.bench.ops import command as ops


@click.group("bench")
def command() -> None:
    """Measure speed and memory."""


for part in (export, ops):
    command.add_command(part)
