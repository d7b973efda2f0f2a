"""For which shapes a TensorRT engine is built: a profile says how many samples and which texts, and every graph of a
bundle gets its inputs' shapes from that.

    profile = find_profile("latency")                       # or a JSON file
    shapes_of(manifest, "step_joint_guided", profile)       # {"base": ((1, 72, 16), (1, 84, 16), (4, 84, 16)), ...}

The length of a sequence follows from the text's, of which a model has a few: beyond them it has learned no positions,
and TensorRT-RTX dies of a profile that asks for more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mdm.plugins.errors import InputError
from mdm.plugins.gpu.variants import whole_number
from mdm.runtime.json_schema import parse_json, told
from mdm.runtime.words import nearest

MAX_FILE = 2**16  # bytes
MOST_SAMPLES = 4096
MIB = 2**20


class Span(NamedTuple):
    """Least, usual and most."""

    least: int
    usual: int
    most: int


Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]  # by input: least, usual, most


@dataclass(frozen=True)
class Profile:
    name: str
    batch: Span
    texts: tuple[int, ...] = ()  # text lengths; none: all that the model has
    workspace: int = 4096 * MIB  # bytes that the builder's choices may take beside the tensors
    level: int = 3  # of the builder: 0 builds fast, 5 searches longest


PROFILES = {
    "latency": Profile("latency", Span(1, 1, 4), level=4),
    "throughput": Profile("throughput", Span(1, 8, 16), level=4),
    "edge": Profile("edge", Span(1, 1, 1), workspace=512 * MIB),
}


def find_profiles(names: Sequence[str]) -> list[Profile]:
    """Those of one engine, which knows them by name."""
    profiles = [find_profile(name) for name in names]
    twice = {one.name for index, one in enumerate(profiles) if one.name in [other.name for other in profiles[:index]]}
    if twice:
        raise InputError(f"two profiles have the name {told(min(twice))}, expected a name for each")
    return profiles


def profile_name(name: str) -> str:
    """As an engine has it: a file's is its own without folder and ending."""
    return Path(name).stem if name.endswith(".json") else name


def find_profile(name: str) -> Profile:
    """One of PROFILES, or what a JSON file says, what it leaves out being as in "latency":

    {"batch": [1, 4, 8], "text": [8, 20], "workspace": 1024, "level": 3}         workspace in MiB
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    try:
        content = path.read_bytes()[: MAX_FILE + 1]
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no profile {told(name)}{nearest(name, PROFILES)}\n"
            f"profiles: {', '.join(PROFILES)}, or a JSON file"
        ) from error
    fields = parse_json(content, f"profile '{path}'", MAX_FILE)
    return _profile(path, fields)


def _profile(path: Path, fields: Any) -> Profile:
    known = ("batch", "text", "workspace", "level")
    if not isinstance(fields, dict) or not {*fields} <= {*known}:
        raise InputError(f"profile '{path}' is {told(fields)}\nexpected an object of {', '.join(known)}")
    usual = PROFILES["latency"]
    batch = _numbers(path, "batch", fields.get("batch", [*usual.batch]), MOST_SAMPLES)
    if len(batch) != 3 or sorted(batch) != batch:
        raise InputError(f"profile '{path}': 'batch' is {batch}, expected three sizes: least, usual, most")
    texts = _numbers(path, "text", fields.get("text", []), 2**20)
    (workspace,) = _numbers(path, "workspace", [fields.get("workspace", usual.workspace // MIB)], 2**20)
    level = fields.get("level", usual.level)
    if type(level) is not int or not 0 <= level <= 5:
        raise InputError(f"profile '{path}': 'level' is {told(level)}, expected 0 to 5")
    return Profile(profile_name(str(path)), Span(*batch), tuple(sorted(texts)), workspace * MIB, level)


def _numbers(path: Path, name: str, found: Any, most: int) -> list[int]:
    if not isinstance(found, list) or any(type(n) is not int or not 0 < n <= most for n in found):
        raise InputError(f"profile '{path}': '{name}' is {told(found)}, expected numbers from 1 to {most}")
    return found


def shapes_of(manifest: Mapping[str, Any], graph: str, profile: Profile) -> Shapes:
    """The shapes of a graph's inputs."""
    described = manifest["graphs"][graph]
    spans = _spans(manifest, graph, profile)
    shapes: Shapes = {}
    for spec in described["inputs"]:
        open_ = [size for size in spec["shape"] if isinstance(size, str) and size not in spans]
        if open_:
            raise InputError(
                f"graph '{graph}': input '{spec['name']}' leaves '{open_[0]}' open, which no profile knows\n"
                f"known: {', '.join(spans)}"
            )
        least, usual, most = (
            tuple(size if isinstance(size, int) else spans[size][which] for size in spec["shape"]) for which in range(3)
        )
        shapes[spec["name"]] = least, usual, most
    return shapes


def _spans(manifest: Mapping[str, Any], graph: str, profile: Profile) -> dict[str, Span]:
    """Of the dimensions that a graph leaves open, by name."""
    described, picture, text = manifest["graphs"][graph], manifest["picture"], manifest["text"]
    # The halves of an autoencoder are given samples as they come and as they are done: one at a time.
    alone = described["role"] in ("encode", "decode")
    spans = {"batch": Span(1, 1, profile.batch.most) if alone else profile.batch}
    if picture is not None:  # the halves of an image autoencoder: for the model's own pictures
        side = picture["size"] // picture["factor"]
        spans |= dict.fromkeys(("height", "width"), Span(side, side, side))
        spans |= dict.fromkeys(("picture_height", "picture_width"), Span(*[picture["size"]] * 3))
    if text is not None and picture is None:
        raise InputError("the manifest has texts and no pictures\nexpected both: an MDM makes either")
    if text is not None:
        lengths = _texts(graph, text["lengths"], profile)
        runs = described["role"] in ("denoise", "step") and described["image_size"]
        M = (described["image_size"] // picture["patch"]) ** 2 * described["pictures"] if runs else 0
        spans["tokens"] = Span(M + lengths[0], M + lengths[-1], M + lengths[-1])
    return spans


def largest_scan(manifest: Mapping[str, Any], graph: str, profile: Profile) -> tuple[int, int]:
    """The most sequences that the scans of a step or denoise graph are given at once, and the tokens of one."""
    described, text = manifest["graphs"][graph], manifest["text"]
    pad = whole_number(manifest["config"], "pad", least=0)
    tokens = 2 + pad  # of time, class and the separator before the rest
    spoken, pictures = "text" in described["modalities"], described["pictures"]
    if spoken and text is not None:
        tokens += _texts(graph, text["lengths"], profile)[-1]
    if pictures:
        side = described["image_size"] // manifest["picture"]["patch"]
        tokens += spoken + (pictures * side + pad) * (side + pad)  # a separator, and pads on two sides
    return profile.batch.most * (2 if described["guided"] else 1), tokens


def _texts(graph: str, lengths: list[int], profile: Profile) -> list[int]:
    unknown = sorted({*profile.texts} - {*lengths})
    if unknown:
        raise InputError(
            f"profile '{profile.name}' asks for texts of {', '.join(map(str, unknown))} tokens, for graph '{graph}'\n"
            f"the model has {', '.join(map(str, sorted(lengths)))}\n"
            'write some of these as its "text", or leave that out'
        )
    return sorted(profile.texts or lengths)
