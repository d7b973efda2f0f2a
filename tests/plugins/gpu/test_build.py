"""The build, on small kernels: cubins for every architecture, the same bytes each time, no path of a machine."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from mdm.plugins.errors import EngineError
from mdm.plugins.gpu.build import build_pack
from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, Argument, Pack
from mdm.plugins.gpu.variants import Kernel, Variant

HERE = Path(__file__).parent
ADD = Variant("scaled_add", "bfloat16", {"BLOCK": 1024}, 4, 1)
PRODUCT = Variant("product", "float16", {"SIZE": 64}, 4, 1)
_ADD_ARGUMENTS = (("x", "*T", 16), ("y", "*T", 16), ("out", "*T", 16), ("n", "i32", 8), ("scale", "fp32", 1))
ONE = ("1", "1", "1")
SOME_KERNELS = {
    "scaled_add": Kernel("some_kernels", _ADD_ARGUMENTS, ("n/BLOCK", "1", "1")),
    "product": Kernel("some_kernels", (("a", "*T", 16), ("b", "*T", 16), ("out", "*fp32", 16)), ONE),
    "hoarder": Kernel("some_kernels", (("x", "*T", 16), ("out", "*T", 16), ("steps", "i32", 1)), ONE),
    "one_too_many": Kernel("some_kernels", (("x", "*T", 1),), ONE),
}


@pytest.fixture(autouse=True)
def _some_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.syspath_prepend(HERE)  # the processes of the build inherit it
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as where the kernels' own tests have run
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))  # nothing is there already


def test_a_pack_of_real_kernels_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []

    def say(*more: Any) -> None:
        told.append(more)

    table = build_pack(tmp_path / "a", [ADD, PRODUCT], jobs=1, progress=say, kernels=SOME_KERNELS)
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert [(row.key, row.architecture) for row in table] == [
        (key, name) for key in sorted({key for *_, key in told}) for name in ARCHITECTURES
    ]

    pack = Pack.open(tmp_path / "a")
    entry = pack.entry(ADD)
    assert entry.arguments[3:] == (
        Argument("n", "i32", 8), Argument("scale", "f32", 1),
        Argument("global_scratch", "scratch", 1), Argument("profile_scratch", "scratch", 1),
    )  # fmt: skip
    for entry in pack.entries.values():
        for name in ARCHITECTURES:
            cubin = pack.read(entry, name)
            assert cubin[:4] == b"\x7fELF"
            assert architecture_of(cubin) == int(name)
            assert entry.symbol.encode() in cubin
        ptx = pack.read(entry, PTX)
        assert re.search(rb"\.version 8\.0\n\.target sm_80\n", ptx)
        assert ptx.rstrip(b"\n\0").endswith(b"}")
        assert ptx.count(b"\0") == 1
        assert ptx.endswith(b"\0")
        everything = b"".join(pack.read(entry, name) for name in entry.images)
        for word in (b"some_kernels", b"/tmp", os.fsencode(HERE), os.fsencode(Path.home())):
            assert word not in everything

    # Elsewhere, in another order, on other lines, with other processes, hash seeds and an empty cache.
    (tmp_path / "some_kernels.py").write_text("\n\n\n" + (HERE / "some_kernels.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    build_pack(tmp_path / "b", [PRODUCT, ADD], jobs=2, kernels=SOME_KERNELS)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def architecture_of(cubin: bytes) -> int:
    """From the ELF header's flags, whose layout is the file's ABI version's."""
    abi, (flags,) = cubin[8], struct.unpack_from("<I", cubin, 48)
    return int(flags & 0xFF if abi < 8 else flags >> 8 & 0xFF)


@pytest.mark.parametrize(
    ("variant", "arguments", "said"),
    [
        (Variant("one_too_many", "float32", {"BLOCK": 64}, 4, 1), (("x", "*T", 1),), "does not compile\n.*power of 2"),
        (ADD, _ADD_ARGUMENTS[:4], "wrong arguments\nfound x, y, out, n\nexpected x, y, out, n, scale"),
        (replace(ADD, constants={"BLOK": 512}), _ADD_ARGUMENTS, "wrong arguments"),
    ],
)
def test_a_kernel_that_cannot_be_built(tmp_path: Path, variant: Variant, arguments: Any, said: str) -> None:
    kernels = {variant.kernel: Kernel("some_kernels", arguments, ONE)}
    with pytest.raises(EngineError, match=f"'{variant.kernel} .*' for sm_90:? {said}") as caught:
        build_pack(tmp_path / "pack", [variant], architectures=["90"], jobs=1, kernels=kernels)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "pack").exists()
