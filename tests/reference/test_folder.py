"""Rows out of a folder of pictures: what works, and every way a listing or a file can be wrong or hostile."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from PIL import Image

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer, load_config
from mdm.reference.data import Folder

Tiny = Callable[..., dict[str, Any]]
Open = Callable[..., Folder]


@pytest.fixture
def folder(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> Open:
    """folder(line, ..., in_channels=4): a Folder of these lines, which are dicts, text or bytes."""

    def opened(*lines: dict[str, Any] | str | bytes, **changes: Any) -> Folder:
        coded = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line for line in lines]
        (tmp_path / "captions.jsonl").write_bytes(b"\n".join(c if isinstance(c, bytes) else c.encode() for c in coded))
        config = load_config(tiny(**changes))
        return Folder(tmp_path, config, tokenizer if config.family == "mdm" else None)

    Image.new("RGB", (40, 30), (255, 0, 128)).save(tmp_path / "a.png")
    return opened


def refused(said: str, run: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=said) as caught:
        run()
    assert len(str(caught.value).splitlines()) <= 3


# ------------------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.webp", "b.bmp", "b.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_become_rgb_of_the_configs_size(folder: Open, tmp_path: Path, name: str, mode: str) -> None:
    Image.new("RGB", (70, 50), (200, 200, 200)).convert(mode).save(tmp_path / name)
    picture = folder({"file": name}).load(0)
    assert picture.shape == (3, 32, 32)
    torch.testing.assert_close(picture, torch.full_like(picture, 200 / 127.5 - 1), atol=0.02, rtol=0)


def test_the_middle_square_is_cut_out(folder: Open, tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    data = folder({"file": "wide.png"}, {"file": "tall.png"})
    assert torch.equal(data.load(0), torch.ones(3, 32, 32))
    assert torch.equal(data.load(1), torch.ones(3, 32, 32))


def test_latents_are_taken_as_they_are(folder: Open, tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 32, 32))
    for name, dtype in (("f.npy", np.float64), ("h.npy", np.float16)):
        np.save(tmp_path / name, latents.astype(dtype))
    data = folder({"file": "f.npy"}, {"file": "h.npy"}, in_channels=4)
    assert torch.equal(data.load(0), torch.from_numpy(latents.astype(np.float32)))
    assert data.load(1).dtype == torch.float32


def test_rows_hold_caption_class_and_picture(folder: Open, tokenizer: Tokenizer) -> None:
    data = folder({"file": "a.png", "caption": "two red crosses", "class": 3}, "", {"file": "a.png"})
    assert data.tasks == ("class_to_image", "text_to_image", "caption", "joint", "complete")
    rows = data.draw(["caption"] * 30, 8, torch.Generator().manual_seed(0))
    assert {tokenizer.decode(row.tolist()) for row in rows.ids} == {"two red crosses"}  # none has no text
    assert (rows.y == 4).all()
    for _ in range(20):
        whole = data.draw(["complete"], 8, torch.Generator().manual_seed(1))
        assert tokenizer.decode(whole.ids[0].tolist()) == "two red crosses"
    classes = data.draw(["class_to_image"] * 60, 0, torch.Generator().manual_seed(0)).y
    assert set(classes.tolist()) == {3, 4}
    told = data.draw(["text_to_image"] * 200, 8, torch.Generator().manual_seed(0)).ids
    assert 4 <= int((told == 0).all(1).sum()) <= 40  # a tenth is told nothing
    assert data.pictures(5, torch.Generator().manual_seed(0)).shape == (5, 3, 32, 32)


def test_without_captions_only_classes_are_left(folder: Open) -> None:
    assert folder({"file": "a.png", "class": 0}).tasks == ("class_to_image",)
    assert folder({"file": "a.png", "caption": "red"}, family="dim").tasks == ("class_to_image",)
    for empty in (None, "", "  "):
        assert folder({"file": "a.png", "caption": empty}).tasks == ("class_to_image",)


def test_a_line_separator_in_a_caption_ends_no_line(folder: Open) -> None:
    """JSON allows U+2028 in a string, and Python's splitlines cuts there."""
    assert folder({"file": "a.png", "caption": "red\u2028cross"}).items[0].caption.split() == ["red", "cross"]


# ------------------------------------------------------------------------------------------ the listing


def test_a_folder_without_a_listing_or_pictures_is_an_error(tmp_path: Path, tiny: Tiny, folder: Open) -> None:
    refused("has no captions.jsonl", lambda: Folder(tmp_path, load_config(tiny()), None))
    refused("has no captions.jsonl", lambda: Folder(tmp_path / "none", load_config(tiny()), None))
    refused("lists no picture", lambda: folder("", "  "))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of '.*captions.jsonl' is not JSON"),
        ('{"file": "a.png"', "line 2 of '.*captions.jsonl' is not JSON"),
        ("[" * 100_000, "line 2 of '.*captions.jsonl' is not JSON"),
        ('{"file": "a.png", "class": 1' + "0" * 5000 + "}", "line 2 of '.*captions.jsonl'"),
        ("3", 'line 2 of .* has no "file"'),
        ('["a.png"]', 'line 2 of .* has no "file"'),
        ({"caption": "red"}, 'line 2 of .* has no "file"'),
        ({"file": 3}, 'line 2 of .* has no "file"'),
        ({"file": "missing.png"}, "line 2 of .*'missing.png' is not a file inside the folder"),
        ({"file": "."}, "is not a file inside the folder"),
        ({"file": ""}, "is not a file inside the folder"),
        ({"file": "../outside.png"}, "is not a file inside the folder"),
        ({"file": "/etc/passwd"}, "is not a file inside the folder"),
        ({"file": "link.png"}, "is not a file inside the folder"),
        ({"file": "a.png\0.txt"}, "is not a file inside the folder"),
        ({"file": "a" * 300}, "is not a file inside the folder"),
        ({"file": "a.png", "class": 4}, 'line 2 of .*: "class" is 4, expected 0 to 3'),
        ({"file": "a.png", "class": -1}, '"class" is -1'),
        ({"file": "a.png", "class": True}, '"class" is True'),
        ({"file": "a.png", "class": "2"}, "\"class\" is '2'"),
        ({"file": "a.png", "class": 1.0}, '"class" is 1.0'),
        ({"file": "a.png", "caption": ["red"]}, "caption"),
        ({"file": "a.png", "caption": "a pink cat"}, "no piece for a, pink, cat"),
        ({"file": "a.png", "caption": "red " * 21}, "21 tokens"),
        (b'{"file": "a.png", "caption": "\xff\xfe"}', "captions.jsonl"),
    ],
    ids=range(25),
)
def test_a_wrong_line_is_named(folder: Open, tmp_path: Path, line: Any, said: str) -> None:
    (tmp_path.parent / "outside.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "outside.png")
    refused(said, lambda: folder({"file": "a.png"}, line))


# --------------------------------------------------------------------------------------------- the files


def png(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def whole_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a picture that can be read"),
        (b"hello", "is not a picture that can be read"),
        (whole_png()[:200], "is not a picture that can be read"),
        (whole_png()[:37] + b"\x86\x9b\0\0" + whole_png()[41:], "is not a picture that can be read"),
        (b"P6 30$255 1 1 255\n", "is not a picture that can be read"),
        (png(9000, 9000), "9000x9000 pixels, expected at most 64000000"),
        (png(100_000, 100_000), "is not a picture that can be read|100000x100000 pixels"),
        (png(2_000_000_000, 2), "is not a picture that can be read|2000000000x2 pixels"),
    ],
    ids=["empty", "text", "truncated", "bad chunk", "bad header", "large", "bomb", "wide bomb"],
)
def test_what_is_not_a_sound_picture_is_an_error(folder: Open, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    refused(said, lambda: folder({"file": "bad.png"}).load(0))


def test_a_picture_where_latents_are_wanted_is_an_error(folder: Open) -> None:
    refused("this config has 4 channels", lambda: folder({"file": "a.png"}, in_channels=4).load(0))


class Evil:
    """Pickled, it would leave a mark in the working directory."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("evil"),)  # type: ignore[return-value]


def array(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, content, **options)
    return file.getvalue()


def promise(shape: tuple[int, ...]) -> bytes:
    """An array's header without the array."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros((4, 32, 32)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (array(np.zeros((4, 16, 32))), r"have shape \(4, 16, 32\).*, expected \(4, 32, 32\)"),
        (array(np.zeros(())), r"have shape \(\).*, expected"),
        (array(np.array([Evil()], dtype=object), allow_pickle=True), "bad.npy"),
        (pickle.dumps(Evil()), "bad.npy"),
        (array(np.full((4, 32, 32), "a")), "bad.npy"),
        (array(np.zeros((4, 32, 32), complex)), "bad.npy"),
        (array(np.full((4, 32, 32), np.nan)), "bad.npy"),
        (array(np.full((4, 32, 32), 1e300)), "bad.npy"),
        (array(np.zeros((4, 32, 32)))[:500], "bad.npy"),
        (promise((10**6, 10**6)), "bad.npy"),
        (archive(), "bad.npy"),
        (b"", "bad.npy"),
        (b"hello", "bad.npy"),
    ],
    ids=[
        "shape",
        "scalar",
        "object",
        "pickle",
        "text",
        "complex",
        "nan",
        "huge",
        "short",
        "bomb",
        "npz",
        "empty",
        "word",
    ],
)
def test_what_are_not_sound_latents_is_an_error(
    folder: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.npy").write_bytes(content)
    data = folder({"file": "bad.npy"}, in_channels=4)
    refused(said, lambda: data.load(0))
    assert not (tmp_path / "evil").exists()
