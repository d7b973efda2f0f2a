"""What a cubin takes of a GPU, read from the cubin with the tools that come with Triton.

A row is one image of the pack. `problems` says which rows must not be shipped; the rest of a row is for people, who
want to see matrix instructions in a kernel of products, and loads of 16 bytes where rows are contiguous.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.plugins.gpu.pack import Pack

# Bytes of shared memory a block may ask for, by architecture: the CUDA programming guide's table of compute
# capabilities, less the 1 KiB a block that the system keeps.
SHARED_LIMIT = {
    "80": 163 << 10, "86": 99 << 10, "87": 163 << 10, "89": 99 << 10,
    "90": 227 << 10, "100": 227 << 10, "110": 227 << 10, "120": 99 << 10,
}  # fmt: skip
SPILL_LIMIT = {"90": 32}  # bytes a thread


@dataclass(frozen=True)
class Row:
    """Of one entry on one architecture. Instructions are counted as they stand in the code, not as they run."""

    key: str
    architecture: str
    registers: int
    spilled: int  # bytes of stack a thread; the kernels have no arrays, so it is spilled registers
    shared: int  # bytes a block
    barriers: int
    matrix: dict[str, int]  # instructions that multiply matrices, by name
    loads: int  # from global memory
    wide_loads: int  # of these, 16 bytes a thread
    stores: int
    wide_stores: int


def measure(key: str, architecture: str, cubin: bytes, shared: int) -> Row:
    with TemporaryDirectory(prefix="mdm_cubin") as folder:
        file = Path(folder) / "cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(file))
        code = _run("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    # "/*0010*/ @!P0 LDG.E.128.CONSTANT R4, ..."; what runs on the uniform path has a predicate UP0.
    counts = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code))
    if found is None or not counts:
        raise EngineError(f"cuobjdump and nvdisasm do not tell of '{key}' on sm_{architecture}\nfound: {usage!r:.200}")

    def total(pattern: str) -> int:
        return sum(count for name, count in counts.items() if re.match(pattern, name))

    matrix: Counter[str] = Counter()
    for name, count in counts.items():
        if (base := name.split(".")[0]).endswith("MMA"):
            matrix[base] += count
    return Row(
        key,
        architecture,
        registers=int(found[1]),
        spilled=max(int(found[2]), int(found[3])),
        shared=shared,
        barriers=total(r"BAR\."),
        matrix=dict(sorted(matrix.items())),
        loads=total(r"LDG(STS)?\.|UTMALDG|UBLKCP"),
        wide_loads=total(r"LDG(STS)?\..*\b128\b|UTMALDG|UBLKCP"),
        stores=total(r"STG\.|UTMASTG"),
        wide_stores=total(r"STG\..*\b128\b|UTMASTG"),
    )


def measure_pack(pack: Pack, architectures: Iterable[str]) -> list[Row]:
    """Of every entry that has an image for these architectures."""
    return [
        measure(entry.key, name, pack.read(entry, name), entry.images[name].shared)
        for entry in pack.entries.values()
        for name in architectures
        if name in entry.images
    ]


def problems(table: Iterable[Row]) -> list[str]:
    """What must not be shipped, a line each."""
    found = []
    for row in table:
        where = f"{row.key} on sm_{row.architecture}"
        if row.spilled > (most := SPILL_LIMIT.get(row.architecture, row.spilled)):
            found.append(f"{where}: {row.spilled} bytes spilled, at most {most} expected")
        if row.shared > (most := SHARED_LIMIT[row.architecture]):
            found.append(f"{where}: {row.shared} bytes of shared memory, and a block may have {most}")
    return found


def text(table: Iterable[Row]) -> str:
    """The table for people, in the order of entries and architectures."""
    head = f"{'sm':>4} {'registers':>9} {'spilled':>7} {'shared':>7} {'barriers':>8} {'16-byte loads':>13}"
    head += f" {'stores':>7}  matrix instructions"
    lines, key = [head], ""
    for row in sorted(table, key=lambda row: (row.key, int(row.architecture))):
        if row.key != key:
            lines.append(key := row.key)
        matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "none"
        loads, stores = f"{row.wide_loads}/{row.loads}", f"{row.wide_stores}/{row.stores}"
        lines.append(
            f"{row.architecture:>4} {row.registers:>9} {row.spilled:>7} {row.shared:>7} {row.barriers:>8} "
            f"{loads:>13} {stores:>7}  {matrix}"
        )
    return "\n".join(lines)


def _run(tool: str, *arguments: str) -> str:
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise EnvironmentLackError(f"{tool} comes with Triton, which is not installed\ninstall it: pip install triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{tool} failed with {done.returncode}\n{done.stderr.strip():.300}")
    return done.stdout
