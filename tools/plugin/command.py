"""The verb `mdm plugin` and its parts."""

from __future__ import annotations

import click

from mdm.tools.plugin.kernels import kernels, report
from mdm.tools.plugin.library import command as build
from mdm.tools.plugin.polygraphy import command as polygraphy


@click.group("plugin")
def command() -> None:
    """What runs the operators on a GPU."""


for part in (build, polygraphy, kernels, report):
    command.add_command(part)
