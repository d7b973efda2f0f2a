"""Which graphs a bundle holds, and how each is built.

    denoise_<set>  step_<set>  step_<set>_guided       sets of modalities: image, text, joint, turn
    encode_image  encode_text  decode_image  decode_text

`joint` is one picture and text, `turn` two stacked pictures and text. Graphs of a picture size other than the first
carry it at the end of their name, step_image_guided_96, and those with upsample guidance its factor, .._96_upsample3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from onnx import ModelProto

from mdm.export import autoencoder, vae
from mdm.export.backbone import Segments
from mdm.export.graph import Graph, Value
from mdm.export.levels import levels_at
from mdm.export.networks import Conditioning, dim_estimate, mdm_estimate
from mdm.export.precision import Precision
from mdm.export.step import Step
from mdm.export.weights import Checkpoint, Stored, Weights, cut_config
from mdm.plugins.errors import InputError
from mdm.reference.autoencoder import Autoencoder
from mdm.reference.config import Config

MOST_PATCHES = 1 << 18  # of one picture: 1024 px at patch 2 over f8 latents are 4,096
# set -> has text, pictures
SETS = {"image": (False, 1), "text": (True, 0), "joint": (True, 1), "turn": (True, 2)}


@dataclass(frozen=True)
class GraphSpec:
    """What one graph is. `set` is empty for the halves of an autoencoder."""

    name: str
    role: str  # "denoise", "step", "encode" or "decode"
    set: str = ""
    modalities: tuple[str, ...] = ()
    guided: bool = False
    image_size: int | None = None
    upsample: int = 0  # factor of upsample guidance

    @property
    def pictures(self) -> int:
        return SETS[self.set][1] if self.set else int("image" in self.modalities)


@dataclass(frozen=True)
class Built:
    """A graph, and where each of its weights lies."""

    spec: GraphSpec
    model: ModelProto
    stored: dict[str, Stored]


@dataclass(frozen=True)
class External:
    """An image autoencoder outside the model; `scale` is what its latents are multiplied by."""

    model: Autoencoder
    scale: float


@dataclass(frozen=True)
class Plan:
    """What an export makes, of what: everything that its graphs depend on."""

    checkpoint: Checkpoint
    config: Config
    precision: Precision
    opset: int
    specs: tuple[GraphSpec, ...]
    external: External | None = None

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.checkpoint.expected.values())

    def build(self, weights: Weights) -> list[Built]:
        """All graphs; `Weights.place` then tells them where their weights lie."""
        built = [
            build_graph(spec, self.config, weights, self.precision, self.opset, self.external) for spec in self.specs
        ]
        paths = {node.name.rpartition(".")[0] for one in built for node in one.model.graph.node}
        for pattern in self.precision.fp32_layers:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise InputError(f"fp32 layers: nothing fits '{pattern}'\npaths are like 'backbone.blocks.1.skip'")
        return built

    def cut(self) -> Plan:
        """The same for three blocks of the model."""
        return replace(self, checkpoint=self.checkpoint.cut(self.config), config=cut_config(self.config))


def plan_graphs(
    config: Config, image_sizes: Sequence[int], upsample: Sequence[int], external: bool = False
) -> list[GraphSpec]:
    """Every graph of a bundle, in order. The first size is the bundle's own; `external`: with an autoencoder."""
    plan: list[GraphSpec] = []
    factors = {config.image_size * m: m for m in upsample}
    sizes = [*image_sizes, *(size for size in factors if size not in image_sizes)]
    sets = {"image": SETS["image"]} if config.family == "dim" else SETS
    for place, size in enumerate(sizes):
        end = f"_{size}" if place else ""
        for name, (has_text, pictures) in sets.items():
            if place and not pictures:
                continue  # text alone has no picture size
            modalities = (("text",) if has_text else ()) + (("image",) if pictures else ())
            shared = {"set": name, "modalities": modalities, "image_size": size if pictures else None}
            plan.append(GraphSpec(f"denoise_{name}{end}", "denoise", **shared))  # type: ignore[arg-type]
            for guided in (False, True):
                label = f"step_{name}{'_guided' if guided else ''}{end}"
                plan.append(GraphSpec(label, "step", guided=guided, **shared))  # type: ignore[arg-type]
                if size in factors:
                    label, m = f"{label}_upsample{factors[size]}", factors[size]
                    plan.append(GraphSpec(label, "step", guided=guided, upsample=m, **shared))  # type: ignore[arg-type]
        if config.family == "mdm":
            for role in ("encode", "decode"):
                plan.append(GraphSpec(f"{role}_image{end}", role, modalities=("image",), image_size=size))
                if not place:
                    plan.append(GraphSpec(f"{role}_text", role, modalities=("text",)))
    if external:
        plan += [GraphSpec(f"{role}_image", role, modalities=("image",)) for role in ("encode", "decode")]
    return plan


def check_sizes(config: Config, image_sizes: Sequence[int], upsample: Sequence[int]) -> None:
    for size in image_sizes:
        if size < config.patch or size % config.patch:
            raise InputError(f"image size {size} is not a multiple of the config's patch {config.patch}")
        if (size // config.patch) ** 2 > MOST_PATCHES:
            raise InputError(f"image size {size} is more than {MOST_PATCHES} patches of side {config.patch}")
    if upsample and config.family != "dim":
        raise InputError("upsample guidance is DiM's: it is not made for family 'mdm'")
    for m in upsample:
        if m < 2:
            raise InputError(f"upsample factor is {m}, expected 2 or more")
    if upsample and dict(config.schedule_image)["kind"] != "sd":
        raise InputError("upsample guidance reads the 'sd' schedule's table, and the config has another schedule")


def build_graph(
    spec: GraphSpec,
    config: Config,
    weights: Weights,
    precision: Precision,
    opset: int,
    external: External | None = None,
) -> Built:
    g = Graph(spec.name, weights, precision, opset)
    side = (spec.image_size or config.image_size) // config.patch
    if external is not None and spec.role in ("encode", "decode"):
        half = autoencoder.encode_image if spec.role == "encode" else autoencoder.decode_image
        half(g, external.model, external.scale)
    elif spec.role == "encode":
        vae.encode_image(g, config, side) if "image" in spec.modalities else vae.encode_text(g, config)
    elif spec.role == "decode":
        vae.decode_image(g, config, side) if "image" in spec.modalities else vae.decode_text(g, config)
    else:
        segments = segments_of(spec, config, weights, side)
        if spec.role == "denoise":
            denoise(g, config, segments)
        else:
            step = Step(g, config, segments, spec.guided)
            if config.family == "mdm":
                step.mdm()
            else:
                low = side // spec.upsample if spec.upsample else side
                position = weights.position(low, through=side if spec.upsample else None)
                step.dim(spec.upsample, Segments(False, 1, low, position) if spec.upsample else None)
    return Built(spec, g.model(), g.stored)


def segments_of(spec: GraphSpec, config: Config, weights: Weights, side: int) -> Segments:
    has_text, pictures = SETS[spec.set]
    return Segments(has_text, pictures, side, weights.position(side), config.keep if config.family == "mdm" else 1.0)


def denoise(g: Graph, config: Config, segments: Segments) -> None:
    """The network alone, for people with their own sampler: eps from latents, network time and conditioning."""
    t, y = g.input("t", "float32", ["batch"]), g.input("y", "int64", ["batch"])
    shape: list[str | int]
    if config.family == "dim":
        size = segments.side * config.patch
        shape = ["batch", config.in_channels, size, size]
        eps = dim_estimate(g, config, segments, g.input("z", "float32", shape), t, Conditioning(y))
    else:
        shape = ["batch", "tokens" if segments.text else segments.image_tokens, config.latent]
        z, given = g.input("z", "float32", shape), g.input("given", "bool", shape[:2])
        mask = g.input("mask", "float32", shape[:2]) if segments.keep < 1 else None
        schedules = {"text": config.schedule_text, "image": config.schedule_image}

        def levels(modality: str) -> tuple[Value, Value]:
            return levels_at(g, schedules[modality], t)

        eps = mdm_estimate(g, config, segments, z, t, Conditioning(y, given, mask), levels)
    g.output("eps", g.cast(eps, "float32"), shape)
