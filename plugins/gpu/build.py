"""Compiles the kernels with Triton for every architecture into a pack. It needs no GPU.

    table = build_pack(Path("kernels.pack"), variants(), progress=lambda done, total, key: print(done, total, key))
    print(resources.text(table), resources.problems(table))

The same sources and the same Triton make the same bytes: cubins and PTX are compiled without line info, which would
hold paths, and is two thirds of their size. A pack says which sources it was made of, so that a test can tell when the
shipped one has grown old.
"""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, Argument, Entry, compress, key_of, write
from mdm.plugins.gpu.resources import Row, measure
from mdm.plugins.gpu.variants import KERNELS, Kernel, Variant, serves
from mdm.plugins.machine import cores

TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # Triton's words
PTX_FROM = "80"
SCRATCH = ("global_scratch", "profile_scratch")  # the pointers Triton adds to every kernel, in this order
# Read by Triton in the processes that compile. The interpreter would take the kernels' place.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}

Progress = Callable[[int, int, str], None]


def build_pack(
    out: Path,
    variants: Iterable[Variant],
    architectures: Sequence[str] = ARCHITECTURES,
    jobs: int | None = None,
    progress: Progress = lambda done, total, key: None,
    kernels: Mapping[str, Kernel] = KERNELS,
) -> list[Row]:
    """Compile in `jobs` processes, as many as there are cores -> what every image takes."""
    if find_spec("triton") is None:
        raise EnvironmentLackError(
            "the GPU kernels are compiled with Triton, which is not installed\npip install triton"
        )
    made: list[tuple[Entry, bytes]] = []
    table: list[Row] = []
    # Triton reads its settings when it is imported, and this process may have done that already.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs or cores().threads, mp_context=context, initializer=_start)
    try:
        work = [pool.submit(compile_variant, v, kernels[v.kernel], tuple(architectures)) for v in variants]
        for done in as_completed(work):
            entry, stream, rows = done.result()
            made.append((entry, stream))
            table += rows
            progress(len(made), len(work), entry.key)
    finally:
        pool.shutdown(cancel_futures=True)
    write(out, made_by(kernels.values()), made)
    return sorted(table, key=lambda row: (row.key, int(row.architecture)))


def made_by(kernels: Iterable[Kernel] = KERNELS.values()) -> str:
    """Triton's version, and a hash of what the kernels' modules say, whatever their comments do."""
    spoken = []
    for module in sorted({kernel.module for kernel in kernels}):
        found = find_spec(module)
        assert found is not None
        assert found.origin is not None
        tree = ast.parse(Path(found.origin).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        spoken.append(ast.dump(tree))
    digest = hashlib.sha256("\n".join(spoken).encode()).hexdigest()
    return f"triton {_triton_version()} of sources {digest[:16]}"


def compile_variant(variant: Variant, kernel: Kernel, architectures: tuple[str, ...]) -> tuple[Entry, bytes, list[Row]]:
    """One entry with its stream and resources, in a process whose environment is set."""
    key = key_of(variant)
    images: dict[str, tuple[bytes, int]] = {}
    symbols = set()
    rows = []
    for architecture in architectures:
        if not serves(variant, divmod(int(architecture), 10)):
            continue
        compiled = _compile(variant, kernel, architecture)
        shared = compiled.metadata.shared
        images[architecture] = (compiled.asm["cubin"], shared)
        symbols.add(compiled.metadata.name)
        rows.append(measure(key, architecture, compiled.asm["cubin"], shared))
        if architecture == PTX_FROM:
            images[PTX] = (compiled.asm["ptx"].encode() + b"\0", shared)
    stream, places = compress(images)
    (symbol,) = symbols
    arguments = tuple(Argument(name, _kind(type_), divisor) for name, type_, divisor in kernel.arguments)
    scratch = tuple(Argument(name, "scratch", 1) for name in SCRATCH)
    entry = Entry(
        variant.kernel,
        variant.dtype,
        dict(variant.constants),
        variant.warps,
        variant.stages,
        symbol,
        arguments + scratch,
        kernel.grid,
        places,
        len(stream),
    )
    return entry, stream, rows


def _start() -> None:
    os.environ.update(ENVIRONMENT)


def _compile(variant: Variant, kernel: Kernel, architecture: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    where = f"the kernel '{key_of(variant)}' for sm_{architecture}"
    function = getattr(import_module(kernel.module), variant.kernel)
    types = {name: type_.replace("T", TYPES[variant.dtype]) for name, type_, _ in kernel.arguments}
    expected = [name for name in function.arg_names if name not in variant.constants]
    if [*types] != expected or not {*variant.constants} <= {*function.arg_names}:
        raise EngineError(
            f"{where}: wrong arguments\nfound {', '.join(types)}\n"
            f"expected {', '.join(expected)} of {function.arg_names}"
        )
    divisors = {
        (function.arg_names.index(name),): [["tt.divisibility", divisor]]
        for name, _, divisor in kernel.arguments
        if divisor > 1
    }
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    options: dict[str, Any] = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": True,
    }
    if int(architecture) < 90:
        options["ptx_version"] = 80  # of CUDA 12.0; Triton's default would ask for a driver of CUDA 12.9
    _choose_assembler(architecture)
    try:
        compiled = triton.compile(
            ASTSource(function, signature, dict(variant.constants), divisors),
            target=GPUTarget("cuda", int(architecture), 32),
            options=options,
        )
    except Exception as error:
        said = " ".join(str(error).split())
        raise EngineError(f"{where} does not compile\n{type(error).__name__}: {said:.500}") from error
    about = compiled.metadata
    # What the launchers do not do: hand out scratch memory, start clusters or whole grids, add warps.
    asked = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "num_warps": variant.warps}
    for name, number in {**asked, "launch_cooperative_grid": False}.items():
        if getattr(about, name) != number:
            raise EngineError(f"{where} cannot be launched\nfound {name} {getattr(about, name)}, expected {number}")
    head = re.search(r"\.entry [^)]*\)", compiled.asm["ptx"])
    parameters = head[0].count(".param") if head else 0
    if parameters != len(kernel.arguments) + len(SCRATCH):
        raise EngineError(
            f"{where} has {parameters} parameters\n"
            f"expected its own {len(kernel.arguments)} and Triton's {', '.join(SCRATCH)}\nuse Triton 3.9"
        )
    return compiled


def _choose_assembler(architecture: str) -> None:
    """CUDA 12's wherever it knows the GPU. From 9.0 on Triton would take CUDA 13's, whose cubins want a driver of CUDA
    13; registers and instructions are the same, and it spills 8 to 16 bytes more. 11.0 is known to CUDA 13 alone."""
    from triton import knobs

    name = "ptxas-blackwell" if architecture == "110" else "ptxas"
    knobs.nvidia.ptxas_blackwell = str(Path(knobs.nvidia.ptxas.path).with_name(name))


def _kind(type_: str) -> str:
    return "pointer" if type_.startswith("*") else {"i32": "i32", "fp32": "f32"}[type_]


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")
