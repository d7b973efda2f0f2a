"""Noise estimates as graph nodes: from latents, time and conditioning to eps. Mirrors `dim.py` and `multimodal.py`.

Letters: B batch, C channels, H x W picture, p patch side, h x w grid, L latent tokens, T text tokens, d latent width,
E width, a = alpha, s = sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mdm.export.backbone import Backbone, Segments
from mdm.export.graph import Graph, Value
from mdm.export.layers import linear
from mdm.reference.config import Config

Levels = Callable[[str], tuple[Value, Value]]  # modality -> alpha and sigma of each sample, [B,1,1]


@dataclass(frozen=True)
class Conditioning:
    """What an estimate is told beside latents and time."""

    y: Value  # [B], class
    given: Value | None = None  # [B,L] bool
    mask: Value | None = None  # [B,L], selection


def dim_estimate(g: Graph, config: Config, segments: Segments, z: Value, t: Value, told: Conditioning) -> Value:
    """DiM: z [B,C,H,W], t [B] -> eps [B,C,H,W]."""
    p, side, channels = config.patch, segments.side, config.in_channels
    dtype = g.dtype("ends")
    with g.scope("patch_in"):
        patches = g.op("Conv", g.cast(z, dtype), g.weight("weight", dtype), g.weight("bias", dtype), strides=[p, p])
        image = g.transpose(patches, 0, 2, 3, 1)  # [B,h,w,E]
    _, shown = Backbone(g, config, segments, None)(None, image, t, told.y, None)
    assert shown is not None
    patches = linear(g, shown, "patch_out", "ends")  # [B,h,w,p*p*C]
    with g.scope("unpatch"):
        cells = g.transpose(g.reshape(patches, 0, side, side, p, p, channels), 0, 5, 1, 3, 2, 4)  # [B,C,h,p,w,p]
        return g.reshape(cells, 0, channels, side * p, side * p)


def mdm_estimate(
    g: Graph, config: Config, segments: Segments, z: Value, t: Value, told: Conditioning, levels: Levels
) -> Value:
    """MDM: z [B,L,d], t [B] -> eps [B,L,d]; meaningless, and unused, where a token is given."""
    dtype, stream, tokens = g.dtype("ends"), g.dtype("stream"), segments.image_tokens
    h = linear(g, z, "latent_in", "ends")  # [B,L,E]
    if told.given is not None:
        marked = linear(g, z, "given_in", "ends") + g.weight("given_embed", dtype)
        h = g.op("Where", g.unsqueeze(told.given, 2), marked, h, dtype=dtype)
    parts = split(g, g.cast(h, stream), segments)
    text, image = parts.get("text"), parts.get("image")
    count = None
    if text is not None:
        with g.scope("text_tokens"):
            count = g.op("Squeeze", g.dim(z, 1)) - tokens
    if image is not None:
        image = g.reshape(image, 0, segments.height, segments.side, config.width)
    text, image = Backbone(g, config, segments, count)(text, image, t, told.y, told.mask)
    if image is not None:
        image = g.reshape(image, 0, tokens, config.width)
    output = linear(g, g.concat(1, *(v for v in (text, image) if v is not None)), "latent_out", "ends")

    # What the network says, eps, v = a eps - s x0, or x0, solved for eps with z = a x0 + s eps.
    kinds = {"text": config.predict_text, "image": config.predict_image}
    halves, noisy = [], split(g, z, segments)
    with g.scope("to_eps"):
        for modality, said in split(g, output, segments).items():
            if kinds[modality] == "eps":
                halves.append(said)
                continue
            a, s = levels(modality)
            z_part = noisy[modality]
            halves.append(a * said + s * z_part if kinds[modality] == "v" else (z_part - a * said) / s)
        return g.concat(1, *halves)


def split(g: Graph, x: Value, segments: Segments) -> dict[str, Value]:
    """[B,L,...] -> the tokens of each modality that is there, text first."""
    if not segments.pictures:
        return {"text": x}
    if not segments.text:
        return {"image": x}
    tokens = segments.image_tokens
    return {"text": g.slice(x, 1, 0, -tokens), "image": g.slice(x, 1, -tokens)}
