"""`mdm plugin build`: compiles the GPU kernels into a pack. It needs Triton, and no GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mdm.plugins.errors import EngineError, InputError
from mdm.plugins.gpu.pack import ARCHITECTURES
from mdm.tools.options import FILE, json_option, print_json, progress_bar


@click.group("plugin")
def command() -> None:
    """What runs the scans on a GPU."""


@command.command("build")
@click.option("--out", type=FILE, default=Path("kernels.pack"), show_default=True, help="The pack.")
@click.option("--arch", "architectures", multiple=True, help="Compute capability without the dot; default all of ours.")
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel; may be repeated.")
@click.option("--jobs", type=int, help="Processes that compile. Default: one a core.")
@json_option
def build(out: Path, architectures: tuple[str, ...], kernels: tuple[str, ...], jobs: int | None, as_json: bool) -> None:
    """Compile every kernel for every architecture; print registers, spills and shared memory of each.

    A kernel that spills on sm_90, or wants more shared memory than its architecture has, is an error.
    """
    from mdm.plugins.gpu import resources
    from mdm.plugins.gpu.build import build_pack
    from mdm.plugins.gpu.variants import variants

    for name in set(architectures) - set(ARCHITECTURES):
        raise InputError(f"architecture is {name!r}, expected one of: {', '.join(ARCHITECTURES)}")
    chosen = [variant for variant in variants() if not kernels or variant.kernel in kernels]
    if not chosen:
        known = ", ".join(dict.fromkeys(variant.kernel for variant in variants()))
        raise InputError(f"there is no kernel {' or '.join(kernels)}\nkernels: {known}")
    with progress_bar(as_json) as bar:
        shown = bar.add_task("compile", total=len(chosen), note="")
        table = build_pack(
            out,
            chosen,
            architectures or ARCHITECTURES,
            jobs,
            lambda done, total, key: bar.update(shown, completed=done),
        )
    problems = resources.problems(table)
    if as_json:
        print_json({"pack": str(out), "bytes": out.stat().st_size, "entries": [asdict(row) for row in table]})
    else:
        click.echo(resources.text(table))
        click.echo(f"wrote {out}: {len(chosen)} kernels, {out.stat().st_size / 1e6:.1f} MB")
    if problems:
        raise EngineError("\n".join(problems[:3]))
