"""`mdm build`: a bundle's graphs become TensorRT engines for this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.tensorrt.facts import Options
from mdm.runtime.tensorrt.profiles import find_profiles
from mdm.runtime.tensorrt.records import Record
from mdm.runtime.tensorrt.versions import HARDWARE
from mdm.tools.engines.progress import Progress
from mdm.tools.engines.run import build_engines, check_precision, graphs_of
from mdm.tools.engines.trust import WARNING, trust_engines
from mdm.tools.options import FILE, json_option, print_json

PRECISIONS = ("fp32", "fp16", "bf16")


@click.command("build")
@click.argument("bundle", type=FILE)
@click.option("--backend", type=click.Choice(["tensorrt"]), default="tensorrt", show_default=True)
@click.option("--graph", "graphs", multiple=True, help="Only this one; may be repeated. Default: all that a run needs.")
@click.option(
    "--profile", "profiles", multiple=True, default=["latency"], show_default=True,
    help="latency, throughput, edge, or a JSON file; may be repeated.",
)  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS), help="Fail if the bundle has another one.")
@click.option("--level", type=click.IntRange(0, 5), help="0 builds fast, 5 searches longest. Default: the profiles'.")
@click.option("--hardware", type=click.Choice([*HARDWARE]), default="this", show_default=True, help="GPUs that run it.")
@click.option("--version-compatible", is_flag=True, help="Newer TensorRT runs it too, and its lean runtime.")
@click.option("--refit", is_flag=True, help="The weights can be replaced by others.")
@click.option("--strip", is_flag=True, help="Without weights: a small file, which gets the bundle's when it is loaded.")
@click.option("--stream-weights", is_flag=True, help="Weights that do not fit on the GPU come over as it runs.")
@click.option("--library", type=FILE, help="Our C++ plugins from this library instead of those in Python.")
@click.option("--bodies", is_flag=True, help="By the operators' ONNX bodies instead of our plugins: slower.")
@click.option("--force", is_flag=True, help="Build again what is there.")
@click.option("--trust", is_flag=True, help="Build nothing: trust the engines in BUNDLE as if they were built here.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    bundle: Path,
    backend: str,
    graphs: tuple[str, ...],
    profiles: tuple[str, ...],
    precision: str | None,
    force: bool,
    trust: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build engines into BUNDLE/engines, each in a process of its own; what is there for just this stays as it is.

    An engine has all profiles that are asked for. TensorRT runs whatever an engine holds, so engines that were not
    built here are not run unless you --trust them: do so only with a bundle from someone you trust.
    """
    opened, console = open_bundle(bundle), Console(stderr=True, quiet=as_json)
    names = graphs_of(opened, graphs)
    if trust:
        given = {name for name in context.params if context.get_parameter_source(name) != ParameterSource.DEFAULT}
        if given - {"bundle", "backend", "graphs", "trust", "as_json"}:
            raise click.UsageError("--trust builds nothing, so it goes with --graph and --json alone")
        told = _trust(opened, names if graphs else [*opened.manifest["graphs"]], console)
    else:
        check_precision(opened, precision)
        told = _build(opened, names, profiles, options, force, console)
    if as_json:
        print_json({"engines": told})


def _build(
    bundle: Bundle, names: list[str], profiles: tuple[str, ...], options: dict[str, Any], force: bool, console: Console
) -> list[dict[str, Any]]:
    progress, told = Progress(console, names), []
    with console.status(progress):
        for engine in build_engines(bundle, names, find_profiles(profiles), Options(**options), force, progress.told):
            record = engine.record
            what = f"built in {record.seconds:.0f} s" if engine.new else "is there"
            _say(console, record, f"{what}: {record.contents['plugins']} plugins, {', '.join(record.profiles)}")
            told.append({"graph": record.facts["graph"], "file": str(engine.path), "new": engine.new} | vars(record))
    return told


def _trust(bundle: Bundle, names: list[str], console: Console) -> list[dict[str, Any]]:
    trusted = trust_engines(bundle, names)
    for _, record in trusted:
        _say(console, record, f"trusted: built {record.built} for {record.built_for}")
    console.print(WARNING, soft_wrap=True)
    return [{"graph": record.facts["graph"], "file": str(path)} | vars(record) for path, record in trusted]


def _say(console: Console, record: Record, what: str) -> None:
    console.print(
        f"{record.facts['graph']:24} {record.bytes / 1e6:.1f} MB, {what}", highlight=False, markup=False, soft_wrap=True
    )
