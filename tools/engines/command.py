"""`mdm build`: a bundle's graphs become TensorRT engines for this machine's GPU."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from mdm.tools.options import FILE, json_option, print_json


@click.command("build")
@click.argument("bundle", type=FILE)
@click.option("--backend", type=click.Choice(["tensorrt"]), default="tensorrt", show_default=True)
@click.option("--profile", default="latency", show_default=True, help="latency, throughput, edge, or a JSON file.")
@click.option("--graph", "graphs", multiple=True, help="Only this one; may be repeated. Default: all that a run needs.")
@click.option("--bodies", is_flag=True, help="By the operators' ONNX bodies instead of our plugins: slower.")
@click.option("--force", is_flag=True, help="Build again what is there.")
@json_option
def command(
    bundle: Path, backend: str, profile: str, graphs: tuple[str, ...], bodies: bool, force: bool, as_json: bool
) -> None:
    """Build engines into BUNDLE/engines, each in a process of its own; what is there for just this stays as it is."""
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.tensorrt.profiles import find_profile
    from mdm.tools.engines.run import Engine, Step, build_engines, graphs_of

    opened = open_bundle(bundle)
    names, console = graphs_of(opened, graphs), Console(stderr=True, quiet=as_json)
    made: list[Engine] = []
    with console.status("starting TensorRT") as status:

        def told(step: Step) -> None:
            last = f", {step.last:.0f} s the last time" if step.last else ""
            status.update(f"{step.graph} ({len(made) + 1} of {len(names)}): {step.phase}{last}")

        for engine in build_engines(opened, names, find_profile(profile), not bodies, force, told):
            made.append(engine)
            what = f"built in {engine.seconds:.0f} s" if engine.built else "is there"
            plugins, size = engine.contents["plugins"], engine.contents["bytes"] / 1e6
            console.print(f"{engine.graph:24} {what}: {size:.1f} MB, {plugins} plugins", highlight=False)
    if as_json:
        print_json(
            {
                "engines": [
                    {"graph": one.graph, "file": str(one.path), "seconds": one.seconds, "built": one.built}
                    | dict(one.contents)
                    for one in made
                ]
            }
        )
