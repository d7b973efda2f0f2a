"""`mdm plugin kernels` and `report`: compile the GPU kernels into a pack, and say what they take. They need Triton, and
no GPU. The package comes with its pack: this is for whoever changes a kernel."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mdm.plugins.errors import EngineError, InputError
from mdm.plugins.gpu.pack import ARCHITECTURES, SHIPPED, Pack
from mdm.plugins.gpu.resources import Row
from mdm.tools.options import FILE, json_option, print_json, progress_bar


@click.command("kernels")
@click.option("--out", type=FILE, default=SHIPPED, help="The pack. Default: the package's own.")
@click.option("--arch", "architectures", multiple=True, help="Compute capability without the dot; default all of ours.")
@click.option("--kernel", "names", multiple=True, help="Only this kernel; may be repeated.")
@click.option("--jobs", type=int, help="Processes that compile. Default: one a core.")
@json_option
def kernels(out: Path, architectures: tuple[str, ...], names: tuple[str, ...], jobs: int | None, as_json: bool) -> None:
    """Compile every kernel for every architecture (2 minutes on 2 cores), and print what each takes.

    A kernel that spills on sm_90, or wants more shared memory than its architecture has, is an error.
    """
    from mdm.plugins.gpu.build import build_pack
    from mdm.plugins.gpu.variants import variants

    refuse_unknown(architectures)
    chosen = [variant for variant in variants() if not names or variant.kernel in names]
    if not chosen:
        known = ", ".join(dict.fromkeys(variant.kernel for variant in variants()))
        raise InputError(f"there is no kernel {' or '.join(names)}\nkernels: {known}")
    if out == SHIPPED and (architectures or names):
        raise InputError("a part of the kernels does not replace the package's own pack\nname another with --out")
    with progress_bar(as_json) as bar:
        shown = bar.add_task("compile", total=len(chosen), note="")
        table = build_pack(
            out,
            chosen,
            architectures or ARCHITECTURES,
            jobs,
            lambda done, total, key: bar.update(shown, completed=done),
        )
    tell(out, table, as_json)


@click.command("report")
@click.argument("path", metavar="[PACK]", type=FILE, default=SHIPPED)
@click.option("--arch", "architectures", multiple=True, help="Only this one; may be repeated.")
@json_option
def report(path: Path, architectures: tuple[str, ...], as_json: bool) -> None:
    """What the kernels of a pack take of each GPU, read from their machine code with the tools that Triton brings."""
    from mdm.plugins.gpu import resources

    refuse_unknown(architectures)
    tell(path, resources.measure_pack(Pack.open(path), architectures or ARCHITECTURES), as_json)


def refuse_unknown(architectures: tuple[str, ...]) -> None:
    for name in set(architectures) - set(ARCHITECTURES):
        raise InputError(f"architecture is {name!r}, expected one of: {', '.join(ARCHITECTURES)}")


def tell(path: Path, table: list[Row], as_json: bool) -> None:
    from mdm.plugins.gpu import resources

    size, compiled = path.stat().st_size, len({row.key for row in table})
    if as_json:
        print_json({"pack": str(path), "bytes": size, "entries": [asdict(row) for row in table]})
    else:
        click.echo(resources.text(table))
        click.echo(f"{path}: {compiled} kernels, {size / 1e6:.1f} MB")
    if problems := resources.problems(table):
        raise EngineError("\n".join(problems[:3]))
