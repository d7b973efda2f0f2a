"""The pack that comes with the package: it is of these kernels, whole, small, and spills nothing it should not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from mdm.plugins.gpu import resources
from mdm.plugins.gpu.build import build_pack, made_by
from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, SHIPPED, Pack, key_of
from mdm.plugins.gpu.resources import Row
from mdm.plugins.gpu.variants import CARRY, KERNELS, serves, ssd_variant, variants


@pytest.fixture(scope="module")
def pack() -> Pack:
    return Pack.open(SHIPPED)


@pytest.fixture(scope="module")
def hopper(pack: Pack) -> list[Row]:
    return resources.measure_pack(pack, ["90"])


def test_it_is_of_these_kernels(pack: Pack) -> None:
    assert pack.made_by == made_by(), "kernels have changed: mdm plugin kernels"
    assert {*pack.entries} == {key_of(variant) for variant in variants()}
    for variant in variants():
        entry, kernel = pack.entry(variant), KERNELS[variant.kernel]
        wanted = {name for name in ARCHITECTURES if serves(variant, divmod(int(name), 10))}
        assert {*entry.images} == wanted | ({PTX} if "80" in wanted else set())
        assert entry.grid == kernel.grid
        given = [(a.name, a.divisor) for a in entry.arguments if a.kind != "scratch"]
        assert given == [(name, divisor) for name, _, divisor in kernel.arguments]


def test_it_is_small() -> None:
    assert SHIPPED.stat().st_size < 8e6


def test_some_of_it_built_again_has_the_same_bytes(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images of two entries, which every assembler and every option of the build has its hand in."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # nothing is there already
    some = [CARRY, ssd_variant("bfloat16", 16, 32, 64)]
    build_pack(tmp_path / "pack", some, jobs=2)
    again = Pack.open(tmp_path / "pack")
    for variant in some:
        shipped, built = pack.entry(variant), again.entry(variant)
        assert built.images == shipped.images
        for name in shipped.images:
            assert again.read(built, name) == pack.read(shipped, name)


def test_resources(pack: Pack, hopper: list[Row]) -> None:
    """Spilled registers on sm_90; shared memory everywhere."""
    assert len(hopper) == sum(serves(variant, (9, 0)) for variant in variants())
    assert resources.problems(hopper) == []
    for entry in pack.entries.values():
        for name, image in entry.images.items():
            assert image.shared <= resources.SHARED_LIMIT.get(name, resources.SHARED_LIMIT["80"])


def test_machine_code_on_hopper(hopper: list[Row]) -> None:
    """What the sources' comments promise of it."""
    for row in hopper:
        kernel, dtype = row.key.split()[:2]
        if dtype == "float32":
            assert row.matrix == {}, f"{row.key}: no tf32"
        elif kernel == "ssd_scan":
            assert row.matrix["HGMMA"] >= 6, row.key
            assert row.wide_loads > row.loads // 2, row.key
        elif kernel == "ssd_segment_states":
            assert row.matrix, row.key
        if kernel == "selective_scan":  # each token's arithmetic stays in its thread: no barrier a token
            assert row.barriers <= 30, row.key
