"""Scan orders: in which order a block's mixer visits the tokens (MDM Fig. 2e-g, DiM facts 1.4).

Over the padded image grid: 1 row by row, 2 its reverse, 3 column by column, 4 its reverse. Over the text: 1 forward,
2 reverse. Over both: odd orders read the text, the separator, then the grid; even orders read exactly backwards.
The prefix (time, class, separators) stays in front in every order.

A sequence in canonical layout is  [prefix | text | sep | grid]; without text or without a picture the segment and
the separator between are absent. An order is the permutation that turns the canonical layout into scan order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Token counts of one sequence; the grid's height and width include its pads."""

    prefix: int
    text: int
    height: int
    width: int

    @property
    def sep(self) -> int:
        return 1 if self.text and self.height else 0

    @property
    def head(self) -> int:
        """Tokens of prefix and text, the part that a text-only mixer sees."""
        return self.prefix + self.text

    @property
    def length(self) -> int:
        return self.head + self.sep + self.height * self.width

    def joint_order(self, order: int) -> Tensor:
        """The order 1-4 over everything present -> int64 [L]."""
        prefix = torch.arange(self.prefix)
        body = torch.arange(self.prefix, self.head + self.sep)  # text, separator
        grid = torch.arange(self.head + self.sep, self.length).view(self.height, self.width)
        if order in (3, 4):
            grid = grid.T
        body = torch.cat([body, grid.flatten()])
        return torch.cat([prefix, body.flip(0) if order in (2, 4) else body])

    def text_order(self, order: int) -> Tensor:
        """The order 1 or 2 over prefix and text alone -> int64 [prefix + text]."""
        text = torch.arange(self.prefix, self.head)
        return torch.cat([torch.arange(self.prefix), text.flip(0) if order == 2 else text])


def palindrome(block: int, blocks: int, orders: int) -> int:
    """Index of the order that block `block` of an alternating model uses.

    Up the cycle in the first half, down it in the second, 0 at both ends: then a skip joins two blocks whose streams
    are in the same order.
    """
    middle = 1 + (blocks - 1) // 2
    if block == blocks - 1:
        return 0
    return block % orders if block < middle else (2 * middle - 2 - block) % orders
