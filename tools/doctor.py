"""`mdm doctor`: what this installation can do, and what to do about the rest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click

from mdm.tools.options import json_option, print_json

# What an extra of this package brings: distribution -> (extra, what it is for)
PARTS = {
    "onnxruntime": ("cpu", "runs bundles on the CPU"),
    "onnxruntime-gpu": ("gpu", "runs bundles on an NVIDIA GPU"),
    "torch": ("export", "the reference models and the exporter"),
    "onnx": ("export", "the exporter"),
    "tensorrt": ("tensorrt", "builds and runs TensorRT engines"),
}


@dataclass(frozen=True)
class Finding:
    """One line: a thing, whether it is there, and what there is to say."""

    name: str
    there: bool
    said: str


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Say what is installed, what works here, and what to do about the rest."""
    found = list(findings())
    if as_json:
        print_json({"findings": [asdict(one) for one in found]})
        return
    for one in found:
        lines = one.said.splitlines()
        click.echo(f"{'yes' if one.there else 'no ':3}  {one.name:20} {lines[0]}")
        for line in lines[1:]:
            click.echo(f"{'':26}{line}")


def findings() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()} on {platform.machine()}")
    for name, (extra, purpose) in PARTS.items():
        try:
            yield Finding(name, True, f"{version(name)}: {purpose}")
        except PackageNotFoundError:
            yield Finding(name, False, f'{purpose}; pip install "mdm-deploy[{extra}]"')
    yield _tried("scan library", _scan_library)
    yield _tried("scan library works", _scan)


def _tried(name: str, try_it: Callable[[], str]) -> Finding:
    """A check that says what it found, or raises one of our errors."""
    from mdm.plugins.errors import MdmError

    try:
        return Finding(name, True, try_it())
    except MdmError as error:
        return Finding(name, False, str(error))


def _scan_library() -> str:
    from mdm.plugins.library import cpu_library_path, instruction_set

    return f"{instruction_set()} kernels, {cpu_library_path()}"


def _scan() -> str:
    """Registers it with the ONNX Runtime that is installed."""
    from mdm.plugins import register
    from mdm.runtime import require_engine

    require_engine()
    import onnxruntime

    register(onnxruntime.SessionOptions())
    return f"ONNX Runtime {onnxruntime.__version__} takes it"
