"""`mdm doctor`: what this machine can do with bundles, and what to do about the rest.

Every line says yes or no, and a no says what to do. Scripts go by the exit code, as with `brew doctor`: 0 if a backend
runs bundles here, or BUNDLE if one is named, else 3. Few machines have everything, so a no alone is no failure; a
BUNDLE that is no bundle is bad input, 2. Nothing that is missing or broken stops the other checks.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdm.plugins.errors import EngineError, EnvironmentLackError, MdmError
from mdm.plugins.machine import allowed, cores, free_memory, read
from mdm.tools.gpus import gpus
from mdm.tools.options import FILE, json_option, print_json

if TYPE_CHECKING:
    from mdm.runtime.bundle import Bundle

REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*extra == .(\w+).)?")
ENGINES = 'pip install "mdm-deploy[cpu]", or "mdm-deploy[gpu]" for an NVIDIA GPU'
FLAGS = {  # instruction set -> what the CPU has to have, as plugins/cpu/dispatch.cpp asks
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}
# An ONNX model, y = MatMul(x, x) with x [2,2]: onnx may not be here to make one.
MODEL = b64decode(
    "CAk6QAoRCgF4CgF4EgF5IgZNYXRNdWwSAWdaEwoBeBIOCgwIARIICgIIAgoCCAJiEwoBeRIOCgwIARIICgIIAgoCCAJCBAoAEBQ="
)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is well, and what there is to say."""

    section: str
    name: str
    there: bool
    said: str


@click.command("doctor")
@click.argument("bundle", type=FILE, required=False)
@json_option
@click.pass_context
def command(context: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Say what works on this machine, and what to do about the rest; of BUNDLE, whether it runs here.

    Exit code 0: a backend runs bundles, or BUNDLE if it is named; 3: none does.
    """
    found: list[Finding] = []
    for one in findings(bundle):
        if not as_json:
            show(one, first=not found or one.section != found[-1].section)
        found.append(one)
    section = "bundle" if bundle else "backends"
    able = [one.name for one in found if one.section == section and one.there and one.name in BACKENDS]
    if as_json:
        print_json({"backends": able, "findings": [asdict(one) for one in found]})
    else:
        what = f"'{bundle}' runs" if bundle else "bundles run"
        click.echo(f"{what} on this machine: {', '.join(able) or 'no, see above'}")
    if not able:
        context.exit(EnvironmentLackError.exit_code)


def show(finding: Finding, first: bool) -> None:
    if first:
        click.echo(finding.section)
    said = "".join(c if c.isprintable() or c == "\n" else "?" for c in finding.said)  # a bundle is a stranger's
    for number, line in enumerate(said.splitlines()):
        mark, name = ("yes" if finding.there else "no", finding.name) if number == 0 else ("", "")
        click.echo(f"  {mark:3}  {name:14} {line}")


def findings(path: Path | None = None) -> Iterator[Finding]:
    yield from packages()
    yield tried("machine", "cores", said_of_cores)
    yield tried("machine", "memory", lambda: f"{free_memory() / 1e9:.1f} GB free")
    yield tried("machine", "gpu", lambda: "\n".join(said for said, _ in gpus()))
    runs = [tried("backends", name, check) for name, check in BACKENDS.items()]
    yield from (*runs, tried("backends", "scan library", scan_library))
    able = [one.name for one in runs if one.there]
    if path is not None and able:
        from mdm.runtime.bundle import open_bundle

        bundle = open_bundle(path)
        yield tried("bundle", "opened", partial(facts, bundle))
        yield from (tried("bundle", name, partial(one_step, bundle, name)) for name in able)


def tried(section: str, name: str, check: Callable[[], str]) -> Finding:
    """What a check says, or what it fails with."""
    try:
        return Finding(section, name, True, check())
    except MdmError as error:
        return Finding(section, name, False, str(error))
    except Exception as error:  # whatever a missing or broken package raises
        said = " ".join(str(error).split())[:300]
        return Finding(section, name, False, f"{type(error).__name__}: {said}\ninstall what is named here again")


# ------------------------------------------------------------------------------------------------------- packages


def packages() -> Iterator[Finding]:
    """What mdm-deploy's own metadata asks for, against what is installed."""
    yield Finding("installed", "python", True, f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    try:
        wanted = requires("mdm-deploy") or []
    except PackageNotFoundError:
        yield Finding("installed", "mdm-deploy", False, "it runs from its sources\nin their folder: pip install -e .")
        return
    yield Finding("installed", "mdm-deploy", True, version("mdm-deploy"))
    engines = {}
    for line in wanted:
        found = REQUIREMENT.fullmatch(line)
        name, bounds, extra = found.groups() if found else (line, "", None)
        if extra in ("cpu", "gpu"):
            engines[name] = bounds
        elif extra in (None, "export"):
            yield tried("installed", name, partial(package, name, bounds, extra))
    yield tried("installed", "engine", partial(engine, engines))


def package(name: str, bounds: str, extra: str | None = None) -> str:
    try:
        found = version(name)
    except PackageNotFoundError as error:
        why, whole = "mdm-deploy needs it", f"{name}{bounds}"
        if extra:
            why, whole = "to export, train and evaluate; bundles run without", f"mdm-deploy[{extra}]"
        raise EnvironmentLackError(f'{why}\npip install "{whole}"') from error
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", bounds):
        if (numbers(found) < numbers(bound)) == (sign == ">="):
            raise EnvironmentLackError(f'{found}, expected {bounds}\npip install "{name}{bounds}"')
    return found


def numbers(text: str) -> list[int]:
    """A version's numbers: 2.13.0+cpu -> [2, 13, 0]."""
    return [int(part) for part in re.split(r"[^\d.]", text)[0].split(".") if part]


def engine(bounds: Mapping[str, str]) -> str:
    """Several distributions bring the module onnxruntime; there should be one of them."""
    found = sorted(set(packages_distributions().get("onnxruntime", ())))
    if not found:
        raise EnvironmentLackError(f"none\n{ENGINES}")
    if len(found) > 1:
        raise EnvironmentLackError(
            f"{' and '.join(found)} overwrote parts of each other\n"
            f"pip uninstall {' '.join(found)}\nthen one of them: {ENGINES}"
        )
    return f"{found[0]} {package(found[0], bounds.get(found[0], ''))}"


# -------------------------------------------------------------------------------------------------------- machine


def said_of_cores() -> str:
    found, logical = cores(), os.cpu_count() or 1
    said = f"{found.usable} of {found.total} usable ({len(list(allowed()))} of {logical} logical)"
    said += f"; a control group grants the time of {found.granted:g}" if found.granted < math.inf else ""
    if omp := os.environ.get("OMP_NUM_THREADS"):
        said += f"; ONNX Runtime does not go by OMP_NUM_THREADS={omp}"
    return f"{said}; bundles run on {found.threads} unless --threads is given"


# ------------------------------------------------------------------------------------------------------- backends


def run_model(backend: str) -> str:
    """Runs a product of matrices: an engine may be installed and yet not load."""
    from mdm.runtime.ort import PROVIDERS, require_engine

    require_engine()
    import numpy as np
    import onnxruntime

    from mdm.runtime.rtx import PROVIDER, use_rtx

    this, (provider, device) = f"ONNX Runtime {onnxruntime.__version__}", PROVIDERS[backend]
    onnxruntime.set_default_logger_severity(4)  # what it would print is said here
    options = onnxruntime.SessionOptions()
    if provider == PROVIDER:
        use_rtx(options, 0)
    elif provider not in onnxruntime.get_available_providers():
        raise EnvironmentLackError(
            f"{this}, as it is installed, has no {provider}\n"
            'pip uninstall onnxruntime, then pip install "mdm-deploy[gpu]"'
        )
    providers = None if provider == PROVIDER else [provider]
    session = onnxruntime.InferenceSession(MODEL, options, providers, enable_fallback=0)
    if provider not in session.get_providers():  # it fell back to the CPU
        raise EnvironmentLackError(
            f"{this} cannot load its {provider}\n{why_not_loaded(onnxruntime.__file__)}\n"
            "install the CUDA and cuDNN that it wants where the system finds them, or name them in LD_LIBRARY_PATH"
        )
    x = np.array([[1, 2], [3, 4]], np.float32)
    if not np.array_equal(session.run(None, {"x": x})[0], x @ x):
        raise EngineError(f"{this} computes a product of matrices wrong ({device})\ninstall it again")
    return f"runs graphs by {this}"


def why_not_loaded(onnxruntime: str) -> str:
    try:
        ctypes.CDLL(str(Path(onnxruntime).parent / "capi" / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return "CUDA or cuDNN is missing or too old"


def on_a_gpu(backend: str) -> str:
    try:
        gpus()
    except EnvironmentLackError as error:
        raise EnvironmentLackError("no GPU that works, see above\nwithout one use ort-cpu") from error
    return run_model(backend)


def tensorrt() -> str:
    """Whether it loads, and whether the kernels of its plugins are for this GPU."""
    from mdm.plugins.gpu.pack import ARCHITECTURES

    lack: MdmError | None = None
    try:
        there = tensorrt_loads()
    except MdmError as error:
        there, lack = str(error).splitlines()[0], error
    try:
        gpu = gpus()[0][0]
    except (EnvironmentLackError, IndexError) as error:
        raise EnvironmentLackError(f"no GPU that works, see above; {there}\nwithout one use ort-cpu") from error
    if lack is not None:
        raise lack
    found, least = re.search(r"compute capability (\d+)\.(\d+)", gpu), min(map(int, ARCHITECTURES))
    if found and int(found[1] + found[2]) < least:
        raise EnvironmentLackError(
            f"{there}, but this GPU has {found[0]}\nexpected {least / 10:.1f} or newer: use ort-cuda"
        )
    return f"{there}; mdm build BUNDLE makes engines for it"


def tensorrt_loads() -> str:
    """In a process of its own, which it may end."""
    from mdm.tools.engines.run import ask

    try:
        return f"TensorRT {ask(None, lambda phase: None)['tensorrt']} loads"
    except EngineError as error:
        said = " ".join(str(error).split())[:300]
        raise EnvironmentLackError(
            f'{said}\ninstall it again: pip install --force-reinstall "mdm-deploy[tensorrt]"'
        ) from error


BACKENDS: dict[str, Callable[[], str]] = {
    "ort-cpu": lambda: run_model("ort-cpu"),
    "ort-cuda": lambda: on_a_gpu("ort-cuda"),
    "tensorrt": tensorrt,
    "tensorrt-rtx": lambda: on_a_gpu("tensorrt-rtx"),
}


def scan_library() -> str:
    """The kernels it uses, and where MDM_CPU_ISA keeps it from better ones; then the engine has to take it."""
    from mdm.plugins.library import cpu_library_path, instruction_set, register

    used = instruction_set()
    cpu = re.search(r"^flags\s*:(.*)$", read("proc/cpuinfo"), re.MULTILINE)
    best = next((name for name, flags in FLAGS.items() if cpu and flags <= set(cpu[1].split())), used)
    limited = "" if used == best else f", as MDM_CPU_ISA asks; this CPU has {best}"
    from onnxruntime import SessionOptions

    register(SessionOptions())
    return f"{used} kernels{limited}; {cpu_library_path()}"


# --------------------------------------------------------------------------------------------------------- bundle


def facts(bundle: Bundle) -> str:
    model = bundle.manifest
    size = f"{model['parameters'] / 1e6:.1f}M parameters in {model['precision']}"
    tasks = ", ".join(model["tasks"])
    return f"{model['name']}, {size}\ntasks: {tasks}\nwhether its files are whole tells mdm inspect --verify"


def one_step(bundle: Bundle, backend: str) -> str:
    """Runs the smallest step graph, if there is memory for the largest. TensorRT has those that were built."""
    import numpy as np

    from mdm.runtime.backends import backend_for

    engine: Any = backend_for(bundle, backend)  # refuses what it cannot compute: bfloat16 on the CPU
    graphs = {name: one for name, one in bundle.manifest["graphs"].items() if not engine.lacks(name)}
    sizes: dict[str, int] = {}
    lack: MdmError | None = None
    for name in graphs:
        try:
            sizes[name] = engine.size_of(name)
        except MdmError as error:  # no engine
            lack = lack or error
    steps = {name: graphs[name] for name in sizes if graphs[name]["role"] == "step"}
    if lack is not None and not steps:
        raise lack
    need, room = max(sizes.values()), free_memory() if backend == "ort-cpu" else gpus()[0][1]
    said = f"a loaded graph takes about {need / 1e6:.0f} MB of {room / 1e9:.1f} GB"
    said += f"; {len(sizes)} of {len(graphs)} graphs are built" if lack else ""
    if need > room:
        raise EnvironmentLackError(f"{said}, so it was not tried\nfree some memory, or take a larger machine")
    name = min(steps, key=lambda name: (len(steps[name]["modalities"]), steps[name]["nodes"]))
    graph, tokens = engine.graph(name), 0
    if bundle.manifest["text"]:
        size, patch = steps[name]["image_size"] or 0, bundle.manifest["picture"]["patch"]
        tokens = (size // patch) ** 2 * steps[name]["pictures"] + min(bundle.manifest["text"]["lengths"])
    batch = next(iter(graph.batches(tokens)), 1)
    inputs = {
        # Ones in the solver's row: it divides by some of it.
        name: np.full(spec.sized(batch=batch, tokens=tokens), spec.dtype.kind == "f", spec.dtype)
        for name, spec in graph.inputs.items()
    }
    start = time.monotonic()
    made = graph.run(list(graph.outputs), **inputs)
    seconds = time.monotonic() - start
    if not all(np.isfinite(one).all() for one in made):
        raise EngineError(f"graph '{name}' computes numbers that are not finite\nexport the checkpoint again in fp32")
    return f"{name} makes a step in {seconds:.2g} s; {said}"
