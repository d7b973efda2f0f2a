"""Pictures from files, and between pixels and the numbers a model sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_FILE = 64 * 2**20  # bytes
MAX_PIXELS = 2**25  # 5792 x 5792, at most 128 MB unpacked; a file of a few KB can be larger
MODES = {1: "L", 3: "RGB"}  # of a picture with that many channels

Pixels = npt.NDArray[np.uint8]  # [H,W,C]


def read_picture(source: Any) -> Image:
    """From a path, the bytes of a file, a PIL image or an array uint8 [H,W] or [H,W,3]; nothing is unpacked unseen."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    if isinstance(source, pil.Image):
        return source
    if isinstance(source, np.ndarray):
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or source.shape[2:] not in ((), (3,))
            or not source.size
        ):
            raise InputError(
                f"picture is an array {source.dtype} {list(source.shape)}, expected uint8 [H,W] or [H,W,3]"
            )
        return pil.fromarray(source)
    if not isinstance(source, str | Path | bytes):
        raise InputError(f"picture is {told(source)}, expected a path, a PIL image or an array")
    name = "picture" if isinstance(source, bytes) else f"picture {told(str(source))}"
    content = source if isinstance(source, bytes) else read_file(Path(source), name)
    with damaged_files(name):
        try:
            image = pil.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise InputError(f"{name} is not a picture\nexpected one of: {', '.join(FORMATS)}") from error
        if image.width * image.height > MAX_PIXELS:  # PIL only warns of very large ones
            raise InputError(f"{name} has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
        image.load()
    return image


@contextmanager
def damaged_files(name: str) -> Iterator[None]:
    """PIL raises whatever a damaged file leads it to, and warns."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(f"{name} cannot be read: {said}\nexpected one of: {', '.join(FORMATS)}") from error


def read_file(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_FILE:
        raise InputError(f"{name} has more than {MAX_FILE} bytes: make it smaller")
    return content


def fit(image: Image, side: int, channels: int) -> Pixels:
    """Upright, the middle square at the model's size, on white where it is transparent."""
    from PIL import Image as pil
    from PIL import ImageOps

    if channels not in MODES:
        raise InputError(f"the model's pictures have {channels} channels, expected 1 or 3 of a file")
    with damaged_files("picture"):
        with suppress(Exception):  # which way is up stands in the EXIF part, and that may be anything
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # PIL would cut at 255, not scale
            image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        transparent = image.has_transparency_data
        image = image.convert("RGBA" if transparent else MODES[channels])
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), pil.Resampling.LANCZOS)
        if transparent:
            image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert(MODES[channels]), np.uint8).reshape(side, side, channels)


def to_numbers(pixels: Pixels, low: float, high: float) -> npt.NDArray[np.float32]:
    """[H,W,C] -> [1,C,H,W], 0 at low and 255 at high."""
    scaled = pixels.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def to_pixels(picture: npt.NDArray[np.float32], low: float, high: float) -> Pixels:
    """[C,H,W] -> [H,W,C], cut to the range."""
    scaled = (picture - np.float32(low)) * np.float32(255 / (high - low))
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
