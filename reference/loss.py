"""Training losses: the VAE's (Eq. 15-17), the diffusion's for MDM (Eq. 14, 18) and for DiM.

MDM's Eq. 18 is L_rec_img + L_rec_txt + beta KL + lambda L_se. Its first three terms train the VAE, which is then
frozen; the diffusion minimises lambda L_se + gamma |noise error|^2 (gamma is our addition: the paper uses a DDPM
scheduler but prints no noise loss) and, for text, a cross entropy on the decoded estimate of x0. Each modality's
noise error is taken in what the network predicts there (v for pictures, x0 for text), which only reweights it in t.

Letters: B batch, L tokens, T text tokens, d latent width, Y candidates of the score entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.reference.data import Rows
from mdm.reference.dim import DiM
from mdm.reference.multimodal import MDM, target_from, x0_from
from mdm.reference.schedule import CosineSchedule, NoiseSchedule, make_schedule
from mdm.reference.selection import candidates_of, score_entropy, select
from mdm.reference.tokenizer import PAD
from mdm.reference.vae import IMAGE, TEXT, VAE, kl_to_normal

PAD_WEIGHT = 0.1  # of the pads behind a text's first, which is its end mark and counts fully


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, and where in t the training noise is drawn.

    A modality's t is drawn as if its schedule were "cosine" with the shift named here: uniform in time there, mapped
    to the same signal-to-noise ratio of the real schedule.
    """

    image: float = 8.0
    text: float = 1.0
    cross_entropy: float = 1.0
    score_entropy: float = 1.0  # lambda
    image_noise_shift: float = 0.25
    text_noise_shift: float = 0.4
    flat: float = 1.0  # of a picture's flat patches among its others: background drowns small shapes


def vae_loss(vae: VAE, patches: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Patches [n,p*p*C] and ids [m] -> 30 mse + 1e-3 KL for pictures, cross entropy + 0.03 KL for text.

    Pictures' KL is a mean over channels, text's a sum: that leaves about 7 of 16 channels active for text and its
    pieces far apart (nearest neighbours at 0.9 of their norm), which diffusion needs more than a small KL.
    """

    def sampled(tokens: Tensor, modality: int) -> tuple[Tensor, Tensor]:
        mean, log_variance = vae.posterior(tokens, modality)
        noise = torch.randn(mean.shape, generator=generator)
        return mean + (0.5 * log_variance).exp() * noise, kl_to_normal(mean, log_variance)

    s, kl = sampled(patches, IMAGE)
    image = 30 * F.mse_loss(vae.image_head(s), patches) + 1e-3 * kl.mean()
    s, kl = sampled(ids, TEXT)
    return image + F.cross_entropy(vae.text_head(s), ids) + 0.03 * kl.sum(-1).mean()


def draw_times(schedule: NoiseSchedule, shift: float, count: int, generator: torch.Generator) -> Tensor:
    """Stratified times [count], one in each of `count` equal parts, shuffled."""
    part = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    part = part[torch.randperm(count, generator=generator)].clamp(1e-3, 1 - 1e-3)
    return schedule.time_of_lam(CosineSchedule(shift).lam(part)).clamp(1e-4, 1 - 1e-4)


def mdm_loss(model: MDM, rows: Rows, weights: Weights, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch of rows of one shape, and its parts for the log."""
    # 1. Clean latents of everything; a time for each row, by what the row generates.
    vae, T = model.vae, rows.ids.shape[1]
    parts = [vae.encode_text(rows.ids)] if T else []
    parts += [vae.encode_image(rows.pictures[:, k]) for k in range(rows.pictures.shape[1])]
    z0 = torch.cat(parts, dim=1)  # [B,L,d]
    batch = z0.shape[0]
    by_image = draw_times(model.schedules["image"], weights.image_noise_shift, batch, generator)
    by_text = draw_times(model.schedules["text"], weights.text_noise_shift, batch, generator)
    t = torch.where(rows.makes_image, by_image, by_text) * model.schedules["image"].model_time(1.0)  # [B]

    # 2. Noise it, each modality by its own schedule; given tokens stay clean.
    noise = torch.randn(z0.shape, generator=generator)
    alpha, sigma = model.levels(t, T, z0.shape[1])  # [B,L,1]
    z = torch.where(rows.given[..., None], z0, alpha * z0 + sigma * noise)

    # 3. Half of the steps of a selecting model run under the mask that noisier evaluations would have left.
    mask = None
    if model.config.keep < 1 and torch.rand((), generator=generator) < 0.5:
        mask = training_mask(model, rows, z0, noise, t, generator)
    output = model.predict(z, t, T, rows.given, rows.y, mask)  # [B,L,d]

    # 4. The terms, over generated tokens.
    made = (~rows.given).float()  # [B,L]
    x0 = model.convert(x0_from, output, z, t, T)
    error = (output - model.convert(target_from, z0, noise, t, T)).square().mean(-1)  # [B,L]
    terms: dict[str, Tensor] = {}
    if T and bool(rows.makes_text.any()):
        w = text_weights(rows.ids, rows.given[:, :T])
        # A row counts with the root of its length: a one-word answer is not drowned by captions.
        w = w / w.sum(1, keepdim=True).clamp(min=1e-9).sqrt() / rows.makes_text.sum()
        surprise = F.cross_entropy(vae.decode_text(x0[:, :T]).mT, rows.ids, reduction="none")
        terms |= {"text": (w * error[:, :T]).sum(), "ce": (w * surprise).sum()}
    if bool(rows.makes_image.any()):
        flat = vae.is_flat(rows.pictures.flatten(0, 1)).reshape(batch, -1)  # [B,k*h*w]
        w = made[:, T:] * torch.where(flat, weights.flat, 1.0)
        terms["image"] = (w * error[:, T:]).sum() / w.sum() * rows.makes_image.float().mean()
    if weights.score_entropy:
        later = torch.rand(3, batch, 1, 1, generator=generator) * sigma  # less noised states of the same tokens
        candidates = candidates_of(z0, noise, (1 - later**2).sqrt(), later)  # [Y,B,L,d]
        terms["se"] = (made * score_entropy(candidates, x0, z0, alpha, sigma)).sum() / made.sum()
    scale = {"text": weights.text, "ce": weights.cross_entropy, "image": weights.image, "se": weights.score_entropy}
    loss = torch.stack([scale[name] * term for name, term in terms.items()]).sum()
    return loss, {name: float(term.detach()) for name, term in terms.items()}


def text_weights(ids: Tensor, given: Tensor) -> Tensor:
    """Weight of each text token [B,T]: 0 if given, 1 for content and the pad that ends it, less for the pads behind."""
    pads = (ids == PAD) & ~given  # a hidden prompt is pads too, and ends nothing
    return (~given).float() * torch.where(pads.cumsum(1) <= 1, 1.0, PAD_WEIGHT)


@torch.no_grad()
def training_mask(model: MDM, rows: Rows, z0: Tensor, noise: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """The mask for time t, from estimates at two noisier times, as sampling would have made it -> [B,L]."""
    T, last = rows.ids.shape[1], model.schedules["image"].model_time(1 - 1e-4)
    gap = torch.rand(t.shape, generator=generator, dtype=t.dtype) * 0.1 * last  # a run of 10 steps, or of more
    estimates = []
    for time in ((t + 2 * gap).clamp(max=last), (t + gap).clamp(max=last)):
        alpha, sigma = model.levels(time, T, z0.shape[1])
        z = torch.where(rows.given[..., None], z0, alpha * z0 + sigma * noise)
        estimates.append(model.convert(x0_from, model.predict(z, time, T, rows.given, rows.y), z, time, T))
    return select(estimates[1], estimates[0], alpha, sigma, rows.given, model.config.keep)


def dim_loss(model: DiM, rows: Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """|eps_hat - eps|^2 at the discrete times 1/1000 .. 1 that DiM was trained on."""
    x0 = rows.pictures[:, 0]  # [B,C,H,W]
    schedule = make_schedule(model.config.schedule_image)
    t = torch.randint(1, 1001, (x0.shape[0],), generator=generator).double() / 1000
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = (level.float()[:, None, None, None] for level in (schedule.alpha(t), schedule.sigma(t)))
    loss = F.mse_loss(model(alpha * x0 + sigma * noise, schedule.model_time(t).float(), rows.y), noise)
    return loss, {"image": float(loss.detach())}
