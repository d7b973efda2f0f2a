"""The network that DiM and MDM share: tokens in, tokens out, steered by time and class.

DiM is the case "image tokens only, Mamba-1, one scan order a block"; MDM adds a text segment and the Mamba-2 mixer.
A block does not know which family it serves. The numbered steps follow DiM's released checkpoints.

    [time, class, sep.. | text | sep | padded image grid] -> blocks -> text tokens, image tokens

Letters: B batch, L length of the whole sequence, T text tokens, h x w image grid, P pad tokens, E width, X mixers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.reference.config import Config
from mdm.reference.mixer import MIXERS
from mdm.reference.order import Layout, palindrome


class Backbone(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        E = config.width
        self.config = config
        self.time_in = nn.Linear(256, E)
        self.time_out = nn.Linear(E, E)
        self.class_embed = nn.Embedding(config.classes + 1, E)  # for the modulation; the last row is the null class
        self.modulation = nn.Linear(E, 3 * E)  # adaLN-single: one shift, scale, gate for all blocks
        self.class_token = nn.Embedding(config.classes + 1, E)
        self.position = nn.Parameter(torch.zeros(1, 2 + config.side**2, E))  # time, class, grid
        if config.text_lengths:
            self.text_position = nn.Parameter(torch.zeros(1, max(config.text_lengths), E))
            self.middle_sep = nn.Parameter(torch.randn(1, 1, E) * 0.02)
        self.sep = nn.Parameter(torch.randn(1, config.pad, E) * 0.02)
        self.pad = nn.Parameter(torch.randn(1, E, config.pad) * 0.02)  # channel first, as released
        self.conv_in = nn.Conv2d(E, E, 3, padding=1, groups=E)
        self.conv_out = nn.Conv2d(E, E, 3, padding=1, groups=E)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.blocks))
        self.norm_out = nn.RMSNorm(E, eps=1e-5)
        self.modulation_out = nn.Linear(E, 2 * E)
        for linear in (self.modulation, self.modulation_out):
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        text: Tensor | None,  # [B,T,E]
        image: Tensor | None,  # [B,h,w,E]
        t: Tensor,  # [B], the network's own time, 1..1000
        y: Tensor,  # [B], class
        text_mask: Tensor | None = None,  # [B,T], selection; both masks or none
        image_mask: Tensor | None = None,  # [B,h,w]
    ) -> tuple[Tensor | None, Tensor | None]:
        # 1. Modulation for all blocks, and the two tokens that say time and class.
        dtype = self.modulation.weight.dtype
        time = self.time_out(F.silu(self.time_in(sinusoid(t, 256).to(dtype))))  # [B,E]
        modulation = self.modulation(F.silu(time + self.class_embed(y))).unflatten(-1, (3, -1))  # [B,3,E]
        tokens = torch.stack([sinusoid(t, self.config.width).to(dtype), self.class_token(y)], dim=1)  # [B,2,E]
        condition = tokens.sum(1)  # [B,E], raw: before positions

        # 2. Positions; the local convolution before the first block; pads at row and column ends.
        batch = tokens.shape[0]
        prefix = torch.cat([tokens + self.position[:, :2], self.sep.expand(batch, -1, -1)], dim=1)  # [B,2+P,E]
        if text is not None:
            text = text + self.text_position[:, : text.shape[1]]  # [B,T,E]
        grid = None
        if image is not None:
            image = image + self.grid_position(*image.shape[1:3])  # [B,h,w,E]
            grid = self.pad_grid(convolve(self.conv_in, image))  # [B,h+P,w+P,E]

        # 3. The blocks, over the canonical sequence.
        layout = Layout(
            prefix.shape[1], 0 if text is None else text.shape[1], *((0, 0) if grid is None else grid.shape[1:3])
        )
        middle = self.middle_sep.expand(batch, -1, -1) if layout.sep else None
        h = join(prefix, text, middle, grid)  # [B,L,E]
        mask = self.full_mask(prefix, text_mask, image_mask)  # [B,L]
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            h = block(h, modulation, layout, mask, skips.pop() if index >= self.config.skip_from else None)
            if 1 <= index < self.config.skip_from:
                skips.append(h)

        # 4. Back to segments; crop the pads; the local convolution after the last block.
        if text is not None:
            text = self.modulate_out(h[:, layout.prefix : layout.head], condition[:, None])
        if image is not None:
            height, width = image.shape[1:3]
            grid = h[:, layout.head + layout.sep :].unflatten(1, (layout.height, layout.width))[:, :height, :width]
            image = self.modulate_out(convolve(self.conv_out, grid), condition[:, None, None])
        return text, image

    def grid_position(self, height: int, width: int) -> Tensor:
        """Learned positions for a grid of that size -> [1,h,w,E].

        Pictures stacked one above the other (a dialogue's earlier picture and its new one) each get the same
        positions; any other size is a bilinear resize.
        """
        side, learned = self.config.side, self.position[:, 2:]
        if (height, width) == (side, side) or (self.config.text_lengths and width == side and height % side == 0):
            return learned.unflatten(1, (side, side)).repeat(1, height // side, 1, 1)
        return resize_position(learned, height, width).unflatten(1, (height, width))

    def pad_grid(self, image: Tensor) -> Tensor:
        """Append P pad tokens to every row and P rows at the bottom: [B,h,w,E] -> [B,h+P,w+P,E]."""
        batch, height, width, _ = image.shape
        pad = self.pad.mT  # [1,P,E]
        count = pad.shape[1]
        right = pad[:, None].expand(batch, height, -1, -1)  # [B,h,P,E]
        cells = torch.arange(count * (width + count))
        # "lateral": bottom row k is token k throughout; "rho": the tokens take turns along the bottom rows.
        which = cells % count if self.config.padding == "rho" else cells // (width + count)
        bottom = pad[:, which].unflatten(1, (count, width + count)).expand(batch, -1, -1, -1)  # [B,P,w+P,E]
        return torch.cat([torch.cat([image, right], dim=2), bottom], dim=1)

    def full_mask(self, prefix: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor | None:
        """Selection over the whole sequence: prefix, separators and pads are always selected -> [B,L]."""
        if text is None and image is None:
            return None
        ones = prefix.new_ones(prefix.shape[:2])
        middle = ones[:, :1, None] if text is not None and image is not None else None
        grid = None if image is None else F.pad(image, (0, self.config.pad, 0, self.config.pad), value=1.0)[..., None]
        return join(ones[..., None], None if text is None else text[..., None], middle, grid).squeeze(-1)

    def modulate_out(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=-1)
        return self.norm_out(x) * (1 + scale) + shift


class Block(nn.Module):
    """skip -> adaLN -> mixers in their scan orders -> gated residual. No attention, no feed-forward part."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        E = config.width
        self.index, self.count = index, config.blocks
        image, _, text = config.scan_orders.partition("/")
        self.image_orders, self.text_orders = [int(o) for o in image], [int(o) for o in text]
        self.parallel = config.scan == "parallel"
        self.skip = Skip(E) if index >= config.skip_from else None
        self.modulation = nn.Parameter(torch.randn(3, E) / E**0.5)
        self.norm = nn.RMSNorm(E, eps=1e-5)
        mixers = len(image) + len(text) if self.parallel else 1
        self.mixers = nn.ModuleList(MIXERS[config.mixer](config) for _ in range(mixers))  # [X]

    def forward(
        self, h: Tensor, modulation: Tensor, layout: Layout, mask: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        if self.skip is not None and skip is not None:
            h = self.skip(h, skip)  # [B,L,E]
        shift, scale, gate = (self.modulation + modulation).unsqueeze(2).unbind(1)  # [B,1,E] each
        u = self.norm(h) * (1 + scale) + shift
        update: Tensor = 0  # type: ignore[assignment]
        seen = h.new_zeros(layout.length, 1)  # how many mixers saw a token
        for mixer, order in self.scans(layout):
            y = mixer(u[:, order], None if mask is None else mask[:, order])
            inverse = order.argsort()
            spare = layout.length - order.numel()  # tokens that a text-only mixer does not see
            update = update + F.pad(y[:, inverse], (0, 0, 0, spare))
            seen = seen + F.pad(h.new_ones(order.numel(), 1), (0, 0, 0, spare))
        return h + (1 + gate) * (update if len(self.mixers) == 1 else update / seen)

    def scans(self, layout: Layout) -> list[tuple[nn.Module, Tensor]]:
        """The mixers that run on this layout, each with its scan order."""
        if not self.parallel:
            if layout.height:
                order = self.image_orders[palindrome(self.index, self.count, len(self.image_orders))]
                return [(self.mixers[0], layout.joint_order(order))]
            order = self.text_orders[palindrome(self.index, self.count, len(self.text_orders))]
            return [(self.mixers[0], layout.text_order(order))]
        over_image = list(zip(self.mixers, map(layout.joint_order, self.image_orders), strict=False))
        over_text = list(
            zip(self.mixers[len(self.image_orders) :], map(layout.text_order, self.text_orders), strict=True)
        )
        return (over_image if layout.height else []) + (over_text if layout.text else [])


class Skip(nn.Module):
    """Long skip Linear([h, s]). Checkpoints up to width 512 hold one matrix, wider ones a matrix for each half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width <= 512:
            self.both = nn.Linear(2 * width, width)
            halves = self.both.weight.chunk(2, dim=1)
        else:
            self.stream, self.sent = nn.Linear(width, width), nn.Linear(width, width)
            halves = (self.stream.weight, self.sent.weight)
        nn.init.eye_(halves[0])  # a fresh model starts as if it had no skips
        nn.init.zeros_(halves[1])

    def forward(self, h: Tensor, sent: Tensor) -> Tensor:
        if hasattr(self, "both"):
            return self.both(torch.cat([h, sent], dim=-1))
        return self.stream(h) + self.sent(sent)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos(t f_j) | sin(t f_j)], f_j = 10000^(-j / (width/2)) -> [B,width], at least float32."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t.to(dtype)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def resize_position(learned: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of a square grid's positions: [1,n*n,E] -> [1,height*width,E]."""
    side = math.isqrt(learned.shape[1])
    grid = learned.unflatten(1, (side, side)).movedim(-1, 1)  # [1,E,n,n]
    return F.interpolate(grid, (height, width), mode="bilinear", align_corners=False).flatten(2).mT


def convolve(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """A channels-first convolution on a channels-last grid [B,h,w,E]."""
    return conv(image.movedim(-1, 1)).movedim(1, -1)


def join(prefix: Tensor, text: Tensor | None, middle: Tensor | None, grid: Tensor | None) -> Tensor:
    """The canonical sequence out of the segments that are there -> [B,L,...]."""
    parts = [prefix, text, middle, None if grid is None else grid.flatten(1, 2)]
    return torch.cat([part for part in parts if part is not None], dim=1)
