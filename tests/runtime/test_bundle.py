"""The bundle reader on a small sound bundle, and on folders in which something is missing, changed or a link."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import open_bundle, sha256_of

Inside = Callable[[Path], contextlib.AbstractContextManager[list[str]]]
Refusal = Callable[[Path], str]


def test_a_sound_bundle(folder: Path, manifest: dict[str, Any], refusal: Refusal) -> None:
    assert refusal(folder) == ""
    bundle = open_bundle(folder)
    assert bundle.manifest == manifest
    assert bundle.path == folder
    assert bundle.graph("step_image")["nodes"] == 12
    assert bundle.graph_bytes("step_image") == (folder / "step_image.onnx").read_bytes()
    assert bundle.file("golden/joint.safetensors") == folder / "golden" / "joint.safetensors"
    assert open_bundle(str(folder)).extra_files() == []


def test_the_least_bundle(folder: Path, manifest: dict[str, Any], refusal: Refusal) -> None:
    count = len(manifest["files"])
    manifest |= {"graphs": {}, "files": {}, "tasks": {}, "sampler_for": {}, "picture": None, "text": None}
    manifest |= {"golden": {}, "validation": {"state": "skipped"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(folder) == ""
    assert len(open_bundle(folder).extra_files()) == count


def test_unknown_names_are_told(folder: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(
        InputError, match=r"has no graph 'step_imag'; did you mean 'step_image'\?\ngraphs: step_image, d"
    ):
        bundle.graph("step_imag")
    for name in ("golden/joint", "../secret", "/etc/passwd", "manifest.json"):
        with pytest.raises(InputError, match="lists no file"):
            bundle.file(name)


def test_a_linked_folder_is_a_folder(folder: Path, refusal: Refusal) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert refusal(link) == ""


def test_progress_counts_every_byte(folder: Path) -> None:
    told: list[int] = []
    bundle = open_bundle(folder)
    bundle.verify(told.append)
    assert sum(told) == sum(signed["size"] for signed in bundle.manifest["files"].values())
    big = folder / "big"
    big.write_bytes(bytes(10**6))
    assert sha256_of(big, told.append) == hashlib.sha256(bytes(10**6)).hexdigest()
    assert len(told) > len(bundle.manifest["files"]) + 2  # in pieces


def test_extra_files_are_listed_and_not_opened(folder: Path, inside: Inside, refusal: Refusal) -> None:
    for name in ("engines/a/b.plan", "golden/more", "golden/engines/x", "hid/.den/f", ".git"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "up").symlink_to(folder.parent)
    (folder / "secret").symlink_to("../secret")
    os.mkfifo(folder / "pipe")
    with open(os.fsencode(folder) + b"/\xff", "wb"):
        pass
    assert refusal(folder) == ""
    with inside(folder) as opened:
        bundle = open_bundle(folder)
        found = bundle.extra_files()
        bundle.verify()
    assert found == [".git", r"\xff", "golden/engines/x", "golden/more", "hid/.den/f", "pipe", "secret", "up"]
    folders = {".", "hid", "hid/.den", "golden", "golden/engines", "sampler"}  # not those behind links, not engines
    names = {Path(path).relative_to(folder).as_posix() for path in opened}
    assert names == {*folders, "manifest.json", *bundle.manifest["files"]}


def test_no_bundle_at_all(folder: Path, refusal: Refusal) -> None:
    for path in (folder / "none", folder / "manifest.json", Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(InputError, match="is not a folder\nexpected what mdm export writes"):
            open_bundle(path)
    (folder / "manifest.json").unlink()
    assert "lacks the file 'manifest.json': No such file" in refusal(folder)


def test_a_newer_bundle_asks_for_an_upgrade(folder: Path, refusal: Refusal) -> None:
    (folder / "manifest.json").write_text('{"schema":2,"anything":1}')
    assert "made by a newer mdm-deploy: its manifest has schema 2\nexpected at most 1: upgrade" in refusal(folder)


def test_a_manifest_too_long(folder: Path, refusal: Refusal) -> None:
    os.truncate(folder / "manifest.json", 2**40)  # a hole, no blocks
    assert "expected at most 16777216" in refusal(folder)


def link(path: Path, target: str) -> None:
    """The file or folder moves to the target, and a link stands in its place."""
    path.rename(path.parent / target)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


UNSIGNED = "is not the file that the manifest signs\nits SHA-256 is "

# What is done to a sound bundle's folder, and what is said of it.
SPOILED: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda f: (f / "tokenizer.model").unlink(), "lacks the file 'tokenizer.model': No such file"),
    ("a file for a folder", lambda f: (shutil.rmtree(f / "golden"), (f / "golden").touch()), "Not a directory"),
    ("a folder for a file", lambda f: ((f / "sampler/table.json").rename(f / "x"), (f / "sampler/table.json").mkdir()),
     "is not a regular file"),
    ("cut", lambda f: os.truncate(f / "step_image.onnx", 5), "has 5 bytes, the manifest signs 360\nit was cut"),
    ("pipe", lambda f: pipe(f / "tokenizer.model"), "is not a regular file"),
    ("manifest a pipe", lambda f: pipe(f / "manifest.json"), "is not a regular file"),
    ("manifest a link", lambda f: link(f / "manifest.json", "m"), "is a link, expected a file of its own\n"),
    ("link inside", lambda f: link(f / "step_image.onnx", "x"), "onnx.checker refuse such files\ncopy the bundle"),
    ("link outside", lambda f: link(f / "tokenizer.model", "../x"), "tokenizer.model' is a link"),
    ("link to a folder", lambda f: link(f / "golden", "../x"), "golden' is a link"),
    ("loop", lambda f: (shutil.rmtree(f / "golden"), (f / "golden").symlink_to(".")), "golden' is a link"),
    ("graph changed", lambda f: (f / "step_image.onnx").write_bytes(b"x" * 360), UNSIGNED),
    ("other changed", lambda f: (f / "sampler/table.json").write_bytes(b"{}"), UNSIGNED),
    ("header", lambda f: (f / "golden/joint.safetensors").write_bytes(bytes(112)), "a header that begins with b''"),
    ("no text", lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "is not sound JSON"),
    ("a list", lambda f: (f / "manifest.json").write_text("[1]"), "the document is a list of 1\nexpected object"),
    ("nested", lambda f: (f / "manifest.json").write_text('{"config":' + "[" * 10**5), "nests deeper"),
    ("twice", lambda f: (f / "manifest.json").write_text('{"a":1,"a":1}'), "the key 'a' stands 2 times"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED])
def test_a_spoiled_folder_is_told(folder: Path, refusal: Refusal, spoil: Callable[[Path], object], said: str) -> None:
    spoil(folder)
    assert said in refusal(folder)
