"""Running a task: from prompts, pictures and classes to pictures and texts, with the reference network.

The solver sees one estimator `eps(z, t)`. Inside it: given tokens are put back clean, guidance runs the network on a
doubled batch, and a selecting model carries its mask from one evaluation to the next.

Letters: B batch, L latent tokens, T text tokens, d latent width, C x S x S a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.guidance import guide
from mdm.reference.multimodal import MDM
from mdm.reference.schedule import JointSchedule, NoiseSchedule
from mdm.reference.selection import select
from mdm.reference.solvers import STOCHASTIC, sample
from mdm.reference.tasks import Request, make_request
from mdm.reference.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """What a batch of requests came to. A task without text has no texts, one without a new picture no pictures."""

    texts: list[str]
    pictures: Tensor | None  # [B,C,S,S] in [-1,1]
    latents: Tensor  # [B,L,d]


def schedule_of(model: MDM, request: Request) -> NoiseSchedule:
    """The schedule of what is generated; both, token by token, where text and picture are."""
    text, image = model.schedules["text"], model.schedules["image"]
    if request.task.makes_text and request.task.makes_image:
        return JointSchedule(text, image, request.text_tokens, request.clean.shape[1] - request.text_tokens)
    return text if request.task.makes_text else image


@dataclass
class Estimator:
    """eps(z, t) of a request for ONE run of a solver: it holds the selection's memory."""

    model: MDM
    request: Request
    schedule: NoiseSchedule
    guidance: float
    x0_before: Tensor | None = None  # [B,L,d], the guided estimate of the evaluation before
    mask: Tensor | None = None  # [B,L], the selection for the next evaluation
    selected: list[float] = field(default_factory=list)  # share of tokens selected at each evaluation

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        request, model, given = self.request, self.model, self.request.given
        batch, dtype = z.shape[0], z.dtype
        time = model.schedules["image"].model_time(t).expand(batch)
        if self.mask is not None:
            self.selected.append(float(self.mask.mean()))

        def run(zs: Tensor, ts: Tensor, givens: Tensor, ys: Tensor, masks: Tensor | None) -> Tensor:
            return model(zs.to(request.clean.dtype), ts, request.text_tokens, givens, ys, masks).to(dtype)

        told = torch.where(given[..., None], request.clean, z)  # [B,L,d]
        if self.guidance and request.task.drops:
            untold = torch.where(given[..., None], request.unguided_clean, z)
            masks = None if self.mask is None else self.mask.repeat(2, 1)
            both = run(torch.cat([told, untold]), time.repeat(2), given.repeat(2, 1),
                       torch.cat([request.y, request.unguided_y]), masks)  # [2B,L,d]  # fmt: skip
            eps = guide(both[:batch], both[batch:], self.guidance)
        else:
            eps = run(told, time, given, request.y, self.mask)
        if model.config.keep < 1:
            self._select(z, t, eps)
        return eps.masked_fill(given[..., None], 0)

    def _select(self, z: Tensor, t: Tensor, eps: Tensor) -> None:
        """Choose the next evaluation's tokens from this estimate and the one before: so the first two select all."""
        alpha, sigma = self.schedule.alpha(t).to(z), self.schedule.sigma(t).to(z)  # scalars or [L,1]
        x0 = (z - sigma * eps) / alpha
        if self.x0_before is not None:
            self.mask = select(x0, self.x0_before, alpha.reshape(1, -1, 1), sigma.reshape(1, -1, 1), self.request.given,
                               self.model.config.keep).to(self.request.clean.dtype)  # fmt: skip
        self.x0_before = x0


def generate(
    model: MDM,
    tokenizer: Tokenizer,
    task: str,
    *,
    prompts: list[str] | None = None,
    pictures: Tensor | None = None,
    classes: list[int] | None = None,
    negative: list[str] | None = None,
    batch: int | None = None,
    seed: int = 0,
    noise: Tensor | None = None,  # [B,L,d]; drawn from the seed if missing
    callback: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,  # solver, steps, guidance, t_start, spacing, ...: override the config's sampler
) -> Result:
    """One batch of one task."""
    request = make_request(model, tokenizer, task, prompts, pictures, classes, negative, batch)
    config = model.config
    sampler: Mapping[str, Any] = {"guidance": 0.0, **config.sampler, **config.sampler_for.get(task, {}), **settings}
    options = {key: value for key, value in sampler.items() if key not in ("solver", "steps", "guidance")}
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(request.clean.shape, generator=generator) if noise is None else noise
    if z.shape != request.clean.shape:
        raise InputError(f"noise has shape {tuple(z.shape)}, expected {tuple(request.clean.shape)}")
    if not math.isfinite(float(sampler["guidance"])):
        raise InputError(f"guidance is {sampler['guidance']}, expected a finite number")
    if sampler["solver"] in STOCHASTIC:
        options["noise"] = generator
    schedule = schedule_of(model, request)
    estimator = Estimator(model, request, schedule, float(sampler["guidance"]))
    z = sample(sampler["solver"], estimator, z, schedule, sampler["steps"], callback=callback, **options)
    return decode(model, tokenizer, request, z)


@torch.no_grad()
def decode(model: MDM, tokenizer: Tokenizer, request: Request, z: Tensor) -> Result:
    """Latents to text (what follows the prompt) and the new picture."""
    task, T, side = request.task, request.text_tokens, model.config.side
    z = torch.where(request.given[..., None], request.clean, z)
    texts = []
    if task.makes_text:
        ids = model.vae.decode_text(z[:, :T]).argmax(-1)  # [B,T]
        texts = [tokenizer.decode(row[~known].tolist()) for row, known in zip(ids, request.given[:, :T], strict=True)]
    picture = model.vae.decode_image(z[:, -side * side :], side).clamp(-1, 1) if task.makes_image else None
    return Result(texts, picture, z)
