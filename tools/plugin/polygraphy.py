"""`mdm plugin polygraphy`: NVIDIA's polygraphy with our plugins known to its TensorRT.

polygraphy's own `--plugins` only opens a library, and TensorRT's plugins of today want to be registered: without that
TensorRT takes the operators' ONNX bodies and says nothing. So `--plugins` is read here; all else is polygraphy's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click

from mdm.plugins.errors import EnvironmentLackError


@click.command("polygraphy", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Run NVIDIA's polygraphy, with our plugins in Python or with those of its --plugins LIBRARY."""
    from polygraphy.tools import main

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugins", nargs="+", type=Path, default=[])
    known, rest = parser.parse_known_args(words)
    register(known.plugins)
    if status := main(rest):
        raise click.exceptions.Exit(status)


def register(libraries: list[Path]) -> None:
    import tensorrt

    from mdm.plugins.tensorrt import python_plugin

    if not libraries:
        python_plugin.register()
    for library in libraries:
        if not library.is_file():
            raise FileNotFoundError(2, "No such file or directory", str(library))
        if not tensorrt.get_plugin_registry().load_library(str(library.absolute())):
            raise EnvironmentLackError(
                f"TensorRT {tensorrt.__version__} does not take {library}\n"
                "expected a library of plugins (getCreators) for this major version\n"
                "ours is made by: mdm plugin build"
            )
