"""The step graph: one whole sampler stage, guidance inside, driven by a row of the solver's table.

    eps = network(point, t), guided            m = p point + q eps -> the history's slot
    base'  = c . (base, history, noise)        point' = c' . (base, history, noise)

Every sample has a row of its own, so samples at different steps, with different solvers, share a batch. Given tokens
stand clean in base and point and stay. The columns are `runtime.solver.ROW`.

Letters: B batch, L latent tokens, d latent width, m modalities, R columns, C x H x W a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from mdm.export.backbone import Segments
from mdm.export.graph import Graph, Value
from mdm.export.networks import Conditioning, dim_estimate, mdm_estimate
from mdm.reference.config import Config
from mdm.runtime.solver import PARTS, ROW

Columns = dict[str, Value]
SLOTS = 3  # of the history


@dataclass(frozen=True)
class Half:
    """What one of guidance's two halves sees."""

    z: Value
    told: Conditioning


class Step:
    def __init__(self, g: Graph, config: Config, segments: Segments, guided: bool) -> None:
        self.g, self.config, self.segments, self.guided = g, config, segments, guided
        self.latent: list[str | int]
        if config.family == "dim":
            size = segments.side * config.patch
            self.latent = ["batch", config.in_channels, size, size]
        else:
            self.latent = ["batch", "tokens" if segments.text else segments.image_tokens, config.latent]
        self.modalities = 2 if segments.text and segments.pictures else 1
        dtype = g.dtype("solver")
        self.base = g.input("base", dtype, self.latent)
        self.point = g.input("point", dtype, self.latent)
        self.history = g.input("history", dtype, [self.latent[0], SLOTS, *self.latent[1:]])
        self.row = g.input("row", dtype, ["batch", self.modalities, len(ROW)])
        self.noise = g.input("noise", dtype, self.latent)
        self.scale = g.input("guidance", dtype, ["batch"]) if guided else None
        self.columns = self.spread(self.row)
        with g.scope("row"):  # one time for both modalities
            self.t = g.op("Squeeze", g.slice(g.slice(self.row, 1, 0, 1), 2, 0, 1), g.ints(1, 2))  # [B]

    def dim(self, upsample: int, low: Segments | None) -> None:
        """DiM's stage; `upsample` m: with upsample guidance from a network m times smaller."""
        g, y = self.g, self.g.input("y", "int64", ["batch"])
        halves = [Conditioning(y)]
        if self.guided:
            halves.append(Conditioning(g.input("uncond_y", "int64", ["batch"])))

        def estimate(z: Value, t: Value, segments: Segments) -> Value:
            def network(half: Half, t: Value) -> Value:
                return dim_estimate(g, self.config, segments, half.z, t, half.told)

            return self.guide([Half(z, told) for told in halves], t, network)

        eps = estimate(self.point, self.t, self.segments)
        if low is not None:
            eps = self.upsampled(eps, upsample, lambda z, t: estimate(z, t, low))
        self.finish(eps, None)

    def upsampled(self, eps: Value, m: int, low: Callable[[Value, Value], Value]) -> Value:
        """eps + w U[eps_lo / m - D[eps]] (DiM Eq. 4): D average pooling, U its nearest inverse."""
        g, sides = self.g, [m, m]
        z = g.op("AveragePool", self.point, kernel_shape=sides, strides=sides) * self.columns["inv_sqrt_power"]
        with g.copy("low"):
            eps_low = low(z, g.reshape(self.columns["tau"], -1))
        correction = eps_low / float(m) - g.op("AveragePool", eps, kernel_shape=sides, strides=sides)
        _, channels, height, width = self.latent
        cells = g.reshape(correction, 0, int(channels), int(height) // m, 1, int(width) // m, 1)
        grown = g.op("Expand", cells, g.ints(1, 1, 1, m, 1, m))  # [B,C,h,m,w,m]
        return eps + self.columns["w"] * g.reshape(grown, 0, *(int(n) for n in self.latent[1:]))

    def mdm(self) -> None:
        """MDM's stage, with what is given kept clean and, where the model selects, its mask carried on."""
        g = self.g
        per_token = self.latent[:2]
        given, y = g.input("given", "bool", per_token), g.input("y", "int64", ["batch"])
        selects = self.segments.keep < 1
        mask = g.input("mask", "float32", per_token) if selects else None
        before = g.input("x0_before", self.point.dtype, self.latent) if selects else None
        halves = [Half(self.point, Conditioning(y, given, mask))]
        marked = g.unsqueeze(given, 2)
        if self.guided:
            uncond, uncond_y = g.input("uncond", self.point.dtype, self.latent), g.input("uncond_y", "int64", ["batch"])
            untold = g.op("Where", marked, uncond, self.point, dtype=self.point.dtype)
            halves.append(Half(untold, Conditioning(uncond_y, given, mask)))

        def network(half: Half, t: Value) -> Value:
            def levels(modality: str) -> tuple[Value, Value]:
                alpha, sigma = (self.of_modality(modality, name) for name in ("alpha", "sigma"))
                copies = len(halves)
                return g.concat(0, *[alpha] * copies), g.concat(0, *[sigma] * copies)

            return mdm_estimate(g, self.config, self.segments, half.z, t, half.told, levels)

        eps = self.guide(halves, self.t, network)
        x0 = self.finish(eps, marked)
        if mask is not None and before is not None:
            with g.scope("selection"):
                g.output("mask_next", self.select(x0, before, given), per_token)

    # ------------------------------------------------------------------------------------------------------ rows

    def spread(self, row: Value) -> Columns:
        """Each column in a shape that broadcasts with the latents: a modality's number goes to its tokens."""
        g = self.g
        with g.scope("row"):
            if self.config.family == "dim":
                row = g.unsqueeze(row, 1)  # [B,1,1,R]
            elif self.modalities == 2:
                tokens = self.segments.image_tokens
                text = g.dim(self.base, 1) - tokens
                index = g.concat(0, g.op("Expand", g.ints(0), text), g.constant(np.ones(tokens), "int64"))  # [L]
                row = g.op("Gather", row, index, axis=1)  # [B,L,R]
            return dict(zip(ROW, g.split(row, [1] * len(ROW)), strict=True))

    def of_modality(self, modality: str, column: str) -> Value:
        """[B,1,1]"""
        g = self.g
        place = 1 if modality == "image" and self.modalities == 2 else 0
        start = ROW.index(column)
        return g.slice(g.slice(self.row, 1, place, place + 1), 2, start, start + 1)

    # ------------------------------------------------------------------------------------- guidance and the solver

    def guide(self, halves: list[Half], t: Value, network: Callable[[Half, Value], Value]) -> Value:
        """eps = c + s (c - u); both halves are one batch of twice the size."""
        g = self.g
        if self.scale is None:
            return network(halves[0], t)
        with g.scope("guidance"):
            z, y = g.concat(0, *(half.z for half in halves)), g.concat(0, *(half.told.y for half in halves))
            given, mask = (_twice(v) for v in (halves[0].told.given, halves[0].told.mask))
            doubled, times = Half(z, Conditioning(y, given, mask)), g.concat(0, t, t)
        eps = network(doubled, times)
        with g.scope("guidance"):
            batch = g.dim(t, 0)
            axis, end = g.ints(0), g.ints(np.iinfo(np.int64).max)
            told = g.op("Slice", eps, g.ints(0), batch, axis)
            untold = g.op("Slice", eps, batch, end, axis)
            s = g.unsqueeze(self.scale, *range(1, len(self.latent)))
            return told + s * (told - untold)

    def finish(self, eps: Value, given: Value | None) -> Value:
        """The solver's arithmetic and the graph's outputs -> x0 of every token."""
        g, c = self.g, self.columns
        with g.scope("solver"):
            eps = g.cast(eps, self.point.dtype)
            m = c["p"] * self.point + c["q"] * eps
            old = [g.op("Gather", self.history, g.constant(k, "int64"), axis=1) for k in range(SLOTS)]
            new = [c[f"slot{k}"] * m + (1.0 - c[f"slot{k}"]) * old[k] for k in range(SLOTS)]
            parts = dict(zip(PARTS, (self.base, *new, self.noise), strict=True))
            x0 = (self.point - c["sigma"] * eps) / c["alpha"]
            moved = {}
            for kind, old_value in (("base", self.base), ("point", self.point)):
                terms = [c[f"{kind}_{name}"] * value for name, value in parts.items()]
                moved[kind] = self.keep(given, old_value, reduce(add, terms))
            history = g.concat(1, *(g.unsqueeze(h, 1) for h in new))
        g.output("base_next", moved["base"], self.latent)
        g.output("point_next", moved["point"], self.latent)
        g.output("history_next", history, [self.latent[0], SLOTS, *self.latent[1:]])
        g.output("x0", self.keep(given, self.point, x0), self.latent)
        return x0

    def keep(self, given: Value | None, old: Value, new: Value) -> Value:
        return new if given is None else self.g.op("Where", given, old, new, dtype=old.dtype)

    # -------------------------------------------------------------------------------------------------- selection

    def select(self, x0: Value, before: Value, given: Value) -> Value:
        """The mask for the next evaluation; mirrors `reference/selection.py`, ranks by the same distance.

        Ranks are counted pair by pair: TensorRT's TopK ends at 3840 and takes no count that depends on a shape.
        """
        g, c = self.g, self.columns
        moved = x0 - before
        distance = g.op("ReduceMean", moved * moved, g.ints(-1), keepdims=1)
        ratio = c["alpha"] / c["sigma"]
        unrest = g.op("Squeeze", ratio * ratio * distance, g.ints(-1))  # [B,L]
        unrest = g.op("Where", given, g.constant(-1.0, unrest.dtype), unrest, dtype=unrest.dtype)
        mine, other = g.unsqueeze(unrest, 2), g.unsqueeze(unrest, 1)
        place = g.op("Range", g.constant(0, "int64"), g.op("Squeeze", g.dim(x0, 1)), g.constant(1, "int64"))
        earlier = g.op("Less", g.unsqueeze(place, 0), g.unsqueeze(place, 1), dtype="bool")  # [mine,other]
        tied = g.op("And", g.op("Equal", other, mine, dtype="bool"), earlier)
        ahead = g.op("Or", g.op("Less", other, mine, dtype="bool"), tied)  # [B,mine,other]
        rank = g.op("ReduceSum", g.cast(ahead, "int64"), g.ints(2), keepdims=0)  # [B,L]
        known = g.op("ReduceSum", g.cast(given, "int64"), g.ints(1), keepdims=1)  # [B,1]
        most = self.segments.image_tokens + max(self.config.text_lengths)
        keep = [math.ceil(self.segments.keep * n - 1e-9) for n in range(most + 1)]
        selected = known + g.constant(np.array(keep), "int64")[g.dim(x0, 1) - known]
        chosen = g.cast(g.op("Less", rank, selected, dtype="bool"), x0.dtype)
        first = g.op("ReduceMax", c["first"], g.ints(2), keepdims=0)  # [B,1 or L]: the first evaluation selects all
        return g.op("Max", chosen, first)


def _twice(value: Value | None) -> Value | None:
    return None if value is None else value.graph.concat(0, value, value)
