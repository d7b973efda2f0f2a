"""DiM: class-conditional pictures; Mamba-1, one scan order a block. Predicts the noise eps.

Paper: Teng et al., DiM (`papers/dim.md`); where paper and released checkpoints differ, the checkpoints decide.
Letters: B batch, C channels, H x W picture, p patch side, h x w grid of patches, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.backbone import Backbone
from mdm.reference.config import Config


class DiM(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        p = config.patch
        self.patch_in = nn.Conv2d(config.in_channels, config.width, p, stride=p)
        self.backbone = Backbone(config)
        self.patch_out = nn.Linear(config.width, p * p * config.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise in x [B,C,H,W] at network time t [B] (1..1000); y [B] class, missing means the null class."""
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % config.patch or x.shape[3] % config.patch:
            raise InputError(
                f"picture batch has shape {tuple(x.shape)}\n"
                f"expected (batch, {config.in_channels}, height, width), both sides multiples of {config.patch}"
            )
        y = check_classes(y, x.shape[0], config.classes).to(x.device)
        image = self.patch_in(x).movedim(1, -1)  # [B,h,w,E]
        _, image = self.backbone(None, image, t.to(x.device), y)
        patches = self.patch_out(image).unflatten(-1, (config.patch, config.patch, -1))  # [B,h,w,p,p,C]
        batch, h, w, p, _, channels = patches.shape
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, h * p, w * p)  # [B,C,H,W]


def check_classes(y: Tensor | None, batch: int, classes: int) -> Tensor:
    """The class of each sample [B]; the null class `classes` where none is given."""
    if y is None:
        return torch.full((batch,), classes)
    if y.shape != (batch,) or y.dtype.is_floating_point:
        raise InputError(f"class ids have shape {tuple(y.shape)} and type {y.dtype}, expected {batch} integers")
    if not torch.compiler.is_compiling() and y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= classes:
        raise InputError(
            f"class ids reach from {int(y.min())} to {int(y.max())}, expected 0 to {classes}, which is the null class"
        )
    return y.long()
