"""Latents of a run to text and picture, by the halves of the bundle's autoencoder, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mdm.runtime.backend import Backend
from mdm.runtime.model import Model, makes
from mdm.tools.check.finding import Array
from mdm.tools.check.standards.recorded import makes_pixels
from mdm.tools.check.standards.standard import Decoded

Half = Callable[[str, list[str], Array], list[Array]]  # graph, outputs wanted, latents -> those outputs


def by_engine(backend: Backend) -> Half:
    return lambda graph, wanted, z: backend.graph(graph).run(wanted, z=z)


class Decoder:
    def __init__(self, model: Model, half: Half) -> None:
        self.model, self.half = model, half

    def __call__(self, task: str, graph: str, z: Array) -> Decoded:
        model, described, told = self.model, self.model.bundle.graph(graph), self.model.task(task)
        size = described["image_size"]
        if model.text is None:
            half = model.half("decode", size)
            if half in model.manifest["graphs"]:
                return Decoded(picture=self.half(half, ["picture"], z)[0])
            return Decoded(picture=z if makes_pixels(model, graph) else None)
        M = (size // model.picture["patch"]) ** 2 if size else 0
        said = Decoded()
        if makes(told["text"]):
            T = z.shape[1] - described["pictures"] * M
            ids, logits = self.half("decode_text", ["ids", "logits"], np.ascontiguousarray(z[:, :T]))
            best = np.sort(logits, axis=-1)
            said = replace(said, ids=ids, margin=best[..., -1] - best[..., -2], logits=logits)
        if makes(told["image"]):
            (picture,) = self.half(model.half("decode", size), ["picture"], np.ascontiguousarray(z[:, -M:]))
            said = replace(said, picture=picture)
        return said
