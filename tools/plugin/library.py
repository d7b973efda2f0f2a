"""`mdm plugin build`: the TensorRT plugins in C++ as one shared library, for trtexec, Triton Inference Server, Jetson
and C++ programs.

The package has the sources and the compiled kernels; here they meet TensorRT's headers and a C++ compiler. It takes no
GPU and no CUDA toolkit. CMakeLists.txt looks for the headers and says what is wrong with them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

import click
from rich.console import Console

from mdm.plugins import contract
from mdm.plugins.errors import EnvironmentLackError, InputError, MdmError
from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, SHIPPED, Pack
from mdm.runtime.tensorrt.records import made_whole
from mdm.tools.options import FILE, json_option, print_json

SOURCES = Path(contract.__file__).with_name("tensorrt")
FILE_NAME = "libmdm_tensorrt.so"


@click.command("build")
@click.option(
    "--tensorrt",
    "root",
    type=FILE,
    help="The folder whose include/ has TensorRT's headers. Default: TENSORRT_ROOT, or else what CMake finds.",
)
@click.option("--out", type=FILE, default=Path(FILE_NAME), show_default=True)
@json_option
def command(root: Path | None, out: Path, as_json: bool) -> None:
    """Build the TensorRT plugins in C++ as a library with the kernels within, for programs that run without Python.

    It serves the major version of TensorRT that the headers are of. Load it by TensorRT's loadLibrary, by trtexec's
    --dynamicPlugins, or by: mdm plugin polygraphy ... --plugins FILE
    """
    with Console(stderr=True, quiet=as_json).status("compiling"):
        version = build_library(root, out)
    entries = Pack.open(SHIPPED).entries.values()
    kernels = sorted({entry.kernel for entry in entries})
    images = [name for name in (*ARCHITECTURES, PTX) if any(name in entry.images for entry in entries)]
    size, major = out.stat().st_size, int(version.partition(".")[0])
    if as_json:
        told = {"file": str(out), "bytes": size, "serves": major, "headers": version}
        print_json(told | {"plugins": [*contract.OPERATORS], "kernels": kernels, "images": images})
    else:
        click.echo(f"{out}: {size / 1e6:.1f} MB, for TensorRT {major} (built with the headers of {version})")
        click.echo(f"plugins: {', '.join(contract.OPERATORS)}")
        click.echo(f"kernels: {', '.join(kernels)}")
        click.echo(f"compiled for: {', '.join(images)}")


def build_library(root: Path | None, out: Path) -> str:
    """The library, whole or not at all -> the version of the headers. It takes 8 seconds of a core."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"{out} cannot be written\nexpected the name of a file in a folder that exists")
    cmake = require_tools()
    with tempfile.TemporaryDirectory(prefix="mdm-plugin-") as folder:
        words: list[str | Path] = [cmake, "-S", SOURCES, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
        words += [] if root is None else [f"-DTENSORRT_ROOT={root.absolute()}"]
        prepared = run(words)
        if prepared.returncode:
            raise EnvironmentLackError(first_error(prepared.stderr))
        found = re.search(r"^-- TensorRT (\S+) in (.*)$", prepared.stdout, re.MULTILINE)
        assert found is not None
        compiled = run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
        if compiled.returncode:
            raise MdmError(
                f"the plugins do not compile with the headers of TensorRT {found[1]} in {found[2]}\n"
                f"{complaint(compiled.stdout + compiled.stderr)}\n"
                "another compiler can be named in the variable CXX"
            )
        with made_whole(out) as partial:
            shutil.copy(Path(folder) / FILE_NAME, partial)  # with its mode: who runs engines may be another user
    return found[1]


def require_tools() -> str:
    """CMake, after a look whether a compiler is there too: CMake itself needs many lines to say that none is."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    compilers = named or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        where = "in the variable CXX" if named else "on the PATH"
        raise EnvironmentLackError(
            f"a C++ compiler is needed to build the plugins\nfound no {' or '.join(compilers)}, looked for {where}\n"
            "install g++ or clang++"
        )
    cmake = shutil.which("cmake")
    if cmake is None:
        raise EnvironmentLackError(
            "CMake is needed to build the plugins\nfound no cmake on the PATH, expected 3.20 or newer\n"
            "install it: pip install cmake"
        )
    return cmake


def run(words: list[str | Path]) -> subprocess.CompletedProcess[str]:
    # Compilers and CMake speak the user's language: what is read here is English.
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)


def first_error(said: str) -> str:
    """CMake's first error: as it stands where it is CMakeLists.txt's, CMake's own under a heading."""
    head, _, rest = said.partition("CMake Error")[2].partition("\n")
    if "at CMakeLists.txt" in head and "(message)" in head:
        return "\n".join(line.strip() for line in takewhile(str.strip, rest.splitlines()))
    own = " ".join(f"{head} {rest}".partition("\n-- ")[0].split())
    return f"CMake cannot prepare the build of the plugins\n{own.strip(': '):.300}"


def complaint(said: str) -> str:
    """The first line in which a compiler or a linker says what is wrong: later ones often follow from it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing was said"]
    return next((line for line in lines if re.search(r"\berror: |undefined reference", line)), lines[-1])
