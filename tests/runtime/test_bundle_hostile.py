"""Manifests and files as an attacker may make them: taken as they are or refused in an MdmError, whatever they hold.

`refusal` also fails when anything outside of the bundle's folder is opened.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import MAX_CONTENT, open_bundle

Refusal = Callable[[Path], str]
Place = tuple[str | int, ...]

PROPERTY = settings(
    derandomize=True, database=None, deadline=None, max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


SIGNED = {"size": 6, "sha256": "0" * 64}


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a document."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*place, key))


def put(document: Any, place: Place, value: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    document[place[-1]] = value


def write(folder: Path, manifest: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))


PATHS = [
    "../secret", "/etc/passwd", "a/../../secret", "golden/../secret", "C:\\x", "C:/x", "a\\b", "\\\\host\\x",
    "//host/x", "golden//joint.safetensors", "./tokenizer.model", "golden/./x", "golden/", "", ".", "..", "~",
    "-rf", "~/x", "a\0b", "tokenizer.model\0", "tokenizer.model\n", " tokenizer.model", "tokenizer.model ", "x" * 5000,
    "a/" * 2000, "．．/secret", "..\u2215secret", "\u202esecret", "golden\u2044joint.safetensors",
    "tokenizer.model\u0301", "\ud800", "file:tokenizer.model", "http://x/y", "%2e%2e/secret", "..%2fsecret", "NUL:",
    "tokenizer.model:stream", "a\u202eb", "..secret", ".hidden", "engines/a.plan", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:20]))
def test_a_hostile_path_is_refused(path: str, folder: Path, manifest: dict[str, Any], refusal: Refusal) -> None:
    """In each of the places that name a file, and also if the manifest signs a file of that name."""
    for place in [
        (), ("graphs", "step_image", "file"), ("graphs", "step_image", "weights", 0), ("golden", "joint"),
        ("text", "tokenizer"),
    ]:  # fmt: skip
        for listed in (True, False):
            made = copy.deepcopy(manifest)
            if place:
                put(made, place, path)
            if listed:
                made["files"][path] = SIGNED
            write(folder, made)
            if place or listed:
                assert refusal(folder)


HOSTILE: list[Any] = [
    2**63, 2**64, -1, -(2**63), 0, 1, 10**9, 10**19, 1.0, 0.5, -0.0, 1e308, True, None, "", "x", "\n\n\n\n",
    "\x1b[31m", "x" * 10**4, "\ud800", [], [[]], [10**9], [0] * 2000, {}, {"": {}}, {"size": 1}, [None],
    {"a\n\n\n\n": 1}, "9" * 50, "1e5",
]  # fmt: skip


def test_a_hostile_value_anywhere(folder: Path, manifest: dict[str, Any], refusal: Refusal) -> None:
    """Every hostile value in every place of the manifest: refused, or as good a value as any there."""
    text, taken, refused = json.dumps(manifest), set(), 0
    alike = {"decode_image", "sampler_for", "outputs"}  # the schema has one definition for them and for another place
    for place in (place for place in places(manifest) if not alike & set(place[:-1])):
        for value in HOSTILE:
            made = json.loads(text)
            put(made, place, value)
            write(folder, made)
            if refusal(folder):
                refused += 1
            elif json.dumps(made) != text:
                taken.add(".".join(map(str, place)))
    print(f"{refused} refused; something else was taken at: {', '.join(sorted(taken))}")
    exact = ("files", "schema", "golden.joint", "provenance.checkpoint.sha256")
    assert not any(place == one or place.startswith(f"{one}.") for place in taken for one in exact)


SHAPE: Place = ("graphs", "step_image", "inputs", 0, "shape")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("files", "tokenizer.model", "size"), 2**63, "is 9223372036854775808\nexpected a number from 0 to"),
        (("files", "tokenizer.model", "size"), -1, "'files'['tokenizer.model']['size'] is -1\nexpected a number"),
        (("files", "tokenizer.model", "size"), 6.0, "is 6.0\nexpected integer"),
        (("files", "tokenizer.model", "sha256"), "A" * 64, "expected 64 small hexadecimal digits"),
        (("files", "../secret"), SIGNED, "'files': a key is '../secret'\nexpected a path inside the bundle"),
        (("files", "manifest.json"), SIGNED, "expected neither itself nor anything below engines/"),
        (("graphs", "step_image", "file"), "decode_image.onnx", "has the file 'decode_image.onnx', expected 'st"),
        (("graphs", "step_image", "file"), "other.onnx", "is 'other.onnx', which is not one of its files"),
        (("graphs", "step_image", "weights", 0), "w", "a weights file of graph 'step_image' is 'w', which is not one"),
        (("golden", "joint"), "golden/x", "golden 'joint' is 'golden/x', which is not one of its files"),
        (("text", "tokenizer"), "spm.model", "the tokenizer is 'spm.model', which is not one of its files"),
        (SHAPE, ["B", 2**15, 2**14], "expected at most 268435456 values"),
        (SHAPE, [10**9], "expected a number from 0 to 16777216"),
        (("graphs", "step_image", "nodes"), 10**9, "expected a number from 0 to 10000000"),
        (("graphs", "a b"), {}, "'graphs': a key is 'a b'\nexpected a name of letters, digits and _"),
        (("provenance", "checkpoint", "file"), "/home/someone/model.pth", "expected the base name of a file"),
        (("sampler", "more"), [1], "'sampler'['more'] is a list of 1\nexpected string or number or boolean or null"),
        (("sampler_for", "joint", "steps"), True, "'steps'] is True\nexpected integer"),
        (("created",), "2026-01-31T12:00:00+02:00", "expected a time in UTC, as in 2026-01-31T12:00:00Z"),
        (("opset",), 19, "'opset' is 19\nexpected a number from 20 to 25"),
        (("precison",), "fp16", "has the unknown key 'precison'; did you mean 'precision'?"),
    ],
)  # fmt: skip
def test_what_is_said(
    place: Place, value: Any, said: str, folder: Path, manifest: dict[str, Any], refusal: Refusal
) -> None:
    put(manifest, place, value)
    write(folder, manifest)
    assert said in refusal(folder)


def test_a_missing_key_is_told(folder: Path, manifest: dict[str, Any], refusal: Refusal) -> None:
    for key in manifest:
        write(folder, {name: value for name, value in manifest.items() if name != key})
        assert f"lacks the key '{key}'" in refusal(folder)


def test_a_graph_too_large_is_not_read(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"]["step_image.onnx"]["size"] = MAX_CONTENT + 1
    write(folder, manifest)
    os.truncate(folder / "step_image.onnx", MAX_CONTENT + 1)
    with pytest.raises(InputError, match="has 67108865 bytes, expected at most 67108864"):
        open_bundle(folder).graph_bytes("step_image")


def test_a_file_swapped_for_a_link_after_opening(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to("../secret")
    with pytest.raises(InputError, match="is a link"):
        bundle.file("tokenizer.model")
    with pytest.raises(InputError, match="is a link"):
        bundle.verify()


@PROPERTY
@given(data=st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject, folder: Path, refusal: Refusal) -> None:
    """In any file but the manifest; in the manifest, which nothing signs, what is taken is what stands there."""
    sound = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    path = data.draw(st.sampled_from(sorted(sound)))
    spoiled = bytearray(sound[path])
    bit = data.draw(st.integers(0, 8 * len(spoiled) - 1))
    spoiled[bit // 8] ^= 1 << bit % 8
    path.write_bytes(spoiled)
    said = refusal(folder)
    assert said or path.name == "manifest.json"
    path.write_bytes(sound[path])
    assert refusal(folder) == ""


@PROPERTY
@given(data=st.data())
def test_a_cut_file_is_noticed(data: st.DataObject, folder: Path, refusal: Refusal) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    sound = path.read_bytes()
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 1))])
    assert refusal(folder)
    path.write_bytes(sound)
    assert refusal(folder) == ""


@PROPERTY
@given(data=st.data())
def test_a_manifest_with_pieces_exchanged(
    data: st.DataObject, folder: Path, manifest: dict[str, Any], refusal: Refusal
) -> None:
    """Values of one place at another, keys renamed or removed."""
    made = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        target, source = (data.draw(st.sampled_from(list(places(made)))) for _ in range(2))
        value: Any = made
        for key in source:
            value = value[key]
        value = copy.deepcopy(value)
        parent: Any = made
        for key in target[:-1]:
            parent = parent[key]
        way = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if way == "replace":
            parent[target[-1]] = value
        elif way == "remove":
            del parent[target[-1]]
        elif isinstance(parent, dict):
            parent[data.draw(st.sampled_from([*PATHS, "schema", "files"]))] = parent.pop(target[-1])
        if not isinstance(made, dict) or not made:
            break
    write(folder, made)
    refusal(folder)
