"""`mdm plan`: what `mdm build` would do with a bundle, told before it. Needs the package onnx, no TensorRT, no GPU."""

from __future__ import annotations

from pathlib import Path

import click

from mdm.plugins.errors import InputError
from mdm.tools.options import FILE, json_option, print_json


@click.command("plan")
@click.argument("bundle", type=FILE)
@click.option(
    "--profile", "profiles", multiple=True, default=("latency",), show_default=True,
    help="latency, throughput, edge, or a JSON file; may be repeated.",
)  # fmt: skip
@click.option("--graph", "graphs", multiple=True, help="Only this one; may be repeated. Default: all that a run needs.")
@click.option("--bodies", is_flag=True, help="By the operators' ONNX bodies instead of our plugins.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    bundle: Path,
    profiles: tuple[str, ...],
    graphs: tuple[str, ...],
    bodies: bool,
    as_json: bool,
) -> None:
    """Say which nodes go to plugins, the types there, the memory, and which versions of TensorRT take the graphs.

    Exit code 0: mdm build has nothing against it; 2: something stops a build, and is named.
    """
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.tensorrt.profiles import find_profiles
    from mdm.tools.engines.run import graphs_of
    from mdm.tools.plan.plan import make_plan
    from mdm.tools.plan.show import as_values, show

    opened = open_bundle(bundle)
    found = find_profiles(profiles)
    plan = make_plan(opened, graphs_of(opened, graphs), found, not bodies)
    names = ", ".join(profile.name for profile in found)
    if as_json:
        print_json({"bundle": str(bundle), "profiles": [one.name for one in found], "bodies": bodies} | as_values(plan))
    else:
        manifest = opened.manifest
        how = "by the operators' bodies" if bodies else "with our plugins"
        title = f"{manifest['name']}: {manifest['precision']}, opset {manifest['opset']}, profile {names}, {how}"
        show(plan, title)
    if plan.stops:
        context.exit(InputError.exit_code)
