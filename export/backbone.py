"""The network that DiM and MDM share, as graph nodes. Mirrors `reference/backbone.py`, with its numbered steps.

Here the stream stays in the order of the block that handled it last, so between two blocks stands one gather. A skip
joins two streams in the same order, because the orders of an alternating model are a palindrome.

Letters: B batch, L length of the whole sequence, T text tokens, h x w image grid, P pad tokens, E width, X mixers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdm.export.graph import Graph, Value
from mdm.export.layers import embedding, grid_conv, linear, rms_norm, silu, sinusoid
from mdm.export.mixers import mixer
from mdm.export.orders import Orders
from mdm.export.weights import Stored
from mdm.reference.config import Config


@dataclass(frozen=True)
class Segments:
    """What a graph's sequence holds: text of an open length, or a grid of fixed size, or both."""

    text: bool
    pictures: int  # stacked, each `side` patches high
    side: int
    position: Stored  # of time, class and one picture's grid
    keep: float = 1.0  # below 1 the graph takes a selection mask

    @property
    def height(self) -> int:
        return self.pictures * self.side

    @property
    def image_tokens(self) -> int:
        return self.height * self.side


@dataclass(frozen=True)
class Stream:
    """The tokens between two blocks: h [B,L,E] in scan order `order`."""

    h: Value
    order: int


class Backbone:
    """The network in one graph. `text` is the count of text tokens, an int64 scalar; None where there are none."""

    def __init__(self, g: Graph, config: Config, segments: Segments, text: Value | None) -> None:
        self.g, self.config, self.segments = g, config, segments
        image, _, spoken = config.scan_orders.partition("/")
        self.image_orders, self.text_orders = [int(o) for o in image], [int(o) for o in spoken]
        self.prefix = 2 + config.pad
        pad = config.pad if segments.pictures else 0
        self.height, self.width = segments.height + pad, (segments.side if segments.pictures else 0) + pad
        self.cells = self.height * self.width
        self.orders = Orders(g, self.prefix, text, self.height, self.width)
        self.head_orders = Orders(g, self.prefix, text, 0, 0)  # of the text-only mixers: prefix and text
        self._masks: dict[tuple[int, bool], Value] = {}

    def __call__(
        self, text: Value | None, image: Value | None, t: Value, y: Value, mask: Value | None
    ) -> tuple[Value | None, Value | None]:
        """text [B,T,E], image [B,h,w,E], t [B], y [B], mask [B,T + h*w] -> text and image again, for the output."""
        g = self.g
        with g.scope("backbone"):
            modulation, condition, tokens = self.steering(t, y)

            # 2. Positions; the local convolution before the first block; pads at row and column ends.
            stream = g.dtype("stream")
            batch = g.dim(t, 0)
            prefix = g.concat(1, tokens + self.position(0, 2), self.expand(g.weight("sep", stream), batch, 1, 1))
            parts = [prefix]
            if text is not None:
                ends = g.dim(text, 1)
                learned = g.op("Slice", g.weight("text_position", stream), g.ints(0), ends, g.ints(1))
                parts.append(text + learned)
            if text is not None and image is not None:
                parts.append(self.expand(g.weight("middle_sep", stream), batch, 1, 1))
            if image is not None:
                image = image + self.grid_position()
                grid = self.pad_grid(grid_conv(g, image, "conv_in"), batch)  # [B,h+P,w+P,E]
                parts.append(g.reshape(grid, 0, self.cells, self.config.width))

            # 3. The blocks.
            now = Stream(g.concat(1, *parts), 1)  # [B,L,E]
            full_mask = None if mask is None else self.full_mask(mask, batch)
            skips: list[Value] = []
            for index in range(self.config.blocks):
                with g.scope("blocks", index):
                    skip = skips.pop() if index >= self.config.skip_from else None
                    now = self.block(index, now, modulation, skip, full_mask)
                if 1 <= index < self.config.skip_from:
                    skips.append(now.h)
            h = self.orders.gather(now.h, now.order, 1)

            # 4. Back to segments; crop the pads; the local convolution after the last block.
            spoken = None
            if text is not None:
                end = -(self.cells + 1) if self.cells else None
                spoken = self.modulate_out(g.slice(h, 1, self.prefix, end), g.unsqueeze(condition, 1))
            shown = None
            if image is not None:
                grid = g.reshape(g.slice(h, 1, -self.cells), 0, self.height, self.width, self.config.width)
                grid = g.slice(g.slice(grid, 1, 0, self.segments.height), 2, 0, self.segments.side)
                shown = self.modulate_out(grid_conv(g, grid, "conv_out"), g.unsqueeze(condition, 1, 2))
            return spoken, shown

    def steering(self, t: Value, y: Value) -> tuple[Value, Value, Value]:
        """1. Modulation for all blocks [B,3,E]: shift, 1 + scale, 1 + gate; the raw sum of time and class token
        [B,E]; both tokens [B,2,E]."""
        g, E = self.g, self.config.width
        t = g.cast(t, g.dtype("time"))
        time = linear(g, silu(linear(g, sinusoid(g, t, 256), "time_in", "time")), "time_out", "time")
        steer = linear(g, silu(time + embedding(g, y, "class_embed", "time")), "modulation", "time")
        ones = g.constant(np.array([0, 1, 1], dtype=np.float32)[:, None], steer.dtype)
        modulation = g.reshape(steer, 0, 3, E) + ones
        time_token, class_token = sinusoid(g, t, E), embedding(g, y, "class_token", "time")
        tokens = g.concat(1, g.unsqueeze(time_token, 1), g.unsqueeze(class_token, 1))
        return modulation, time_token + class_token, tokens

    def block(self, index: int, now: Stream, modulation: Value, skip: Value | None, mask: Value | None) -> Stream:
        """skip -> scan order -> adaLN -> mixers -> gated residual."""
        g, stream = self.g, self.g.dtype("stream")
        h = now.h if skip is None else self.merge(now.h, skip)
        parallel = self.config.scan == "parallel"
        order = 1 if parallel else self.order_of(index)
        h = self.orders.gather(h, now.order, order)
        steer = g.weight("modulation", stream) + g.cast(modulation, stream)  # [B,3,E]
        shift, scale, gate = g.split(steer, [1, 1, 1], axis=1)  # [B,1,E] each
        normed = g.cast(rms_norm(g, h, "norm"), stream)
        with g.scope("modulate"):
            u = normed * scale + shift
        if parallel:
            update = self.all_orders(u, mask)
        else:
            with g.scope("mixers", 0):
                update = g.cast(mixer(g, self.config, u, self.mask_in(mask, order)), stream)
        with g.scope("residual"):
            return Stream(h + gate * update, order)

    def order_of(self, index: int) -> int:
        """An alternating model's order: up the cycle in the first half, down it in the second, first at both ends."""
        orders = self.image_orders if self.cells else self.text_orders
        turn = self.config.skip_from - 1
        return orders[(index if index <= turn else 2 * turn - index) % len(orders)]

    def merge(self, h: Value, sent: Value) -> Value:
        """The long skip: one matrix over both streams up to width 512, beyond it a matrix for each."""
        g, stream = self.g, self.g.dtype("stream")
        with g.scope("skip"):
            if self.config.width <= 512:
                return g.cast(linear(g, g.concat(-1, h, sent), "both", "skip"), stream)
            return g.cast(linear(g, h, "stream", "skip"), stream) + g.cast(linear(g, sent, "sent", "skip"), stream)

    def all_orders(self, u: Value, mask: Value | None) -> Value:
        """A parallel block: the mean over the mixers that see a token. Over text alone there are two of six."""
        g, stream = self.g, self.g.dtype("stream")
        over_image = self.image_orders if self.cells else []
        over_text = self.text_orders if self.segments.text else []
        whole = self.total(u, over_image, 0, self.orders, mask, False) if over_image else None
        if not over_text:
            return g.cast(whole, stream) / len(over_image) if whole is not None else u
        head = u if whole is None else g.slice(u, 1, 0, -(self.cells + 1))  # prefix and text
        spoken = self.total(head, over_text, len(self.image_orders), self.head_orders, mask, True)
        if whole is None:
            return spoken / len(over_text)
        behind = g.slice(whole, 1, -(self.cells + 1)) / len(over_image)
        ahead = (g.slice(whole, 1, 0, -(self.cells + 1)) + spoken) / (len(over_image) + len(over_text))
        return g.concat(1, ahead, behind)

    def total(self, u: Value, numbers: list[int], first: int, orders: Orders, mask: Value | None, head: bool) -> Value:
        """The sum of the mixers `first`, `first` + 1, ..., one for each order."""
        g, stream = self.g, self.g.dtype("stream")
        total: Value | None = None
        for place, order in enumerate(numbers):
            with g.scope("mixers", first + place):
                y = mixer(g, self.config, orders.gather(u, 1, order), self.mask_in(mask, order, head))
                y = g.cast(orders.gather(y, order, 1), stream)
            total = y if total is None else total + y
        assert total is not None
        return total

    # ------------------------------------------------------------------------------------------ the two ends

    def position(self, start: int, end: int) -> Value:
        """Rows of the learned positions, [time, class, grid], of this graph's picture size."""
        stored = self.segments.position.rows(start, end)
        return self.g.cast(self.g.stored_value(stored), self.g.dtype("stream"))

    def grid_position(self) -> Value:
        """[1,h,w,E]; pictures stacked one above the other each get the same positions."""
        g, side = self.g, self.segments.side
        grid = g.reshape(self.position(2, 2 + side * side), 1, side, side, self.config.width)
        return g.concat(1, *[grid] * self.segments.pictures)

    def pad_grid(self, image: Value, batch: Value) -> Value:
        """Append P pad tokens to every row and P rows at the bottom: [B,h,w,E] -> [B,h+P,w+P,E]."""
        g, P, stream = self.g, self.config.pad, self.g.dtype("stream")
        pad = g.transpose(g.weight("pad", stream), 0, 2, 1)  # [1,P,E]
        right = self.expand(g.unsqueeze(pad, 1), batch, self.segments.height, 1, 1)  # [B,h,P,E]
        cells = np.arange(P * self.width)
        which = cells % P if self.config.padding == "rho" else cells // self.width
        bottom = g.op("Gather", pad, g.constant(which.reshape(P, self.width), "int64"), axis=1)  # [1,P,w+P,E]
        return g.concat(1, g.concat(2, g.cast(image, stream), right), self.expand(bottom, batch, 1, 1, 1))

    def expand(self, value: Value, batch: Value, *rest: int) -> Value:
        """[1,...] -> [B,...], and the other axes to `rest`, where 1 leaves one as it is."""
        return self.g.op("Expand", value, self.g.concat(0, batch, self.g.ints(*rest)))

    def full_mask(self, mask: Value, batch: Value) -> Value:
        """Selection over the whole sequence: prefix, separators and pads are always selected -> [B,L]."""
        g, segments, P = self.g, self.segments, self.config.pad
        one = g.constant(np.ones((1, 1)), mask.dtype)

        def ones(count: int) -> Value:
            return self.expand(one, batch, count)

        parts = [ones(self.prefix)]
        if segments.text:
            parts.append(g.slice(mask, 1, 0, -segments.image_tokens) if segments.pictures else mask)
        if segments.text and segments.pictures:
            parts.append(ones(1))
        if segments.pictures:
            grid = g.reshape(g.slice(mask, 1, -segments.image_tokens), 0, segments.height, segments.side)
            padded = g.op("Pad", grid, g.ints(0, 0, 0, 0, P, P), g.constant(1.0, mask.dtype))
            parts.append(g.reshape(padded, 0, self.cells))
        return g.concat(1, *parts)

    def mask_in(self, mask: Value | None, order: int, head: bool = False) -> Value | None:
        """The mask in scan order, once for all blocks of that order; `head`: of prefix and text alone."""
        if mask is None:
            return None
        if (order, head) not in self._masks:
            with self.g.scope("masks", root=True):
                if head and self.cells:
                    mask = self.g.slice(mask, 1, 0, -(self.cells + 1))
                self._masks[order, head] = (self.head_orders if head else self.orders).gather(mask, 1, order)
        return self._masks[order, head]

    def modulate_out(self, x: Value, condition: Value) -> Value:
        g, E = self.g, self.config.width
        shift, scale = g.split(linear(g, silu(condition), "modulation_out", "ends"), [E, E])
        return g.cast(rms_norm(g, x, "norm_out"), shift.dtype) * (scale + 1.0) + shift
