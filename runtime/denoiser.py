"""The network alone, for people with a sampler of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.backend import Array
from mdm.runtime.json_schema import told
from mdm.runtime.model import Model, Prepared


class Denoiser:
    """The guided noise estimate of some requests: `eps = denoiser(z, t)`, z [B,L,d] or [B,C,H,W], t in (0,1].

    `alpha_sigma(t)` is what noise at time t looks like: z = alpha x0 + sigma eps.
    """

    def __init__(self, model: Model, prepared: Sequence[Prepared]) -> None:
        self.model, self.prepared = model, prepared
        request, shape = prepared[0].request, prepared[0].shape
        if any(one.request.task != request.task or one.shape != shape for one in prepared):
            raise InputError("denoise: the samples differ in task, size or text length\nask for each of them alone")
        self.task = model.task(request.task)
        self.graph = model.graph_for("denoise", self.task, request, guided=False)
        self.shape = (len(prepared), *shape.latents)
        self.schedules, self.clock = model.schedules(self.task)
        inputs = {name: np.stack([one.job.inputs[name] for one in prepared]) for name in prepared[0].job.inputs}
        self.given = inputs.get("given")
        if self.given is not None:
            self.clean = np.stack([one.job.state["base"] for one in prepared])
        self.inputs = inputs

    def alpha_sigma(self, t: float) -> tuple[Array, Array]:
        """A number each, [1]; where text and picture have schedules of their own, one for each token, [L,1]."""
        pairs = np.array([(s.alpha(t), s.sigma(t)) for s in self.schedules], np.float32)  # [m,2]
        if len(pairs) == 2:
            text = self.prepared[0].shape.text
            pairs = np.repeat(pairs, (text, self.shape[1] - text), axis=0)[..., None]
            return pairs[:, 0], pairs[:, 1]  # [L,1] each
        return pairs[:, 0], pairs[:, 1]

    def __call__(self, z: Array, t: float) -> Array:
        z = np.asarray(z, np.float32)
        if z.shape != self.shape:
            raise InputError(f"z has shape {list(z.shape)}, expected {list(self.shape)}")
        if not 0 < t <= 1:
            raise InputError(f"t is {told(t)}, expected a time above 0 and up to 1")
        if self.given is not None:
            z = np.where(self.given[..., None], self.clean, z)
        eps = self.estimate(z, t, self.inputs["y"])
        scale = self.inputs["guidance"].reshape(-1, *[1] * (z.ndim - 1))
        if self.task["drops"] and scale.any():
            if self.given is not None:
                z = np.where(self.given[..., None], self.inputs["uncond"], z)
            eps = eps + scale * (eps - self.estimate(z, t, self.inputs["uncond_y"]))
        return eps if self.given is None else np.where(self.given[..., None], np.float32(0), eps)

    def estimate(self, z: Array, t: float, y: Array) -> Array:
        graph = self.model.backend.graph(self.graph)
        time = np.full(len(z), self.schedules[self.clock].model_time(t), np.float32)
        mask = np.ones(z.shape[:2], np.float32)
        inputs: dict[str, Any] = {"z": z, "t": time, "y": y, "given": self.given, "mask": mask}
        (eps,) = graph.run(["eps"], **{name: inputs[name] for name in graph.inputs})
        return eps
