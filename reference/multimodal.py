"""MDM: one Mamba-2 diffusion decoder over text and picture latents, behind one VAE (MDM paper, Fig. 2).

All latents of a sample stand in one tensor z [B,L,d]: the text's T tokens first, then the picture's h*w in rows. A
token that is given, not generated (a prompt, a question, a picture) enters clean, through a projection of its own and
with a learned "given" embedding. Whatever the network predicts, what leaves is the noise estimate eps.

Letters: B batch, L latent tokens, T text tokens, h x w grid, d latent width, E width, s = sigma, a = alpha.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.backbone import Backbone
from mdm.reference.config import Config
from mdm.reference.dim import check_classes
from mdm.reference.schedule import make_schedule
from mdm.reference.vae import VAE

Formula = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


class MDM(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        E, d = config.width, config.latent
        self.config = config
        self.vae = VAE(config)
        self.latent_in = nn.Linear(d, E)
        self.given_in = nn.Linear(d, E)
        self.given_embed = nn.Parameter(torch.randn(E) * 0.02)
        self.backbone = Backbone(config)
        self.latent_out = nn.Linear(E, d)
        self.schedules = {"text": make_schedule(config.schedule_text), "image": make_schedule(config.schedule_image)}
        nn.init.zeros_(self.latent_out.weight)
        for position in (self.backbone.position, self.backbone.text_position):
            nn.init.normal_(position, std=0.02)

    def forward(
        self,
        z: Tensor,  # [B,L,d]
        t: Tensor,  # [B], network time 1..1000
        text_tokens: int,  # T
        given: Tensor | None = None,  # [B,L] bool
        y: Tensor | None = None,  # [B] class
        mask: Tensor | None = None,  # [B,L] selection
    ) -> Tensor:
        """The noise estimate for every token -> [B,L,d]; meaningless, and unused, where a token is given."""
        output = self.predict(z, t, text_tokens, given, y, mask)
        return self.convert(eps_from, output, z, t, text_tokens)

    def predict(
        self,
        z: Tensor,
        t: Tensor,
        text_tokens: int,
        given: Tensor | None = None,
        y: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the network itself says: eps, v or x0, as the config has it for each modality -> [B,L,d]."""
        height = self.grid_height(z, text_tokens)
        y = check_classes(y, z.shape[0], self.config.classes).to(z.device)
        h = self.latent_in(z)  # [B,L,E]
        if given is not None:
            h = torch.where(given[..., None], self.given_in(z) + self.given_embed, h)
        text, image = split(h, text_tokens, height)
        text_mask, image_mask = (None, None) if mask is None else split(mask, text_tokens, height)
        text, image = self.backbone(text, image, t.to(z.device), y, text_mask, image_mask)
        parts = [text, None if image is None else image.flatten(1, 2)]
        return self.latent_out(torch.cat([part for part in parts if part is not None], dim=1))

    def convert(self, formula: Formula, first: Tensor, second: Tensor, t: Tensor, text_tokens: int) -> Tensor:
        """`eps_from`, `x0_from` or `target_from` over all tokens, each modality by its own kind and noise level."""
        alpha, sigma = self.levels(t, text_tokens, first.shape[1])
        halves = []
        for kind, part in (
            (self.config.predict_text, slice(0, text_tokens)),
            (self.config.predict_image, slice(text_tokens, None)),
        ):
            halves.append(formula(kind, first[:, part], second[:, part], alpha[:, part], sigma[:, part]))
        return torch.cat(halves, dim=1)  # [B,L,d]

    def levels(self, t: Tensor, text_tokens: int, tokens: int) -> tuple[Tensor, Tensor]:
        """alpha and sigma of every token at network time t [B] -> [B,L,1] each."""
        text, image = self.schedules["text"], self.schedules["image"]
        time = t.double() / image.model_time(1.0)
        halves = [(text, text_tokens), (image, tokens - text_tokens)]
        alpha = torch.cat([schedule.alpha(time)[:, None].expand(-1, n) for schedule, n in halves], dim=1)
        sigma = torch.cat([schedule.sigma(time)[:, None].expand(-1, n) for schedule, n in halves], dim=1)
        dtype = self.latent_in.weight.dtype
        return alpha[..., None].to(dtype), sigma[..., None].to(dtype)

    def grid_height(self, z: Tensor, text_tokens: int) -> int:
        """Rows of the picture grid in z: 0 without a picture, twice the side for two stacked pictures, ..."""
        config = self.config
        if z.ndim != 3 or z.shape[-1] != config.latent:
            raise InputError(f"latents have shape {tuple(z.shape)}, expected (batch, tokens, {config.latent})")
        image_tokens = z.shape[1] - text_tokens
        if (
            not 0 <= text_tokens <= max(config.text_lengths)
            or image_tokens < 0
            or image_tokens % config.side**2
            or not z.shape[1]
        ):
            raise InputError(
                f"{z.shape[1]} latent tokens with {text_tokens} of text\n"
                f"expected at most {max(config.text_lengths)} of text, then whole pictures of {config.side**2}"
            )
        return image_tokens // config.side


# What the network says (`output`, of kind eps, v = a eps - s x0, or x0) and the noisy latent z = a x0 + s eps, solved.


def eps_from(kind: str, output: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
    if kind == "eps":
        return output
    return a * output + s * z if kind == "v" else (z - a * output) / s


def x0_from(kind: str, output: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Divides by a only for eps, the one kind that needs it: a is 0 at t = 1."""
    if kind == "x0":
        return output
    return a * z - s * output if kind == "v" else (z - s * output) / a


def target_from(kind: str, z0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What the network should say."""
    if kind == "v":
        return a * noise - s * z0
    return noise if kind == "eps" else z0


def split(x: Tensor, text_tokens: int, height: int) -> tuple[Tensor | None, Tensor | None]:
    """[B,L,...] -> text [B,T,...] and grid [B,h,w,...], None where a segment is absent."""
    text = x[:, :text_tokens] if text_tokens else None
    return text, x[:, text_tokens:].unflatten(1, (height, -1)) if height else None
