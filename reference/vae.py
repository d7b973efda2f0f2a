"""The unified VAE: picture patches and text pieces become tokens of one latent space, and back (MDM Sec. 4.1, 4.2.2).

One trunk serves both modalities, token by token; a modality embedding tells them apart. The diffusion works on the
posterior mean, centred by its measured mean and divided by ONE measured scale a modality: a scale for each channel
would blow up the channels that the KL term has silenced.

Letters: B batch, L tokens, C channels, p patch side, h x w grid, V vocabulary, d latent width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.config import Config

IMAGE, TEXT = 0, 1
FLAT = 0.02  # standard deviation below which a patch counts as background


class VAE(nn.Module):
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, d, pixels = config.vae_width, config.latent, config.in_channels * config.patch**2
        self.image_in = nn.Linear(pixels, hidden)
        self.text_in = nn.Embedding(config.vocabulary, hidden)
        self.modality = nn.Embedding(2, hidden)
        self.encoder = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * d))
        self.decoder = nn.Sequential(nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.image_out = nn.Linear(hidden, pixels)
        self.text_out = nn.Linear(hidden, config.vocabulary)
        self.register_buffer("latent_mean", torch.zeros(2, d))  # measured once the VAE is trained
        self.register_buffer("latent_scale", torch.ones(2))

    def posterior(self, tokens: Tensor, modality: int) -> tuple[Tensor, Tensor]:
        """q(z | token): patches [B,L,p*p*C] or ids [B,L] -> mean and log variance [B,L,d]."""
        embed = self.image_in if modality == IMAGE else self.text_in
        mean, log_variance = self.encoder(embed(tokens) + self.modality.weight[modality]).chunk(2, dim=-1)
        return mean, log_variance.clamp(-12, 6)

    def image_head(self, s: Tensor) -> Tensor:
        """Unscaled latents [B,L,d] -> patches [B,L,p*p*C]."""
        return self.image_out(self.decoder(s))

    def text_head(self, s: Tensor) -> Tensor:
        """Unscaled latents [B,L,d] -> logits [B,L,V]."""
        return self.text_out(self.decoder(s))

    # What the diffusion sees: the deterministic, centred and scaled halves.

    def encode_image(self, picture: Tensor) -> Tensor:
        """[B,C,H,W] in [-1,1] -> latents [B,h*w,d]."""
        return self._scaled(self.posterior(self.patchify(picture), IMAGE)[0], IMAGE)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Piece ids [B,T] -> latents [B,T,d]."""
        vocabulary = self.config.vocabulary
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(
                f"token ids reach from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocabulary - 1}"
            )
        return self._scaled(self.posterior(ids, TEXT)[0], TEXT)

    def decode_image(self, z: Tensor, height: int) -> Tensor:
        """Latents [B,h*w,d] of a grid `height` patches high -> [B,C,H,W] in about [-1,1]."""
        return self.unpatchify(self.image_head(self._unscaled(z, IMAGE)), height)

    def decode_text(self, z: Tensor) -> Tensor:
        """Latents [B,T,d] -> logits [B,T,V]; the text is their argmax."""
        return self.text_head(self._unscaled(z, TEXT))

    def patchify(self, picture: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,h*w,p*p*C]."""
        p, channels = self.config.patch, self.config.in_channels
        if picture.ndim != 4 or picture.shape[1] != channels or picture.shape[2] % p or picture.shape[3] % p:
            raise InputError(
                f"picture batch has shape {tuple(picture.shape)}\n"
                f"expected (batch, {channels}, height, width), both sides multiples of {p}"
            )
        return F.pixel_unshuffle(picture, p).flatten(2).mT  # channel-major inside a patch

    def is_flat(self, picture: Tensor) -> Tensor:
        """Which patches hold next to nothing: [B,C,H,W] -> bool [B,h*w]."""
        return self.patchify(picture).std(dim=-1) < FLAT

    def unpatchify(self, patches: Tensor, height: int) -> Tensor:
        return F.pixel_shuffle(patches.mT.unflatten(-1, (height, -1)), self.config.patch)

    def _scaled(self, s: Tensor, modality: int) -> Tensor:
        return (s - self.latent_mean[modality]) / self.latent_scale[modality]

    def _unscaled(self, z: Tensor, modality: int) -> Tensor:
        return z * self.latent_scale[modality] + self.latent_mean[modality]


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)), Eq. 17, for each latent channel."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
