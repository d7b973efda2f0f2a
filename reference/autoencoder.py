"""The image autoencoder outside a latent DiM: Stable Diffusion's AutoencoderKL, from pictures to latents and back.

DiM's released latent models see what it encodes, 8 times smaller and with 4 channels, times a factor of 0.18215 that is
left to the caller. Parameter names and shapes are those of diffusers. A file says all about its own sizes, so loading
takes no config, and it may use the names of diffusers, old or new, or those of the CompVis code it was trained with.

Letters: B batch, C channels, H x W picture, h x w latent, z latent channels.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.checkpoint import read_tensors

# Another layout's name -> diffusers' name. All rules apply, in this order; a name in the new layout passes unchanged.
# The first nine are CompVis' blocks, whose attention is of 1x1 convolutions: [C,C,1,1] where diffusers has [C,C].
DIFFUSERS: tuple[tuple[str, str], ...] = (
    (r"^first_stage_model\.", ""),
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
)


def diffusers_name(name: str, levels: int) -> str:
    """What diffusers calls the tensor `name` of an autoencoder with so many levels."""
    for theirs, ours in DIFFUSERS:
        name = re.sub(theirs, ours, name)
    # The decoder's levels stand in the order they run; CompVis counts them from the other end.
    return re.sub(r"^decoder\.up\.(\d{1,2})\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)


@dataclass(frozen=True)
class AutoencoderShape:
    picture: int = 3  # channels of a picture
    latent: int = 4  # channels of a latent
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level, the picture's own size first
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32  # of the group norms; no tensor tells, and every release has 32

    def __post_init__(self) -> None:
        # Larger sizes would overflow before the file that claims them is looked at.
        sizes = (self.picture, self.latent, *self.channels)
        if not 1 <= min(sizes) <= max(sizes) <= 2**15 or any(c % self.groups for c in self.channels):
            raise InputError(
                f"found {self.picture} picture, {self.latent} latent and {self.channels} level channels\n"
                f"expected 1 to {2**15} of each, and in each level a multiple of {self.groups}, the groups of its norms"
            )

    @property
    def factor(self) -> int:
        """How many times smaller than the picture the latent is, on each side."""
        return 2 ** (len(self.channels) - 1)


def shape_from_tensors(tensors: Mapping[str, Tensor]) -> AutoencoderShape:
    """The sizes of an autoencoder from its encoder's tensors, in any of the layouts."""
    named = {diffusers_name(name, levels=0): tensor for name, tensor in tensors.items()}  # counts in decoder names only

    def channels(name: str, axis: int) -> int:
        if name not in named or named[name].ndim != 4:
            raise InputError(
                f"found {_form(named.get(name))} under the name '{name}', expected the weight of a 2-d convolution\n"
                "is it an image autoencoder (AutoencoderKL), in the layout of diffusers or CompVis?"
            )
        return named[name].shape[axis]

    def numbers(prefix: str) -> int:
        return len({match[1] for name in named if (match := re.match(prefix + r"(\d+)\.", name))})

    levels = max(1, numbers(r"encoder\.down_blocks\."))  # what has none is told so by `channels`
    return AutoencoderShape(
        picture=channels("encoder.conv_in.weight", 1),
        latent=channels("encoder.conv_out.weight", 0) // 2,  # mean and log variance
        channels=tuple(channels(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels)),
        blocks=numbers(r"encoder\.down_blocks\.0\.resnets\."),
    )


class Autoencoder(nn.Module):
    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = _encoder(shape)
        self.decoder = _decoder(shape)
        self.quant_conv = nn.Conv2d(2 * shape.latent, 2 * shape.latent, 1)
        self.post_quant_conv = nn.Conv2d(shape.latent, shape.latent, 1)

    def encode(self, picture: Tensor) -> Tensor:
        """[B,C,H,W] in [-1,1] -> mean of the posterior, unscaled, [B,z,h,w]."""
        channels, factor = self.shape.picture, self.shape.factor
        if picture.ndim != 4 or picture.shape[1] != channels or picture.shape[2] % factor or picture.shape[3] % factor:
            raise InputError(
                f"picture batch has shape {tuple(picture.shape)}\n"
                f"expected (batch, {channels}, height, width), both sides multiples of {factor}"
            )
        mean, _log_variance = self.quant_conv(self.encoder(picture)).chunk(2, dim=1)
        return mean

    def decode(self, latent: Tensor) -> Tensor:
        """Unscaled latents [B,z,h,w] -> [B,C,H,W] in about [-1,1]."""
        if latent.ndim != 4 or latent.shape[1] != self.shape.latent:
            raise InputError(
                f"latent batch has shape {tuple(latent.shape)}, expected (batch, {self.shape.latent}, height, width)"
            )
        return self.decoder(self.post_quant_conv(latent))


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder in a file, in float32, in eval mode."""
    # CompVis files may hold the discriminator and the perceptual network they were trained with.
    training = re.compile(r"(first_stage_model\.)?loss\.")
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if not training.match(name)}
    try:
        shape = shape_from_tensors(tensors)
    except InputError as error:
        raise InputError(f"autoencoder '{path}': {error}") from error
    with torch.device("meta"):
        model = Autoencoder(shape)
    model.load_state_dict(_fit(tensors, model, path), assign=True)
    return model.eval()


def _fit(tensors: Mapping[str, Tensor], model: Autoencoder, path: str | Path) -> dict[str, Tensor]:
    """The file's tensors under the model's names, in float32; the first that does not fit is an error."""
    expected, found, given = model.state_dict(), dict[str, Tensor](), dict[str, str]()
    for name, tensor in tensors.items():
        ours = diffusers_name(name, len(model.shape.channels))
        if ours in given:
            raise InputError(f"autoencoder '{path}' has one tensor under two names, {given[ours]!r} and {name!r}")
        given[ours] = name
        matrix = ours in expected and expected[ours].ndim == 2 and tensor.layout == torch.strided
        found[ours] = tensor.flatten(1) if matrix and tensor.shape[2:] == (1, 1) else tensor
    for name in [*expected, *found]:
        has = _form(found.get(name))
        wanted = f"floats {tuple(expected[name].shape)}" if name in expected else "no tensor"
        if has != wanted:
            raise InputError(
                f"autoencoder '{path}' does not fit at the tensor {given.get(name, name)!r}\n"
                f"found {has}, expected {wanted}\n"
                f"it has {len(found)} tensors, and one of {model.shape.channels} channels has {len(expected)}"
            )
    return {name: tensor.float() for name, tensor in found.items()}


def _form(tensor: Tensor | None) -> str:
    if tensor is None:
        return "no tensor"
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return f"{'floats' if plain else f'{tensor.dtype}, {tensor.layout} on {tensor.device},'} {tuple(tensor.shape)}"


class ResBlock(nn.Module):
    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, before)
        self.conv1 = _conv(before, width)
        self.norm2 = _norm(groups, width)
        self.conv2 = _conv(width, width)
        self.conv_shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B,before,H,W] -> [B,width,H,W]
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Every position looks at every other, with one head as wide as the stream."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(groups, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B,C,h,w] -> [B,C,h,w]
        tokens = self.group_norm(x).flatten(2).mT  # [B,h*w,C]
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # [B,1,h*w,C]
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out(mixed).mT.reshape(x.shape)


class Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:  # [B,C,h,w] -> [B,C,h,w]
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _encoder(shape: AutoencoderShape) -> nn.Sequential:
    first, last = shape.channels[0], shape.channels[-1]
    return _chain(
        conv_in=_conv(shape.picture, first),
        down_blocks=_levels((first, *shape.channels), shape.blocks, shape.groups, "downsamplers", _halve),
        mid_block=Middle(last, shape.groups),
        conv_norm_out=_norm(shape.groups, last),
        silu=nn.SiLU(),
        conv_out=_conv(last, 2 * shape.latent),
    )


def _decoder(shape: AutoencoderShape) -> nn.Sequential:
    first, last = shape.channels[0], shape.channels[-1]
    return _chain(
        conv_in=_conv(shape.latent, last),
        mid_block=Middle(last, shape.groups),
        up_blocks=_levels((last, *reversed(shape.channels)), shape.blocks + 1, shape.groups, "upsamplers", _double),
        conv_norm_out=_norm(shape.groups, first),
        silu=nn.SiLU(),
        conv_out=_conv(first, shape.picture),
    )


def _levels(
    widths: tuple[int, ...], blocks: int, groups: int, name: str, resample: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Residual blocks in each level, and a change of size after all but the last."""
    levels = []
    for before, width in pairwise(widths):
        resnets = [ResBlock(before if block == 0 else width, width, groups) for block in range(blocks)]
        levels.append(_chain(resnets=nn.Sequential(*resnets), **{name: nn.Sequential(resample(width))}))
    delattr(levels[-1], name)
    return nn.Sequential(*levels)


def _chain(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _halve(width: int) -> nn.Sequential:
    """[B,C,H,W] -> [B,C,H/2,W/2]. The padding is at the right and bottom alone, as the released weights expect."""
    return _chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def _double(width: int) -> nn.Sequential:
    return _chain(nearest=nn.Upsample(scale_factor=2, mode="nearest"), conv=_conv(width, width))


def _conv(before: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, padding=1)


def _norm(groups: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)
