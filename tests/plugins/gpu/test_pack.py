"""The kernel pack: the right image comes back, the same bytes for the same kernels, and no damage goes unseen."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
from binascii import crc32
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.gpu.pack import ARCHITECTURES, HEADER, PTX, Pack, architecture, write

from .fake_cuda import ARGUMENTS, entry_of, image_of, some_variant, write_some

SOME = [some_variant(dtype=dtype, BLOCK=size) for dtype in ("float32", "bfloat16") for size in (64, 128)]


def read_all(path: Path) -> None:
    pack = Pack.open(path)
    for entry in pack.entries.values():
        for name in entry.images:
            pack.read(entry, name)


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_all(path)
    assert len(str(caught.value).splitlines()) <= 3


def test_every_image_comes_back(tmp_path: Path) -> None:
    pack = Pack.open(write_some(tmp_path / "pack", *SOME))
    assert len(pack.entries) == len(SOME)
    for variant in SOME:
        entry = pack.entry(variant)
        assert (entry.key, entry.arguments) == (entry_of(variant)[0].key, ARGUMENTS)
        for name in (*ARCHITECTURES, PTX):
            assert pack.read(entry, name) == image_of(variant, name)
            assert entry.images[name].shared == 70_000
    assert pack.image(entry, (9, 0)) == image_of(SOME[-1], "90")


def test_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    packs = {write_some(tmp_path / "pack", *order).read_bytes() for order in itertools.permutations(SOME)}
    assert len(packs) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "80"), ((8, 6), "86"), ((8, 7), "87"), ((8, 9), "89"), ((9, 0), "90"), ((10, 0), "100"),
        ((11, 0), "110"), ((12, 0), "120"),
        # Triton's cubins from 9.0 on serve their own architecture alone, and Jetson's have no kin.
        ((8, 8), PTX), ((10, 3), PTX), ((12, 1), PTX), ((13, 0), PTX),
    ],
)  # fmt: skip
def test_the_image_for_a_device(capability: tuple[int, int], expected: str) -> None:
    assert architecture(entry_of(SOME[0])[0], capability) == expected


@pytest.mark.parametrize(
    ("names", "capability", "expected"),
    [
        (("80", "87", PTX), (8, 9), "80"),  # never 8.7's
        (("80", "86", PTX), (8, 9), "86"),
        (("86", PTX), (8, 0), PTX),  # never a newer one's
        (("80", PTX), (8, 7), PTX),
        (("80", "90"), (10, 0), None),
        (("80", PTX), (7, 5), None),
    ],
)
def test_the_image_where_the_device_has_no_own(
    names: tuple[str, ...], capability: tuple[int, int], expected: str | None
) -> None:
    entry = entry_of(SOME[0], names)[0]
    if expected:
        assert architecture(entry, capability) == expected
    else:
        with pytest.raises(EnvironmentLackError, match=rf"scaled_add.*\b{capability[0]}\.{capability[1]}\b"):
            architecture(entry, capability)


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    pack = Pack.open(write_some(tmp_path / "pack"))
    with pytest.raises(InputError, match="has no 'scaled_add float32 BLOCK=3 warps=4 stages=1'"):
        pack.entry(some_variant(BLOCK=3))


def test_no_damaged_byte_goes_unseen(tmp_path: Path) -> None:
    """Every byte of a pack, one at a time, but those of LZMA that change nothing in what comes out."""
    path = write_some(tmp_path / "pack", replace(SOME[0], constants={}))
    whole = path.read_bytes()
    images = HEADER.size + HEADER.unpack_from(whole)[2]
    unseen = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with contextlib.suppress(InputError):
            read_all(path)
            unseen.append(place)
    assert not [place for place in unseen if place < images]
    assert len(unseen) <= 10  # behind the last image: the stream's end mark


def test_a_cut_or_longer_pack_is_refused(tmp_path: Path) -> None:
    path = write_some(tmp_path / "pack", *SOME)
    whole = path.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 60):
        path.write_bytes(whole[:length])
        refused(path, "pack")
    path.write_bytes(whole + b"\0")
    refused(path, f"found {len(whole) + 1} bytes, expected {len(whole)}")


def test_foreign_and_newer_files(tmp_path: Path) -> None:
    path = write_some(tmp_path / "pack")
    whole = path.read_bytes()
    path.write_bytes(b"PK\3\4" + whole[4:])
    refused(path, "is no kernel pack\nfound b'PK")
    path.write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    refused(path, "found format 2, expected 1")
    refused(tmp_path / "nowhere", "cannot be read: No such file")


def edited(path: Path, edit: Callable[[Any], Any]) -> None:
    """The pack with another index, whose checksum is right."""
    whole = path.read_bytes()
    magic, version, length, _ = HEADER.unpack_from(whole)
    index = json.loads(whole[HEADER.size : HEADER.size + length])
    replaced = edit(index)
    text = json.dumps(index if replaced is None else replaced).encode()
    path.write_bytes(HEADER.pack(magic, version, len(text), crc32(text)) + text + whole[HEADER.size + length :])


def first(index: Any) -> Any:
    return index["entries"][0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: [],
        lambda index: first(index).update(images=[]),
        lambda index: first(index).update(images={"../80": first(index)["images"]["80"]}),
        lambda index: first(index)["images"]["80"].update(length=1 << 40),
        lambda index: first(index)["images"]["80"].update(length=-1),
        lambda index: first(index)["images"]["90"].update(start=3),
        lambda index: first(index)["images"]["90"].update(shared=True),
        lambda index: first(index).update(packed=0),
        lambda index: first(index).update(packed=1 << 30),
        lambda index: first(index).update(warps="4"),
        lambda index: first(index).update(warps=5),
        lambda index: first(index).update(symbol="a\nb"),
        lambda index: first(index)["arguments"][0].update(kind="f64"),
        lambda index: first(index)["arguments"].reverse(),
        lambda index: first(index)["arguments"][0].pop("name"),
        lambda index: index["entries"].append(first(index)),
        lambda index: index.update(made_by=3),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, edit: Callable[[Any], Any]) -> None:
    path = write_some(tmp_path / "pack")
    edited(path, lambda index: None)
    Pack.open(path)
    edited(path, edit)
    refused(path, "is damaged")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "pack", b"[" * 100_000
    path.write_bytes(HEADER.pack(b"mdmkern\n", 1, len(text), crc32(text)) + text)
    refused(path, "is damaged: its index")


def test_a_pack_that_fails_to_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_some(tmp_path / "pack")
    before = path.read_bytes()
    entry, stream = entry_of(SOME[0])
    with pytest.raises(TypeError):
        write(path, "a test", [(entry, stream), (entry_of(SOME[1])[0], None)])  # type: ignore[list-item]
    assert path.read_bytes() == before
