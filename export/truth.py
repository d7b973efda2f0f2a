"""Inputs for a graph, and what the PyTorch model says to them: for validation and for the golden files.

Inputs are drawn from a generator seeded by the graph's name and a number. A step's row has a random time with its own
alpha and sigma, and random numbers everywhere else, so that no column can be wrong without a trace.

Letters: B batch, L latent tokens, T text tokens, d latent width, m modalities, R columns.
"""

from __future__ import annotations

import zlib
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.export.graphs import SETS, External, GraphSpec
from mdm.export.weights import POSITION, Checkpoint, empty_model
from mdm.reference.config import Config
from mdm.reference.dim import DiM
from mdm.reference.guidance import guide
from mdm.reference.multimodal import MDM
from mdm.reference.selection import select
from mdm.reference.tasks import Task
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import PARTS, ROW

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Point:
    """One set of sizes. `size`: of a picture, where a graph leaves that open."""

    batch: int
    text_tokens: int = 0
    size: tuple[int, int] = (0, 0)


def points_of(spec: GraphSpec, config: Config) -> list[Point]:
    """Three points; texts at a bucket's length, off it, and at another bucket's if there is one."""
    if spec.role in ("encode", "decode") and config.family == "dim":
        return [Point(1, size=(16, 16)), Point(2, size=(8, 24)), Point(3, size=(16, 8))]
    if "text" not in spec.modalities:
        return [Point(1), Point(2), Point(3)]
    lengths = sorted(config.text_lengths)
    last = Point(1, lengths[1]) if len(lengths) > 1 else Point(3, lengths[0])
    return [Point(1, lengths[0]), Point(2, max(1, lengths[0] - 3)), last]


class Truth:
    """The PyTorch model at the sizes a bundle has, and the stage that a step graph computes, in plain torch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        external: External | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` of everything; float64 is what errors of arithmetic are measured against."""
        self.checkpoint, self.config, self.external, self.dtype = checkpoint, config, external, dtype
        if external is not None and dtype != torch.float32:
            self.external = replace(external, model=deepcopy(external.model).to(dtype))
        self.model = cache(self._model)

    def in_float64(self) -> Truth:
        return Truth(self.checkpoint, self.config, self.external, torch.float64)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All weights; the models of all sizes share them."""
        return {name: self.checkpoint.read(name).to(self.dtype) for name in self.checkpoint.expected}

    def tensor(self, array: np.ndarray) -> Tensor:
        """An input, in this model's type if it is of floats."""
        tensor = torch.from_numpy(array)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _model(self, size: int, through: int | None = None) -> DiM | MDM:
        """The model at that picture size; `through`: positions are resized to that size first."""
        config = replace(self.config, image_size=size)
        sides = [n // config.patch for n in (through, size) if n is not None]
        model = empty_model(config)
        position = self.checkpoint.position(sides).to(self.dtype)
        model.load_state_dict(self.tensors | {POSITION: position}, assign=True)
        return model.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------------------- inputs

    def inputs(self, spec: GraphSpec, point: Point, seed: int = 0) -> Arrays:
        config, B = self.config, point.batch
        draw = np.random.default_rng([zlib.crc32(f"{spec.name} {point}".encode()), seed])

        def normal(*shape: int) -> np.ndarray:
            return draw.standard_normal(shape, dtype=np.float32)

        if spec.role in ("encode", "decode"):
            return self._half_inputs(spec, point, normal, draw)
        latent = self.latent_shape(spec, point)
        y = draw.integers(0, config.classes + 1, B)
        null = np.full(B, config.classes)
        if spec.role == "denoise":
            inputs = {"z": normal(B, *latent), "t": self.times(draw, B)[1], "y": y}
        else:
            inputs = {
                "base": normal(B, *latent), "point": normal(B, *latent), "history": normal(B, 3, *latent),
                "row": self.rows(spec, draw, B), "noise": normal(B, *latent), "y": y,
            }  # fmt: skip
            if spec.guided:
                inputs |= {"guidance": draw.uniform(0, 3, B).astype(np.float32), "uncond_y": null}
        if config.family == "mdm":
            inputs["given"] = draw.random((B, latent[0])) < 0.3
            if spec.role == "step" and spec.guided:
                inputs["uncond"] = normal(B, *latent)
            if config.keep < 1:
                inputs["mask"] = np.maximum(draw.random((B, latent[0])) < 0.5, inputs["given"]).astype(np.float32)
                if spec.role == "step":
                    inputs["x0_before"] = normal(B, *latent)
        return inputs

    def _half_inputs(self, spec: GraphSpec, point: Point, normal: Any, draw: np.random.Generator) -> Arrays:
        config, B, T = self.config, point.batch, point.text_tokens
        if config.family == "dim":
            height, width = point.size
            factor = self.external.model.shape.factor if self.external else 1
            if spec.role == "decode":
                return {"z": normal(B, config.in_channels, height, width)}
            channels = self.external.model.shape.picture if self.external else config.in_channels
            return {"picture": normal(B, channels, height * factor, width * factor).clip(-1, 1)}
        if spec.role == "encode" and "text" in spec.modalities:
            return {"ids": draw.integers(0, config.vocabulary, (B, T))}
        size = spec.image_size or 0
        if spec.role == "encode":
            return {"picture": normal(B, config.in_channels, size, size).clip(-1, 1)}
        return {"z": normal(B, T or (size // config.patch) ** 2, config.latent)}

    def latent_shape(self, spec: GraphSpec, point: Point) -> tuple[int, ...]:
        config, size = self.config, spec.image_size or 0
        if config.family == "dim":
            return (config.in_channels, size, size)
        return (point.text_tokens + spec.pictures * (size // config.patch) ** 2, config.latent)

    def times(self, draw: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Continuous times [B], and what the network is given for them."""
        t = draw.uniform(0.05, 0.95, batch)
        return t, np.asarray(make_schedule(self.config.schedule_image).model_time(t), np.float32)

    def rows(self, spec: GraphSpec, draw: np.random.Generator, batch: int) -> np.ndarray:
        t, network_time = self.times(draw, batch)
        specs = {"text": self.config.schedule_text, "image": self.config.schedule_image}
        rows = draw.uniform(-1, 1, (batch, len(spec.modalities), len(ROW)))
        for m, modality in enumerate(spec.modalities):
            schedule = make_schedule(specs[modality])
            column = dict(zip(ROW, rows[:, m].T, strict=True))  # views
            column["t"][:], column["tau"][:] = network_time, 0.6 * network_time
            column["alpha"][:], column["sigma"][:] = schedule.alpha(t), schedule.sigma(t)
            column["first"][:] = rows[:, 0, ROW.index("first")] > 0.5
            slot = draw.integers(0, 4, batch)  # 3: nowhere
            for k in range(3):
                column[f"slot{k}"][:] = slot == k
        return rows.astype(np.float32)

    # ---------------------------------------------------------------------------------------------------- outputs

    @torch.no_grad()
    def outputs(self, spec: GraphSpec, inputs: Arrays) -> Arrays:
        given = {name: self.tensor(array) for name, array in inputs.items()}
        if spec.role in ("encode", "decode"):
            said = self._half_outputs(spec, given)
        elif spec.role == "denoise":
            said = {"eps": self.estimate(spec, given["z"], given["t"], given, given["y"])}
        else:
            said = self._step_outputs(spec, given)
        return {name: tensor.numpy() for name, tensor in said.items()}

    def _half_outputs(self, spec: GraphSpec, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if (external := self.external) is not None:
            if spec.role == "encode":
                return {"z": external.model.encode(given["picture"]) * external.scale}
            return {"picture": external.model.decode(given["z"] / external.scale)}
        model = self.model(spec.image_size or self.config.image_size)
        assert isinstance(model, MDM)
        if "text" in spec.modalities:
            if spec.role == "encode":
                return {"z": model.vae.encode_text(given["ids"])}
            logits = model.vae.decode_text(given["z"])
            return {"logits": logits, "ids": logits.argmax(-1)}
        if spec.role == "encode":
            return {"z": model.vae.encode_image(given["picture"])}
        return {"picture": model.vae.decode_image(given["z"], model.config.side)}

    def estimate(
        self, spec: GraphSpec, z: Tensor, t: Tensor, given: dict[str, Tensor], y: Tensor, low: bool = False
    ) -> Tensor:
        size = spec.image_size or self.config.image_size
        model = self.model(size // spec.upsample, size) if low else self.model(size)
        if isinstance(model, DiM):
            return model(z, t, y)
        pictures = SETS[spec.set][1] * model.config.side**2
        return model(z, t, z.shape[1] - pictures, given["given"], y, given.get("mask"))

    @torch.no_grad()
    def decoded(self, task: Task, z: Tensor) -> dict[str, Tensor]:
        """What a run's latents say: `logits` [B,T,V], `ids` [B,T] and the `margin` by which each won; `picture`."""
        model, said = self.model(self.config.image_size), dict[str, Tensor]()
        if isinstance(model, MDM):
            M = model.config.side**2
            if task.makes_text:
                logits = model.vae.decode_text(z[:, : z.shape[1] - task.pictures * M])  # [B,T,V]
                first, second = logits.topk(2).values.unbind(-1)
                said |= {"logits": logits, "ids": logits.argmax(-1), "margin": first - second}
            if task.makes_image:
                said["picture"] = model.vae.decode_image(z[:, -M:], model.config.side)
        elif self.external is not None:
            said["picture"] = self.external.model.decode(z / self.external.scale)
        return said

    def _step_outputs(self, spec: GraphSpec, given: dict[str, Tensor]) -> dict[str, Tensor]:
        base, point, history, row = (given[name] for name in ("base", "point", "history", "row"))
        c = self.columns(spec, row, point)
        kept = given["given"][..., None] if "given" in given else torch.zeros((), dtype=torch.bool)
        untold = torch.where(kept, given["uncond"], point) if "uncond" in given else point

        def guided(z: Tensor, unconditional: Tensor, t: Tensor, low: bool = False) -> Tensor:
            eps = self.estimate(spec, z, t, given, given["y"], low)
            if not spec.guided:
                return eps
            scale = given["guidance"].view(-1, *[1] * (z.ndim - 1))
            return guide(eps, self.estimate(spec, unconditional, t, given, given["uncond_y"], low), scale)

        eps = guided(point, untold, row[:, 0, ROW.index("t")])
        if spec.upsample:
            m = spec.upsample
            z = F.avg_pool2d(point, m) * c["inv_sqrt_power"]
            low = guided(z, z, row[:, 0, ROW.index("tau")], low=True)
            eps = eps + c["w"] * F.interpolate(low / m - F.avg_pool2d(eps, m), scale_factor=m, mode="nearest")
        stored = c["p"] * point + c["q"] * eps
        slots = [torch.where(c[f"slot{k}"] == 1, stored, history[:, k]) for k in range(3)]
        tensors = dict(zip(PARTS, (base, *slots, given["noise"]), strict=True))
        x0 = (point - c["sigma"] * eps) / c["alpha"]
        said = {"history_next": torch.stack(slots, 1), "x0": torch.where(kept, point, x0)}
        for kind, old in (("base", base), ("point", point)):
            new = sum(c[f"{kind}_{part}"] * x for part, x in tensors.items())
            said[f"{kind}_next"] = torch.where(kept, old, new)
        if "x0_before" in given:
            said["mask_next"] = self.selected(given, c, x0)
        return said

    def choices(self, spec: GraphSpec, inputs: Arrays, found: Arrays) -> Arrays:
        """What follows from the logits or the estimate x0 that a graph came to."""
        if "logits" in found:
            return {"ids": found["logits"].argmax(-1)}
        if "mask_next" not in found:
            return {}
        given = {name: self.tensor(array) for name, array in inputs.items()}
        c = self.columns(spec, given["row"], given["point"])
        return {"mask_next": self.selected(given, c, self.tensor(found["x0"])).numpy()}

    def columns(self, spec: GraphSpec, row: Tensor, point: Tensor) -> dict[str, Tensor]:
        """Each column of a step's row as [B,1,1,1], or spread over the tokens of its modality as [B,L,1]."""
        pictures = SETS[spec.set][1] * ((spec.image_size or 0) // self.config.patch) ** 2
        tokens = [n for n in (point.shape[1] - pictures, pictures) if n]
        spread = row[:, :, None] if point.ndim == 4 else row.repeat_interleave(torch.tensor(tokens), dim=1)
        return dict(zip(ROW, spread.unsqueeze(-2).unbind(-1), strict=True))

    def selected(self, given: dict[str, Tensor], c: dict[str, Tensor], x0: Tensor) -> Tensor:
        mask = select(x0, given["x0_before"], c["alpha"], c["sigma"], given["given"], self.config.keep)
        return torch.maximum(mask, c["first"].squeeze(-1).expand_as(mask))
