"""What is read from cubins: of a product, of a kernel with too few registers, and what of it may not be shipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from mdm.plugins.errors import EngineError
from mdm.plugins.gpu.build import build_pack
from mdm.plugins.gpu.resources import SHARED_LIMIT, Row, measure, problems, text
from mdm.plugins.gpu.variants import Variant

from .test_build import ADD, HERE, PRODUCT, SOME_KERNELS

HOARDER = Variant("hoarder", "float32", {"SIZE": 4096}, 1, 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    folder = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        table = build_pack(folder / "pack", [ADD, PRODUCT], ["80", "90", "100", "120"], jobs=1, kernels=SOME_KERNELS)
        table += build_pack(folder / "pack", [HOARDER], ["90"], jobs=1, kernels=SOME_KERNELS)
        add = SOME_KERNELS["scaled_add"]
        unaligned = replace(add, arguments=tuple((name, type_, 1) for name, type_, _ in add.arguments))
        kernels = {"scaled_add": unaligned}
        table += build_pack(folder / "pack", [replace(ADD, dtype="float32")], ["90"], jobs=1, kernels=kernels)
    assert {row.key for row in table} <= {*text(table).splitlines()}
    return {(" ".join(row.key.split()[:2]), row.architecture): row for row in table}


@pytest.mark.parametrize(
    ("architecture", "name"), [("80", "HMMA"), ("90", "HGMMA"), ("100", "UTCHMMA"), ("120", "HMMA")]
)
def test_products_use_matrix_instructions(rows: dict[tuple[str, str], Row], architecture: str, name: str) -> None:
    row = rows["product float16", architecture]
    assert row.matrix.keys() == {name}
    assert row.shared >= 2 * 64 * 64 * 2 > 0
    assert row.barriers > 0
    assert row.loads == row.wide_loads > 0
    assert rows["scaled_add bfloat16", architecture].matrix == {}


def test_loads_of_16_bytes_want_alignment(rows: dict[tuple[str, str], Row]) -> None:
    aligned, unaligned = rows["scaled_add bfloat16", "90"], rows["scaled_add float32", "90"]
    assert (aligned.wide_loads, aligned.wide_stores) == (aligned.loads, aligned.stores)
    assert (unaligned.wide_loads, unaligned.wide_stores) == (0, 0)
    assert unaligned.loads > 0
    assert unaligned.stores > 0


def test_spilled_registers_are_a_problem_on_90(rows: dict[tuple[str, str], Row]) -> None:
    row = rows["hoarder float32", "90"]
    assert row.registers == 255
    assert row.spilled > 32
    assert problems(rows.values()) == [f"{row.key} on sm_90: {row.spilled} bytes spilled, at most 32 expected"]
    assert problems([replace(row, spilled=32)]) == []


def test_too_much_shared_memory_is_a_problem(rows: dict[tuple[str, str], Row]) -> None:
    row = replace(rows["product float16", "120"], shared=SHARED_LIMIT["120"] + 1)
    assert problems([row]) == [f"{row.key} on sm_120: 101377 bytes of shared memory, and a block may have 101376"]
    assert problems([replace(row, architecture="80"), replace(row, shared=SHARED_LIMIT["120"])]) == []


def test_what_is_no_cubin() -> None:
    with pytest.raises(EngineError, match="cuobjdump failed"):
        measure("a kernel", "90", b"no cubin", 0)
