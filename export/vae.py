"""The halves of MDM's own VAE as graph nodes; mirrors `reference/vae.py`.

Letters: B batch, C channels, p patch side, h x w grid, M image tokens, T text tokens, V vocabulary, d latent width.
"""

from __future__ import annotations

from mdm.export.graph import Graph, Value
from mdm.export.layers import embedding, linear, silu
from mdm.reference.config import Config
from mdm.reference.vae import IMAGE, TEXT


def encode_image(g: Graph, config: Config, side: int) -> None:
    p, channels = config.patch, config.in_channels
    picture = g.input("picture", "float32", ["batch", channels, side * p, side * p])
    cells = g.transpose(g.reshape(picture, 0, channels, side, p, side, p), 0, 2, 4, 1, 3, 5)  # [B,h,w,C,p,p]
    patches = g.reshape(cells, 0, side * side, channels * p * p)
    with g.scope("vae"):
        z = encoded(g, config, linear(g, patches, "image_in", "vae"), IMAGE)
    g.output("z", z, ["batch", side * side, config.latent])


def encode_text(g: Graph, config: Config) -> None:
    ids = g.input("ids", "int64", ["batch", "tokens"])
    with g.scope("vae"):
        z = encoded(g, config, embedding(g, ids, "text_in", "vae"), TEXT)
    g.output("z", z, ["batch", "tokens", config.latent])


def decode_image(g: Graph, config: Config, side: int) -> None:
    """The picture is not clamped: what leaves [-1,1] is for the caller to see."""
    p, channels = config.patch, config.in_channels
    z = g.input("z", "float32", ["batch", side * side, config.latent])
    with g.scope("vae"):
        patches = linear(g, decoded(g, z, IMAGE), "image_out", "vae")
    cells = g.transpose(g.reshape(patches, 0, side, side, channels, p, p), 0, 3, 1, 4, 2, 5)  # [B,C,h,p,w,p]
    picture = g.cast(g.reshape(cells, 0, channels, side * p, side * p), "float32")
    g.output("picture", picture, ["batch", channels, side * p, side * p])


def decode_text(g: Graph, config: Config) -> None:
    z = g.input("z", "float32", ["batch", "tokens", config.latent])
    with g.scope("vae"):
        logits = g.cast(linear(g, decoded(g, z, TEXT), "text_out", "vae"), "float32")
    g.output("logits", logits, ["batch", "tokens", config.vocabulary])
    g.output("ids", g.op("ArgMax", logits, dtype="int64", axis=-1, keepdims=0), ["batch", "tokens"])


def encoded(g: Graph, config: Config, tokens: Value, modality: int) -> Value:
    """[B,L,hidden] -> the posterior's mean, centred and scaled, float32 [B,L,d]."""
    dtype = g.dtype("vae")
    h = g.cast(tokens, dtype) + g.weight("modality.weight", dtype, (modality, modality + 1))
    h = linear(g, silu(h), "encoder.1", "vae")
    mean = g.cast(linear(g, silu(h), "encoder.3", "vae", rows=(0, config.latent)), "float32")
    return (mean - latent(g, "latent_mean", modality)) / latent(g, "latent_scale", modality)


def decoded(g: Graph, z: Value, modality: int) -> Value:
    """Latents [B,L,d] -> [B,L,hidden]."""
    s = z * latent(g, "latent_scale", modality) + latent(g, "latent_mean", modality)
    return silu(linear(g, silu(linear(g, s, "decoder.0", "vae")), "decoder.2", "vae"))


def latent(g: Graph, name: str, modality: int) -> Value:
    """The measured mean [1,d] or scale [1] of that modality's latents."""
    return g.weight(name, "float32", (modality, modality + 1))
