"""The header reader beside the safetensors package: what it writes is read alike, what it refuses is refused."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from mdm.plugins.errors import InputError
from mdm.runtime.safetensors_header import NUMPY, Entry, Header, read_array, read_header, write_header

PROPERTY = settings(
    derandomize=True, database=None, deadline=None, max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

SIZES = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}
PLAIN = [np.dtype(kind) for name, kind in NUMPY.items() if name not in ("BF16", "BOOL")] + [np.dtype(bool)]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    kind = draw(st.sampled_from(PLAIN))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    return np.asarray(rng.integers(0, 2 if kind.kind == "b" else 99, shape)).astype(kind)


# No lone surrogates, which are no text.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


def header_of(path: Path, content: bytes) -> Header:
    path.write_bytes(content)
    return read_header(path)


def framed(header: Any, values: int = 0) -> bytes:
    """A file of this header, text or to be JSON, and so many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(values)


def taken_by_package(content: bytes) -> bool:
    try:
        deserialize(content)
    except Exception:  # its own errors, and Python's for a name that is no text
        return False
    return True


def assert_told(error: pytest.ExceptionInfo[InputError], path: Path) -> None:
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


@PROPERTY
@given(st.dictionaries(NAMES, arrays(), max_size=5), st.dictionaries(NAMES, st.text("aé\n😀"), max_size=3))
def test_what_the_package_writes_is_read(
    tmp_path: Path, made: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str]
) -> None:
    path = tmp_path / "a.safetensors"
    content = save(made, metadata or None)
    header = header_of(path, content)
    assert header.metadata == metadata
    assert set(header.tensors) == set(made)
    for name, entry in header.tensors.items():
        values = read_array(path, entry)
        assert content[entry.offset : entry.offset + entry.length] == made[name].tobytes()
        assert values.dtype == made[name].dtype
        np.testing.assert_array_equal(values, made[name], strict=True)
    # One metadata entry at most: the package orders several by chance.
    if len(metadata) < 2:
        assert content.startswith(write_header(header.tensors, metadata))


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Entry]:
    made, begin = {}, draw(st.integers(0, 1000))
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype, shape = draw(st.sampled_from(list(NUMPY))), tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
        made[name] = Entry(dtype, shape, begin, math.prod(shape) * SIZES[dtype])
        begin += made[name].length
    return made


@PROPERTY
@given(entries(), st.dictionaries(NAMES, NAMES, max_size=3))
def test_what_is_written_is_read_by_both(tmp_path: Path, made: dict[str, Entry], metadata: dict[str, str]) -> None:
    content = write_header(made, metadata)
    assert len(content) % 8 == 0
    assert content == write_header(made, dict(reversed(metadata.items())))
    values = bytes(sum(entry.length for entry in made.values()))
    header = header_of(tmp_path / "a.safetensors", content + values)
    assert header.metadata == metadata
    assert list(header.tensors) == list(made)
    for name, entry in header.tensors.items():
        assert (entry.dtype, entry.shape, entry.length) == (made[name].dtype, made[name].shape, made[name].length)
    assert min((entry.offset for entry in header.tensors.values()), default=len(content)) == len(content)
    found = {name: tuple(entry["shape"]) for name, entry in deserialize(content + values)}
    assert found == {name: entry.shape for name, entry in made.items()}


SAMPLE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, bool)}, {"mdm": "x"})


def cut(draws: random.Random) -> Iterator[bytes]:
    for length in range(len(SAMPLE)):
        yield SAMPLE[:length]
    yield SAMPLE + b"\0"


def flipped(draws: random.Random) -> Iterator[bytes]:
    """Every bit of length and header, one by one."""
    for bit in range(8 * (len(SAMPLE) - 27)):
        copy = bytearray(SAMPLE)
        copy[bit // 8] ^= 1 << bit % 8
        yield bytes(copy)


def swapped(draws: random.Random) -> Iterator[bytes]:
    """Pieces of the header replaced by others, the length put right."""
    text = SAMPLE[8:-27].rstrip()
    pieces = [b"0", b"-0", b"-1", b"1.0", b"1e3", b"24", b"27", b"9" * 19, b"9" * 5000, b"null", b"NaN", b"[]", b"[0]"]
    pieces += [b"{}", b'"F16"', b'"I64"', b'"a"', b'"b"', b'"\\ud800"', b'"\xff"', b"[" * 300 + b"]" * 300, b"1" * 30]
    pieces += [
        b'"\\n\\n\\n\\n"',
        b'{"\\n\\n\\n":1}',
        b'"' + b"x" * 500 + b'"',
        b"1E999",
        b"-Infinity",
        b"",
        b"\xef\xbb\xbf",
    ]
    for _ in range(1500):
        begin = draws.randrange(len(text))
        new = text[:begin] + draws.choice(pieces) + text[begin + draws.randrange(8) :]
        yield framed(new) + SAMPLE[-27:]
    for old in (b"0", b"24", b"27", b"2", b"3", b'"a"', b'"b"', b'"F32"', b'"BOOL"', b"[2,3]", b"[0,24]", b'"x"'):
        for new in pieces:
            yield framed(text.replace(old, new)) + SAMPLE[-27:]


@pytest.mark.parametrize("damage", [cut, flipped, swapped])
def test_what_the_package_refuses_is_refused(damage: Any, tmp_path: Path) -> None:
    """And what is refused is told in an InputError; nothing else comes out."""
    path, taken, refused, stricter = tmp_path / "a.safetensors", 0, 0, 0
    for content in damage(random.Random(0)):
        said, by_package = "", taken_by_package(content)
        try:
            header = header_of(path, content)
        except InputError as error:
            said = str(error)
        if said:
            assert str(path) in said
            assert len(said.splitlines()) <= 3
            refused += 1
            stricter += by_package
        else:
            taken += 1
            assert by_package, content
            shapes = {name: tuple(entry["shape"]) for name, entry in deserialize(content)}
            assert {name: entry.shape for name, entry in header.tensors.items()} == shapes
    print(f"{damage.__name__}: {taken} taken, {refused} refused, {stricter} of them only here")
    assert refused > 100
    assert taken == 0 or damage is not cut


def one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (one("F8_E4M3", [4]), "dtype 'F8_E4M3'\nexpected one of: F64"),
        (one(["F32"]), "has the dtype a list of 1"),
        (one(shape=[2]), r"has 4 bytes of values\nexpected 8: F32 of shape \[2\]"),
        (one(shape=[True]), "expected a list of at most 32 whole numbers"),
        (one(shape=[1.0]), "expected a list of at most 32 whole numbers"),
        (one(shape=[-1]), "expected a list of at most 32 whole numbers"),
        (one(shape="\n\n\n\n"), "expected a list of at most 32 whole numbers"),
        (one(shape=[1] * 33), "expected a list of at most 32 whole numbers"),
        (one(shape=[2**62, 4, 0], offsets=[0, 0]), r"expected less than 2\^63 bytes"),
        (one(shape=[2**32, 2**32]), r"expected less than 2\^63 bytes"),
        (one(shape=[10**9]), "expected 4000000000"),
        (one(offsets=[0, 4, 8]), r"expected \[begin, end\]"),
        (one(offsets=[4, 0]), r"expected \[begin, end\]"),
        (one(offsets=[1, 5]), "leaves a hole"),
        (one() | {"u": one()["t"]}, "overlaps another tensor"),
        (one(offsets=[0, 8], shape=[2]), "is cut, or something is appended"),
        (one(extra=1), "expected dtype, shape and data_offsets"),
        ({"t": 3}, "has 3\nexpected dtype, shape"),
        (one() | {"__metadata__": {"a": 1}}, "expected an object of texts"),
        (one() | {"__metadata__": None}, "expected an object of texts"),
        ([1], "expected '{'"),
        (b"", "expected '{'"),
        (b' {"a": 1}', "expected '{'"),
        (b'{"t":1,"t":2}', "the key 't' stands 2 times in one object"),
        (b'{"t":' * 40000, "nests deeper than 32 levels"),
        (b'{"t":NaN}', "NaN is no JSON number"),
        (b'{"t":"\xff"}', "can't decode byte"),
    ],
)
def test_a_false_header_is_told(header: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=said) as caught:
        header_of(path, framed(header, 4))
    assert_told(caught, path)


def test_a_false_length_is_told_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (2**63, 2**64 - 1, 100_000_001, 5):
        path.write_bytes(length.to_bytes(8, "little") + b"{}  ")
        os.truncate(path, max(12, min(length, 200_000_000)) if length != 5 else 12)  # a hole, no blocks
        with pytest.raises(InputError, match=f"claims a header of {length}") as caught:
            read_header(path)
        assert_told(caught, path)


def test_a_file_of_16_gb_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = {"a": Entry("F32", (2**32,), 0, 2**34), "b": Entry("BF16", (3,), 2**34, 6)}
    content = write_header(made)
    with path.open("wb") as file:
        file.write(content)
        file.seek(2**34, os.SEEK_CUR)
        file.write(bytes([1, 0, 2, 0, 3, 1]))
    header = read_header(path)
    assert header.tensors["a"].offset == len(content)
    assert read_array(path, header.tensors["b"]).tolist() == [1, 2, 259]


def test_links_are_followed_and_other_things_refused(tmp_path: Path) -> None:
    path, link = tmp_path / "blob", tmp_path / "a.safetensors"
    path.write_bytes(SAMPLE)
    link.symlink_to(path)
    assert read_header(link) == read_header(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", tmp_path / "none", Path("a\0b"), tmp_path / ("x" * 5000)):
        with pytest.raises(InputError, match=r"regular file|cannot be read"):
            read_header(other)


def test_values_cut_after_the_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = header_of(path, SAMPLE)
    path.write_bytes(SAMPLE[:-1])
    with pytest.raises(InputError, match="ends inside a tensor") as caught:
        read_array(path, max(header.tensors.values(), key=lambda entry: entry.offset))
    assert_told(caught, path)


def test_a_byte_that_is_no_truth_value(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = header_of(path, SAMPLE[:-3] + bytes([0, 2, 255]))
    assert read_array(path, header.tensors["b"]).tolist() == [False, True, True]


def test_a_header_that_would_be_refused_is_not_written() -> None:
    with pytest.raises(InputError, match="expected 8"):
        write_header({"a": Entry("F32", (2,), 0, 4)})
    with pytest.raises(InputError, match="leaves a hole"):
        write_header({"a": Entry("U8", (2,), 0, 2), "b": Entry("U8", (2,), 3, 2)})
