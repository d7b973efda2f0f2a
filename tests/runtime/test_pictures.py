"""Pictures as files bring them: upright, cropped and on white; bombs and rubbish refused before they are unpacked."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdm.plugins.errors import InputError
from mdm.reference.world.measure import to_picture
from mdm.runtime.pictures import FORMATS, MAX_FILE, MAX_PIXELS, fit, read_picture, to_numbers, to_pixels

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 32, 3), np.uint8)
# Every corner of another colour, in blocks that JPEG keeps.
CORNERS = np.kron(np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 90, 90]]]), np.ones((16, 16, 1)))
CORNERS = CORNERS.astype(np.uint8)


def file_of(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    made = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(made, kind, **options)
    return made.getvalue()


def seen(source: Any, side: int = 32, channels: int = 3) -> np.ndarray:
    made = fit(read_picture(source), side, channels)
    assert made.dtype == np.uint8
    assert made.shape == (side, side, channels)
    return made


def difference(a: np.ndarray, b: Any) -> int:
    return int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max())


def refused(source: Any) -> str:
    """What is said, quickly, in three lines at the most, without a warning."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(InputError) as error:
            fit(read_picture(source), 32, 3)
    assert time.perf_counter() - start < 1
    assert [str(one.message) for one in heard] == []
    said = str(error.value)
    assert len(said.splitlines()) <= 3
    assert len(said) < 500
    said.encode()  # can be printed
    return said


# --------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(("kind", "loss"), [("PNG", 0), ("BMP", 0), ("WEBP", 0), ("JPEG", 6), ("GIF", 0)])
def test_every_format_by_path_bytes_and_picture(kind: str, loss: int, tmp_path: Path) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    content = file_of(CORNERS, kind, **options)
    path = tmp_path / "picture.of.any.name"
    path.write_bytes(content)
    with Image.open(path) as opened:
        for source in (content, path, str(path), opened):
            assert difference(seen(source), CORNERS) <= loss
    assert kind in FORMATS


def test_the_right_size_is_untouched() -> None:
    assert np.array_equal(seen(NOISE), NOISE)
    assert np.array_equal(seen(file_of(NOISE)), NOISE)
    assert np.array_equal(seen(NOISE[::-1, ::-1]), NOISE[::-1, ::-1])  # an array that is a view


MODES: dict[str, Callable[[], Any]] = {
    "palette": lambda: Image.fromarray(CORNERS).convert("P", palette=Image.Palette.ADAPTIVE),
    "rgba": lambda: Image.fromarray(CORNERS).convert("RGBA"),
    "la": lambda: Image.fromarray(CORNERS).convert("LA"),
    "gray": lambda: Image.fromarray(CORNERS).convert("L"),
    "one bit": lambda: Image.fromarray(np.where(CORNERS[..., 0] > 50, 255, 0).astype(np.uint8)).convert("1"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_a_file(mode: str, channels: int) -> None:
    image = MODES[mode]()
    expected = np.asarray(image.convert({1: "L", 3: "RGB"}[channels])).reshape(32, 32, channels)
    assert difference(seen(file_of(image), channels=channels), expected) <= 1
    assert len(np.unique(expected)) > 1


def test_grayscale_has_three_channels_alike() -> None:
    gray = NOISE[..., 0]
    assert np.array_equal(seen(gray), np.stack([gray] * 3, axis=-1))
    assert np.array_equal(seen(file_of(gray), channels=1)[..., 0], gray)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    """65535 is white, and half of it is gray."""
    deep = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for source in (file_of(Image.fromarray(deep)), Image.fromarray(deep)):
        assert difference(seen(source)[..., 0], deep / 257) <= 1
        assert difference(seen(source, channels=1)[..., 0], deep / 257) <= 1


def test_cmyk() -> None:
    content = file_of(Image.fromarray(CORNERS).convert("CMYK"), "JPEG", quality=98)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert difference(seen(content)[4:12, 4:12], CORNERS[4:12, 4:12]) <= 8


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_lies_on_white(alpha: int) -> None:
    layer = np.dstack([CORNERS, np.full((32, 32), alpha, np.uint8)])
    expected = 255 + (CORNERS.astype(float) - 255) * alpha / 255
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert difference(seen(file_of(layer, kind, **options)), expected.round()) <= 1
    assert difference(seen(file_of(layer), channels=1)[0, 0], [expected[0, 0] @ [0.299, 0.587, 0.114]]) <= 1


def test_a_transparent_colour_lies_on_white() -> None:
    """Of a palette (GIF, PNG), and of a PNG that names one of its colours."""
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 10, 20, 30] + [0, 0, 0] * 254)
    image.paste(0, (0, 0, 16, 32))
    for content in (file_of(image, "GIF", transparency=0), file_of(image, "PNG", transparency=0),
                    file_of(image, "PNG", transparency=b"\0\xff"),
                    file_of(image.convert("RGB"), "PNG", transparency=(0, 0, 0)),
                    file_of(image.convert("L"), "PNG", transparency=0)):  # fmt: skip
        made = seen(content)
        assert (made[:, :16] == 255).all()
        assert difference(made[:, 16:], [10, 20, 30]) <= 12


def test_the_first_frame_of_a_moving_picture() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (seen(content) == [255, 0, 0]).all()


# EXIF's orientation -> what makes the stored picture upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.swapaxes(0, 1), 2), 8: lambda x: np.rot90(x),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = UPRIGHT[orientation](CORNERS)
    assert np.array_equal(seen(file_of(CORNERS, exif=exif)), upright)
    assert difference(seen(file_of(CORNERS, "JPEG", quality=95, subsampling=0, exif=exif)), upright) <= 6
    wide = np.concatenate([np.zeros_like(CORNERS), CORNERS, np.zeros_like(CORNERS)], axis=1)
    assert np.array_equal(seen(file_of(wide, exif=exif)), upright)  # turned first, then cropped


# ------------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1, 2, 5])
def test_another_size_is_cropped_in_the_middle(axis: int, scale: int) -> None:
    bands = np.repeat(np.eye(3, dtype=np.uint8) * 255, 32 * scale, axis=0)[:, None].repeat(32 * scale, axis=1)
    picture = bands if axis == 0 else bands.swapaxes(0, 1)
    for source in (picture, file_of(np.ascontiguousarray(picture))):
        made = seen(source)
        assert (made[4:-4, 4:-4] == [0, 255, 0]).all()
        assert difference(made, [0, 255, 0]) < 40  # the filter reaches a little over the border


def test_a_larger_picture_is_averaged_and_a_smaller_one_grows() -> None:
    large = np.kron(CORNERS, np.ones((4, 4, 1), np.uint8))
    made = seen(large)
    inner = np.r_[3:13, 19:29]  # away from edges, where Lanczos rings
    assert difference(made[np.ix_(inner, inner)], CORNERS[np.ix_(inner, inner)]) <= 1
    noisy = RNG.integers(0, 256, (320, 320, 3), np.uint8)
    blocks = noisy.reshape(32, 10, 32, 10, 3).mean((1, 3))
    assert np.abs(seen(noisy) - blocks).mean() < 12  # picking single pixels would be about 64 off
    assert (seen(np.full((1, 1, 3), 77, np.uint8)) == 77).all()
    assert (seen(np.full((1, 5000, 3), 77, np.uint8)) == 77).all()
    assert (seen(np.full((5000, 1), 77, np.uint8)) == 77).all()


def test_a_model_of_other_channels_takes_no_file() -> None:
    with pytest.raises(InputError, match="the model's pictures have 4 channels, expected 1 or 3 of a file"):
        fit(read_picture(NOISE), 32, 4)


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-3.5, 2.25), (0.0, 255.0), (1.0, -1.0)])
def test_all_levels_come_back(low: float, high: float) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([levels, levels.T, levels[::-1]], axis=-1)
    numbers = to_numbers(pixels, low, high)
    assert numbers.shape == (1, 3, 16, 16)
    assert numbers.dtype == np.float32
    assert numbers.flags.c_contiguous
    assert numbers[0, 0, 0, 0] == low
    assert numbers[0, 0, -1, -1] == pytest.approx(high, rel=1e-6)
    back = to_pixels(numbers[0], low, high)
    assert back.flags.c_contiguous
    assert np.array_equal(back, pixels)


def test_numbers_are_the_references() -> None:
    np.testing.assert_allclose(to_numbers(NOISE, -1, 1), to_picture(NOISE[None]).numpy(), rtol=0, atol=3e-7)


def test_what_is_beyond_the_range_is_cut() -> None:
    values = np.array([-50, -1.001, -1, -0.0001, 0.0001, 1, 1.002, 1e30], np.float32)[None, None]
    assert to_pixels(values, -1, 1).ravel().tolist() == [0, 0, 0, 127, 128, 255, 255, 255]


# ------------------------------------------------------------------------------------------------ refusals


def png_of(width: int, height: int, body: bytes = b"\0" * 100, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims a size; its content is what it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *more]
    parts += [(b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def patched(content: bytes, at: int, form: str, *values: int) -> bytes:
    made = bytearray(content)
    struct.pack_into(form, made, at, *values)
    return bytes(made)


GIF = file_of(Image.new("P", (20, 20)), "GIF")
BMP = file_of(Image.new("RGB", (20, 20)), "BMP")
BOMBS: dict[str, bytes] = {
    "png of 10^10 pixels": png_of(100_000, 100_000),
    "png of 2^62 pixels": png_of(2**31 - 1, 2**31 - 1),
    "png that PIL only warns of": png_of(10_000, 10_000),
    "png just too large": png_of(8192, 8193),
    "png of one line": png_of(2**26 + 1, 1),
    "bmp": patched(BMP, 18, "<ii", 100_000, 100_000),
    "bmp that PIL only warns of": patched(BMP, 18, "<ii", 9_600, 9_600),
    "gif": patched(GIF, 6, "<HH", 65_535, 65_535),
    "gif that PIL only warns of": patched(GIF, 6, "<HH", 10_000, 10_000),
    "gif with a large frame": patched(GIF, GIF.index(b"\x2c\0\0\0\0\x14\0\x14\0") + 5, "<HH", 65_535, 65_535),
    "png with a large comment": png_of(4, 4, b"\0" * 52, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9))),
    "png with a large profile": png_of(4, 4, b"\0" * 52, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27), 9))),
}


@pytest.mark.parametrize("name", [name for name in BOMBS if "comment" not in name and "profile" not in name])
def test_a_bomb_is_refused(name: str) -> None:
    said = refused(BOMBS[name])
    assert "pixels" in said


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    """A sound one, of 81 million pixels in some KB."""
    content = file_of(Image.new("1", (9000, 9000)))
    assert len(content) < 20_000
    (tmp_path / "a.png").write_bytes(content)
    assert refused(tmp_path / "a.png") == (
        f"picture '{tmp_path / 'a.png'}' has 9000 x 9000 pixels, expected at most {MAX_PIXELS}"
    )


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is its own too."""
    for index, content in enumerate(BOMBS.values()):
        (tmp_path / f"{index}.bin").write_bytes(content)
    script = """
import resource, sys, warnings
from pathlib import Path
from PIL import Image
from mdm.plugins.errors import InputError
from mdm.runtime.pictures import fit, read_picture
Image.init()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in Path(sys.argv[1]).iterdir():
    try:
        fit(read_picture(path), 32, 3)
    except InputError:
        pass
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MB
    assert done.stderr == ""


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    files = {
        "text": b"hello", "empty": b"", "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "tiff": file_of(NOISE, "TIFF"), "ppm": file_of(NOISE, "PPM"), "ico": file_of(NOISE, "ICO"),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "pdf": b"%PDF-1.4\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for source in (content, tmp_path / name):
            said = refused(source)
            assert said.endswith("\nexpected one of: PNG, JPEG, WEBP, BMP, GIF")
            assert "0x" not in said  # where PIL keeps it in memory is of no use to anyone


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    content = file_of(NOISE, kind)
    for part in (1, 4, 20, len(content) // 4, len(content) // 2, len(content) * 9 // 10):
        refused(content[:part])


def test_places_without_a_picture_are_told(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("cannot be read: Is a directory")
    assert refused(tmp_path / "missing.png").endswith("cannot be read: No such file or directory")
    assert "cannot be read" in refused("")
    assert "cannot be read: embedded null byte" in refused("a\0b.png")
    assert "cannot be read: File name too long" in refused("x" * 300)
    assert "cannot be read" in refused("/proc/self/mem")
    assert f"has more than {MAX_FILE} bytes" in refused("/dev/zero")


@pytest.mark.parametrize("path", ["a\nb\nc\nd\ne.png", "\x1b[31m.png", "\ud800.png", "x" * 5000])
def test_a_strange_path_makes_a_short_message(path: str) -> None:
    said = refused(path)
    assert "\n" not in said
    assert "\x1b" not in said
    assert "\0" not in said


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 3, 4), np.uint8), "uint8 [3, 3, 4]"), (np.zeros((3, 3, 1), np.uint8), "uint8 [3, 3, 1]"),
        (np.zeros((3, 3, 3)), "float64 [3, 3, 3]"), (np.zeros((3, 3, 3), np.int8), "int8 [3, 3, 3]"),
        (np.zeros((3, 3), bool), "bool [3, 3]"), (np.zeros((1, 3, 3, 3), np.uint8), "uint8 [1, 3, 3, 3]"),
        (np.zeros(9, np.uint8), "uint8 [9]"), (np.zeros((), np.uint8), "uint8 []"),
        (np.zeros((0, 3, 3), np.uint8), "uint8 [0, 3, 3]"), (np.zeros((3, 0), np.uint8), "uint8 [3, 0]"),
        (np.array([["a"]]), "<U1 [1, 1]"), (np.array([[None]]), "object [1, 1]"),
    ],
    ids=str,
)  # fmt: skip
def test_an_array_of_another_kind_is_refused(array: np.ndarray, said: str) -> None:
    assert refused(array) == f"picture is an array {said}, expected uint8 [H,W] or [H,W,3]"


@pytest.mark.parametrize("source", [None, 5, [1], bytearray(b"a"), {}, True, object, [[[0] * 3] * 4] * 4], ids=str)
def test_what_is_no_source_is_refused(source: Any) -> None:
    assert refused(source).endswith("expected a path, a PIL image or an array")


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "I", "F"])
def test_a_pil_image_of_any_mode_is_taken_or_refused(mode: str) -> None:
    image = Image.new(mode, (20, 10))
    if mode == "La":  # the one that PIL cannot convert
        refused(image)
    else:
        seen(image)


def test_a_pil_image_may_turn_out_damaged() -> None:
    """PIL reads a file's pixels when they are first asked for."""
    content = file_of(NOISE)
    refused(Image.open(io.BytesIO(content[: len(content) // 2])))


# ------------------------------------------------------------------------------------------------- damage


BROKEN_EXIF = [
    b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01" + b"\xff" * 20,
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd",
]  # fmt: skip


@pytest.mark.parametrize("exif", BROKEN_EXIF, ids=lambda exif: repr(exif[6:12]))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_is_no_crash_and_no_warning(kind: str, exif: bytes) -> None:
    content = file_of(CORNERS, kind, exif=exif)
    with contextlib.suppress(InputError):
        assert difference(seen(content)[4:12, 4:12], CORNERS[4:12, 4:12]) <= 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damage_at_random_is_taken_or_refused(kind: str) -> None:
    """Bytes of a sound file changed, the first hundred more often; PNG's sums made right again."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    options: dict[str, Any] = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    image = Image.fromarray(CORNERS).convert("P") if kind in ("PNG", "GIF") else Image.fromarray(CORNERS)
    sound = file_of(image, kind, **options, **({"transparency": 3} if kind in ("PNG", "GIF") else {}))
    draw, taken, longest, crashes = random.Random(kind), 0, 0, set()
    for _ in range(200):
        damaged = bytearray(sound)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(draw.choice((100, len(damaged))))] = draw.choice((0, 255, draw.randrange(256)))
        if kind == "PNG":
            damaged = summed(damaged)
        try:
            seen(bytes(damaged))
            taken += 1
        except InputError as error:
            longest = max(longest, len(str(error).splitlines()))
        except Exception as error:
            crashes.add(f"{type(error).__name__}: {error}")
    print(f"{kind}: {taken} of 200 taken")
    assert 0 < taken < 200
    assert longest <= 3
    assert crashes == set()


def summed(png: bytearray) -> bytearray:
    """With the check sums that its chunks should have, as far as chunks can be made out."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        if end + 4 > len(png):
            break
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4)
        at = end + 4
    return png
