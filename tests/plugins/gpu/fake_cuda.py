"""A driver library without a GPU (`fake_cuda.c`), and a pack for it, whose images say what they are for."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, Argument, Entry, compress, write
from mdm.plugins.gpu.variants import Variant

SOURCE = Path(__file__).with_name("fake_cuda.c")


def some_variant(kernel: str = "scaled_add", dtype: str = "float32", BLOCK: int = 1024) -> Variant:
    return Variant(kernel, dtype, {"BLOCK": BLOCK}, warps=4, stages=1)


ARGUMENTS = (
    Argument("x", "pointer", 16),
    Argument("y", "pointer", 1),
    Argument("n", "i32", 8),
    Argument("scale", "f32", 1),
    Argument("global_scratch", "scratch", 1),
    Argument("profile_scratch", "scratch", 1),
)
GRID = ("n/BLOCK", "B", "1")


@cache
def fake_cuda(*lacking: str) -> str:
    """The library, without these functions."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    made = Path(mkdtemp(prefix="fake_cuda")) / "libcuda.so.1"
    renamed = [f"-D{name}=not_{name}" for name in lacking]
    flags = ["-shared", "-fPIC", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-format-zero-length"]
    subprocess.run([compiler, *flags, *renamed, str(SOURCE), "-o", str(made)], check=True)
    return str(made)


def image_of(variant: Variant, name: str) -> bytes:
    """Longer than a few LZMA matches, and not all alike."""
    return (
        f"{variant.kernel} {variant.dtype} for {name}".encode().ljust(40)
        + bytes(range(256)) * 9
        + name.encode()
        + b"\0"
    )


def entry_of(
    variant: Variant, names: tuple[str, ...] = (*ARCHITECTURES, PTX), shared: int = 70_000
) -> tuple[Entry, bytes]:
    stream, images = compress({name: (image_of(variant, name), shared) for name in names})
    fields = {**vars(variant), "constants": dict(variant.constants)}
    made = Entry(**fields, symbol=variant.kernel, arguments=ARGUMENTS, grid=GRID, images=images, packed=len(stream))
    return made, stream


def write_some(path: Path, *variants: Variant) -> Path:
    write(path, "a test", [entry_of(v) for v in variants or (some_variant(),)])
    return path


class Told:
    """What the fake driver is told, and what it wrote down."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self._monkeypatch = folder / "calls", monkeypatch
        self(LOG=str(self.log), ARGUMENTS="ppifpp")

    def __call__(self, **values: str) -> None:
        for name, value in values.items():
            self._monkeypatch.setenv(f"FAKE_CUDA_{name}", value)

    def calls(self, function: str = "") -> list[str]:
        """The calls so far, of all functions or one, oldest first."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line for line in lines if line.split()[0] == function or not function]
