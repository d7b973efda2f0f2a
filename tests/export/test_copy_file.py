"""Copies keep content and holes, through the kernel alone, and a file that changes under them is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdm.export import copy_file
from mdm.export.copy_file import copy_sparse

BLOCK = 4096
RUNS = st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=8)  # data or hole, how many blocks
SPARE = 16  # blocks of 512 bytes that a copy may take beyond its source


def no_clone() -> AbstractContextManager[Any]:
    """Where the file system could clone, do as if it could not."""
    return patch.object(copy_file, "ioctl", side_effect=OSError)


def write_runs(path: Path, runs: list[tuple[bool, int]], tail: int) -> None:
    with path.open("wb") as file:
        for place, (data, blocks) in enumerate(runs):
            if data:
                file.write(bytes([place + 1]) * blocks * BLOCK)
            else:
                file.seek(blocks * BLOCK, os.SEEK_CUR)
        file.truncate(file.tell() + tail)


def copied(source: Path) -> Path:
    target = source.with_name("target")
    target.write_bytes(b"what lay here before" * 1000)
    copy_sparse(source, target)
    return target


@settings(max_examples=60, deadline=None)
@example(runs=[], tail=0)  # empty
@example(runs=[], tail=1)
@example(runs=[(False, 4)], tail=100)  # holes alone
@example(runs=[(False, 1), (True, 1), (False, 1)], tail=0)
@example(runs=[(True, 5)], tail=0)
@given(runs=RUNS, tail=st.integers(0, 2 * BLOCK))
def test_content_and_holes_are_kept(
    runs: list[tuple[bool, int]], tail: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.getbasetemp() / "source"
    write_runs(source, runs, tail)
    with no_clone():
        target = copied(source)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + SPARE


def test_a_clone_where_there_is_one_has_the_content_too(tmp_path: Path) -> None:
    write_runs(tmp_path / "source", [(True, 3), (False, 9)], 17)
    assert copied(tmp_path / "source").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_chunk_is_not_the_end(tmp_path: Path) -> None:
    write_runs(tmp_path / "source", [(True, 3), (False, 2), (True, 2)], 0)
    with no_clone(), patch.object(copy_file, "CHUNK", 1000):
        assert copied(tmp_path / "source").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.fixture
def shrinking(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """shrinking("sendfile", 2): a file of two runs that is cut just before the second call of that name."""
    source, calls = tmp_path / "source", 0
    patches = []

    def make(name: str, call: int) -> Path:
        write_runs(source, [(True, 4), (False, 4), (True, 4)], 0)
        true = getattr(os, name)

        def cutting(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.truncate(source, BLOCK)
            return true(*arguments)

        patches.append(patch.object(copy_file.os, name, cutting))
        patches[-1].start()
        return source

    yield make
    for one in patches:
        one.stop()


@pytest.mark.parametrize(
    "moment",
    [("sendfile", 1), ("sendfile", 2), *(("lseek", call) for call in range(1, 7)), ("ftruncate", 1)],
    ids=lambda moment: f"{moment[0]}-{moment[1]}",
)
def test_a_source_that_becomes_shorter_is_an_error(
    moment: tuple[str, int], shrinking: Callable[[str, int], Path]
) -> None:
    source = shrinking(*moment)
    with no_clone(), pytest.raises(OSError, match=r"."):
        copied(source)


def test_nothing_goes_through_python(tmp_path: Path) -> None:
    """A child copies 192 MB of data in a file of 512 MB; its memory stays a fraction of that."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        for place in range(3):
            file.seek(place << 27)
            file.write(b"\1" * (1 << 26))
        file.truncate(1 << 29)
    program = (
        "import runpy, sys\n"
        "own = runpy.run_path(sys.argv[1])\n"
        "own['copy_sparse'].__globals__['FICLONE'] = 0\n"
        "from pathlib import Path\n"
        "own['copy_sparse'](Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", program, copy_file.__file__, str(source), str(tmp_path / "target")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(said) < 60_000  # KiB
    assert (tmp_path / "target").stat().st_size == 1 << 29
    assert (tmp_path / "target").stat().st_blocks * 512 < 3 << 26 | 1 << 20
