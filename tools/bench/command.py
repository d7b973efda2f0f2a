"""The verb `mdm bench` and its parts."""

from __future__ import annotations

import os

import click

from mdm.plugins.errors import InputError
from mdm.runtime.words import nearest
from mdm.tools.bench.bundle import command as bundle
from mdm.tools.bench.export import command as export
from mdm.tools.bench.ops import command as ops
from mdm.tools.bench.scaling import command as scaling
from mdm.tools.bench.soak import command as soak
from mdm.tools.bench.step import command as step


class Parts(click.Group):
    """Arguments that do not begin with a part's name are those of `mdm bench BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            word = args[0]
            if not any(map(os.path.isdir, args)):
                parts = [name for name in self.commands if name != bundle.name]
                raise InputError(
                    f"'{word}' is neither a bundle nor a part of mdm bench{nearest(word, parts)}\n"
                    f"expected the folder of a bundle, or one of: {', '.join(parts)}"
                )
            args = [str(bundle.name), *args]
        return super().parse_args(ctx, args)


@click.group("bench", cls=Parts, subcommand_metavar="BUNDLE | PART [ARGS]...")
def command() -> None:
    """Measure speed and memory: of a bundle, or of a part of this project."""


for part in (bundle, export, ops, scaling, soak, step):
    command.add_command(part)
