"""The kernel pack: every GPU kernel of this package, compiled for every architecture, in one file that is only data.

    pack = Pack.open(SHIPPED)
    entry = pack.entry(variant)                  # or pack.entries[key], where the key is the entry's `key`
    cubin = pack.image(entry, (9, 0))            # of that compute capability

Layout, little endian: the magic, then format, length and CRC-32 of the index as u32; the index, JSON in ASCII; then one
compressed stream for each entry, back to back. A stream holds the entry's images one after another, since they are much
alike: on SSD kernels for eight architectures LZMA on a stream needs 72 KB an entry, LZMA on each image 107 KB, deflate
on each image 155 KB. An image costs up to 10 ms when it is first used. The C++ side has its own decoder (lzma.h), so
the parameters below are part of the format.

Nothing in a pack is believed: sizes are checked before memory is taken, and every image against its CRC-32. That finds
damage, not malice: whoever can write the pack can as well write the package.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import struct
from binascii import crc32
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.gpu.variants import Variant

SHIPPED = Path(__file__).with_name("kernels.pack")  # of this package's own kernels
MAGIC = b"mdmkern\n"
FORMAT = 1
HEADER = struct.Struct("<8s3I")
ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "110", "120")
PTX = "ptx"  # for 8.0: what later architectures compile when they load it
# The decoder in lzma.h relies on lc = lp = 0 and pb = 4 (an instruction has 16 bytes). 4 MiB hold any stream.
FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22, "lc": 0, "lp": 0, "pb": 4}
]
LARGEST = 1 << 26  # bytes of a stream's images, and of an index

Capability = tuple[int, int]


@dataclass(frozen=True)
class Argument:
    """One argument of a launch."""

    name: str
    kind: str  # pointer, i32, f32, or scratch: a pointer that Triton adds, and that is null
    divisor: int  # the kernel is compiled for multiples of it: of a pointer in bytes, of an integer


KINDS = ("pointer", "i32", "f32", "scratch")


@dataclass(frozen=True)
class Image:
    """A cubin, or PTX with its closing zero, within the entry's stream."""

    start: int
    length: int
    crc: int
    shared: int  # bytes of shared memory of a launch; architectures differ in it


@dataclass(frozen=True)
class Entry:
    """One variant of a kernel."""

    kernel: str
    dtype: str
    constants: dict[str, int]
    warps: int
    stages: int
    symbol: str  # the function's name within the images
    arguments: tuple[Argument, ...]
    grid: tuple[str, ...]  # rules of its three sizes, see variants.size_of
    images: dict[str, Image]
    packed: int  # bytes of the compressed stream
    offset: int = 0  # of the stream in the file

    @property
    def key(self) -> str:
        return key_of(self)


def key_of(variant: Variant | Entry) -> str:
    """For people and programs: "ssd_scan bfloat16 N=128 Q=64 warps=4 stages=2"."""
    constants = (f"{name}={value}" for name, value in sorted(variant.constants.items()))
    return " ".join((variant.kernel, variant.dtype, *constants, f"warps={variant.warps}", f"stages={variant.stages}"))


def compress(images: Mapping[str, tuple[bytes, int]]) -> tuple[bytes, dict[str, Image]]:
    """Images with their shared memory -> the stream, and where each is in it."""
    starts = accumulate((len(data) for data, _ in images.values()), initial=0)
    places = {
        name: Image(start, len(data), crc32(data), shared)
        for start, (name, (data, shared)) in zip(starts, images.items(), strict=False)
    }
    whole = b"".join(data for data, _ in images.values())
    return lzma.compress(whole, format=lzma.FORMAT_RAW, filters=FILTERS), places


def write(path: Path, made_by: str, entries: Iterable[tuple[Entry, bytes]]) -> None:
    """A pack of entries and their streams. The same entries make the same bytes, in whatever order they come."""
    ordered = sorted(entries, key=lambda pair: pair[0].key)
    index = [
        {key: value for key, value in asdict(entry).items() if key != "offset"} | {"key": entry.key}
        for entry, _ in ordered
    ]
    text = json.dumps({"made_by": made_by, "entries": index}, separators=(",", ":"), sort_keys=True).encode("ascii")
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(HEADER.pack(MAGIC, FORMAT, len(text), crc32(text)) + text)
        file.writelines(stream for _, stream in ordered)
    os.replace(partial, path)


@dataclass(frozen=True)
class Pack:
    """An opened pack: its index. Images are read when they are asked for."""

    path: Path
    made_by: str
    entries: dict[str, Entry]  # by key

    @classmethod
    def open(cls, path: Path) -> Pack:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(HEADER.size)
                if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
                    raise InputError(
                        f"{path} is no kernel pack\nfound {header[:8]!r} at its start, expected {MAGIC!r}\n{REBUILD}"
                    )
                _, version, length, crc = HEADER.unpack(header)
                if version != FORMAT:
                    raise InputError(
                        f"the kernel pack {path} has another format\nfound format {version}, expected {FORMAT}\n"
                        "use the pack that came with this version of mdm-deploy"
                    )
                text = file.read(length) if length <= min(size, LARGEST) else b""
        except OSError as error:
            raise InputError(f"the kernel pack {path} cannot be read: {error.strerror}\n{REBUILD}") from error
        if len(text) != length or crc32(text) != crc:
            raise damaged(path, "its index", f"{len(text)} bytes with another checksum", f"{length} bytes")
        try:
            made_by, entries = _index(text, HEADER.size + length)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise damaged(path, "its index", f"an index that says: {error!r}", f"that of format {FORMAT}") from error
        end = max((entry.offset + entry.packed for entry in entries), default=HEADER.size + length)
        if end != size:
            raise damaged(path, "its length", f"{size} bytes", f"{end}")
        return cls(path, made_by, {entry.key: entry for entry in entries})

    def entry(self, variant: Variant) -> Entry:
        key = key_of(variant)
        if key not in self.entries:
            raise InputError(
                f"the kernel pack {self.path} has no '{key}'\n"
                f"found {len(self.entries)} entries by {self.made_by}\n{REBUILD}"
            )
        return self.entries[key]

    def image(self, entry: Entry, capability: Capability) -> bytes:
        """The cubin for a device of this compute capability, or else PTX."""
        return self.read(entry, architecture(entry, capability))

    def read(self, entry: Entry, name: str) -> bytes:
        """One image, checked. Only the entry's stream is read, and only as far as the image goes."""
        image = entry.images[name]
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                stream = file.read(entry.packed)
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
            data = decoder.decompress(stream, image.start + image.length)[image.start :]
        except (OSError, lzma.LZMAError) as error:
            raise damaged(self.path, f"'{entry.key}' for {name}", str(error), f"{image.length} bytes") from error
        if len(data) != image.length or crc32(data) != image.crc:
            found = f"{len(data)} bytes with checksum {crc32(data):08x}"
            raise damaged(self.path, f"'{entry.key}' for {name}", found, f"{image.length} with {image.crc:08x}")
        return data


REBUILD = "install mdm-deploy again, or build the pack with: mdm plugin kernels"
TEGRA = (87, 88)  # Jetson's: neither runs the other 8.x cubins, nor do their cubins run elsewhere


def architecture(entry: Entry, capability: Capability) -> str:
    """The image a device takes: its own; else the newest 8.y cubin before it, on an 8.x that is no Jetson; else PTX.

    From 9.0 on Triton compiles for the architecture with all its features (sm_90a), and such a cubin runs nowhere else.
    """
    wanted = 10 * capability[0] + capability[1]
    if str(wanted) in entry.images:
        return str(wanted)
    older = [int(name) for name in entry.images if name != PTX and int(name) not in TEGRA and int(name) < wanted]
    if capability[0] == 8 and wanted not in TEGRA and older:
        return str(max(older))
    if PTX in entry.images and wanted >= 80:
        return PTX
    raise EnvironmentLackError(
        f"the kernel '{entry.key}' does not run on compute capability {capability[0]}.{capability[1]}\n"
        f"found images for {', '.join(entry.images)}\nuse a GPU of compute capability 8.0 or newer"
    )


def damaged(path: Path, what: str, found: str, expected: str) -> InputError:
    return InputError(f"the kernel pack {path} is damaged: {what}\nfound {found}, expected {expected}\n{REBUILD}")


def _index(text: bytes, offset: int) -> tuple[str, list[Entry]]:
    """Entries with their offsets, from the first stream's; an error of Python's for what is not so."""
    index = json.loads(text)
    entries = []
    for row in index["entries"]:
        entry = _entry(row)
        if row["key"] != entry.key:
            raise ValueError(f"entry '{entry.key}' under the key {row['key']!r}")
        entries.append(replace(entry, offset=offset))
        offset += entry.packed
    if len({entry.key for entry in entries}) != len(entries):
        raise ValueError("the same entry twice")
    return _name(index["made_by"], r"[\w .+-]+"), entries


def _entry(row: Any) -> Entry:
    images: dict[str, Image] = {}
    end = 0
    for name, place in sorted(row["images"].items(), key=lambda pair: pair[1]["start"]):
        _name(name, r"\d{2,3}|ptx")
        if _number(place["start"], LARGEST) != end:
            raise ValueError(f"image {name} starts at {place['start']}, not at {end}")
        end += _number(place["length"], LARGEST - end)
        images[name] = Image(
            place["start"], place["length"], _number(place["crc"], 2**32), _number(place["shared"], 2**20)
        )
    arguments = tuple(
        Argument(_name(a["name"], r"\w+"), _name(a["kind"], "|".join(KINDS)), _number(a["divisor"], 257) or 1)
        for a in row["arguments"]
    )
    kinds = [a.kind for a in arguments]
    if "scratch" in kinds and set(kinds[kinds.index("scratch") :]) != {"scratch"}:
        raise ValueError("a scratch pointer before another argument")
    grid = tuple(_name(rule, r"\w+([*/]\w+)*") for rule in row["grid"])
    if len(grid) != 3:
        raise ValueError(f"a grid of {len(grid)} sizes")
    return Entry(
        kernel=_name(row["kernel"], r"\w+"),
        dtype=_name(row["dtype"], r"\w+"),
        constants={_name(name, r"\w+"): _number(value, 2**31) for name, value in row["constants"].items()},
        warps=_number(row["warps"], 33),
        stages=_number(row["stages"], 33),
        symbol=_name(row["symbol"], r"\w+"),
        arguments=arguments,
        grid=grid,
        images=images,
        packed=_number(row["packed"], 2**31),
    )


def _name(value: Any, pattern: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise ValueError(f"{value!r:.40} where a name stands")
    return value


def _number(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:  # True is an int of another type
        raise ValueError(f"{value!r:.40} where a number below {limit} stands")
    return value
