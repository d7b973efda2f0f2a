"""What a model is, in one frozen dataclass: presets, JSON round trip, errors that name the nearest key.

DiM and MDM are the same network (`backbone.py`) under two sets of values, so one class describes both. A dict
given by a user names its `family` and whatever differs from that family's published values.

Letters: E width, d latent width, N state size, P head width, G groups of B and C, K convolution taps, p patch side.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError


@dataclass(frozen=True)
class Config:
    """One model. Fields below the line "MDM only" are empty for DiM."""

    family: str  # "dim" or "mdm"
    width: int  # E
    blocks: int  # odd: the skips pair the blocks around the middle one
    in_channels: int  # of the picture, or of the latents of an external autoencoder
    image_size: int  # side, in pixels or in such latents
    patch: int  # p
    classes: int  # without the null class, which has the index `classes`
    mixer: str  # "mamba1" or "mamba2"
    state: int  # N
    conv: int  # K
    expand: int
    pad: int  # learned tokens at the end of rows and columns; as many separators in front
    padding: str  # "lateral" or "rho": how the bottom rows repeat the pad tokens
    scan: str  # "alternate": one order a block; "parallel": one mixer an order in each block
    scan_orders: str  # orders over the image / over the text, numbered as in order.py
    schedule_image: Mapping[str, Any]  # noise schedule, see schedule.py
    sampler: Mapping[str, Any]  # solver, steps, guidance that the checkpoint is meant to be sampled with
    # MDM only
    sampler_for: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # task -> settings it wants otherwise
    head: int = 0  # P
    groups: int = 1  # G
    latent: int = 0  # d
    vae_width: int = 0
    vocabulary: int = 0
    text_lengths: tuple[int, ...] = ()  # the lengths a text segment may have
    schedule_text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    predict_image: str = "eps"  # what the network's output means: "eps", "v" or "x0"
    predict_text: str = "eps"
    keep: float = 1.0  # share of the generated tokens that selection keeps; 1 switches it off

    def __post_init__(self) -> None:
        _check(self)

    @property
    def side(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch

    @property
    def inner(self) -> int:
        """Width inside a mixer."""
        return self.expand * self.width

    @property
    def skip_from(self) -> int:
        """First block that receives a long skip; blocks 1 to `skip_from - 1` send one."""
        return 1 + (self.blocks - 1) // 2

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


# Values that a family's published models share.
FAMILIES: dict[str, dict[str, Any]] = {
    "dim": {
        "patch": 2, "classes": 1000, "mixer": "mamba1", "state": 16, "conv": 3, "expand": 2,
        "padding": "lateral", "scan": "alternate", "scan_orders": "1234/12", "in_channels": 4,
        "schedule_image": {"kind": "sd"}, "sampler": {"solver": "dim", "steps": 50, "guidance": 0.4},
    },
    "mdm": {
        "patch": 2, "classes": 1000, "mixer": "mamba2", "state": 128, "head": 64, "groups": 1, "conv": 4, "expand": 2,
        "pad": 1, "padding": "lateral", "scan": "alternate", "scan_orders": "1234/12", "in_channels": 4,
        "latent": 64, "vae_width": 2048, "vocabulary": 32000, "text_lengths": (64, 128, 256, 512),
        "schedule_image": {"kind": "cosine", "shift": 1.0}, "schedule_text": {"kind": "cosine", "shift": 1.0},
        "predict_image": "v", "predict_text": "x0",
        "sampler": {"solver": "dpmpp_2m", "steps": 20, "guidance": 2.0, "t_start": 0.997},
    },
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "dim-small": {
        "family": "dim", "width": 512, "blocks": 25, "in_channels": 3, "image_size": 32, "classes": 10,
        "schedule_image": {"kind": "vp-linear"},
        "sampler": {"solver": "euler-maruyama", "steps": 1000, "guidance": 0.0},
    },
    "dim-large": {"family": "dim", "width": 1024, "blocks": 49, "image_size": 32},
    "dim-huge-256": {"family": "dim", "width": 1536, "blocks": 49, "image_size": 32},
    "dim-huge-512": {
        "family": "dim", "width": 1536, "blocks": 49, "image_size": 64, "padding": "rho",
        "sampler": {"solver": "dim", "steps": 50, "guidance": 0.7},
    },
    "mdm-7b": {"family": "mdm", "width": 2048, "blocks": 49, "image_size": 32, "scan": "parallel"},
    "mdm-49x2048": {"family": "mdm", "width": 2048, "blocks": 49, "image_size": 32},
    "mdm-tiny": {
        "family": "mdm", "width": 128, "blocks": 7, "in_channels": 3, "image_size": 32, "patch": 4, "classes": 4,
        "state": 32, "latent": 16, "vae_width": 128, "vocabulary": 40, "text_lengths": (8, 20),
        "schedule_image": {"kind": "cosine", "shift": 0.25}, "schedule_text": {"kind": "cosine", "shift": 3.0},
        # Noise along the way keeps a free caption and picture together: 85% of 200 fit, 72% without it.
        "sampler_for": {"joint": {"solver": "dpmpp_2m_sde", "steps": 40}},
    },
}  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "family": ("dim", "mdm"),
    "mixer": ("mamba1", "mamba2"),
    "padding": ("lateral", "rho"),
    "scan": ("alternate", "parallel"),
    "predict_image": ("eps", "v", "x0"),
    "predict_text": ("eps", "v", "x0"),
}


# How a field's annotation is checked, and what the error says was expected.
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    "float": (lambda value: type(value) in (int, float), "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "an object"),
    "tuple[int, ...]": (
        lambda value: isinstance(value, tuple) and all(type(n) is int and n > 0 for n in value),
        "a list of whole numbers above 0",
    ),
}


def load_config(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """The config that a preset's name, a JSON file or a dict describes."""
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return config_from_dict(source)
    if str(source) in PRESETS:
        return config_from_dict(PRESETS[str(source)])
    path = Path(source)
    try:
        found = path.is_file()
    except OSError:  # a name too long for a file
        found = False
    if not found:
        raise InputError(
            f"config '{source}' is neither a preset nor a file{nearest(str(source), PRESETS)}\n"
            f"presets: {', '.join(PRESETS)}"
        )
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config file '{path}' is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"config file '{path}' holds a {type(fields).__name__}, expected an object of config fields")
    return config_from_dict(fields)


def config_from_dict(fields: Mapping[str, Any]) -> Config:
    known = {field.name: field for field in dataclasses.fields(Config)}
    for key in fields:
        if key not in known:
            raise InputError(f"unknown config key '{key}'{nearest(key, known)}\nkeys: {', '.join(known)}")
    family = fields.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"config key 'family' is {family!r}, expected one of: {', '.join(FAMILIES)}")
    merged = FAMILIES[family] | dict(fields)
    if family == "dim":
        merged.setdefault("pad", merged["conv"])  # released checkpoints have as many pads as convolution taps
    for name, field in known.items():
        if name not in merged and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"config key '{name}' is missing; family '{family}' has no default for it")
    if isinstance(merged.get("text_lengths"), list):
        merged["text_lengths"] = tuple(merged["text_lengths"])
    return Config(**merged)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check(config: Config) -> None:
    """Types, choices, and the sizes that must fit together."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fits, expected = TYPES[str(field.type)]
        if not fits(value):
            raise InputError(f"config key '{field.name}' is {value!r}, expected {expected}")
        if field.name in CHOICES and value not in CHOICES[field.name]:
            raise InputError(
                f"config key '{field.name}' is {value!r}{nearest(str(value), CHOICES[field.name])}\n"
                f"expected one of: {', '.join(CHOICES[field.name])}"
            )
    for name in ("width", "blocks", "in_channels", "image_size", "patch", "state", "conv", "expand", "pad"):
        if getattr(config, name) == 0:
            raise InputError(f"config key '{name}' is 0, expected 1 or more")
    if config.blocks % 2 == 0:
        raise InputError(
            f"config key 'blocks' is {config.blocks}, expected an odd number: skips pair blocks around the middle"
        )
    if config.image_size % config.patch:
        raise InputError(f"image_size {config.image_size} is not a multiple of patch {config.patch}")
    if config.mixer == "mamba2" and (config.head == 0 or config.inner % config.head):
        raise InputError(f"expand * width = {config.inner} is not a multiple of head = {config.head}")
    if config.width % 2:
        raise InputError(f"config key 'width' is {config.width}, expected an even number: half cosines, half sines")
    if config.mixer == "mamba2" and (config.groups == 0 or (config.inner // config.head) % config.groups):
        raise InputError(f"{config.inner // config.head} heads are not a multiple of groups = {config.groups}")
    image, _, text = config.scan_orders.partition("/")
    if not image or not set(image) <= set("1234") or not text or not set(text) <= set("12"):
        raise InputError(
            f"config key 'scan_orders' is {config.scan_orders!r}\n"
            "expected image orders out of 1234, a slash, text orders out of 12, as in '1234/12'"
        )
    if config.family == "mdm":
        for name in ("latent", "vae_width", "vocabulary", "text_lengths"):
            if not getattr(config, name):
                raise InputError(
                    f"config key '{name}' is {getattr(config, name)!r}, expected a value: family 'mdm' has text"
                )
        if not 0 < config.keep <= 1:
            raise InputError(f"config key 'keep' is {config.keep}, expected a share in (0, 1]")
