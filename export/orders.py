"""Scan orders as index vectors: one gather takes the stream from one order to another.

Over the body of a sequence, [text | sep | grid]: 1 as it stands, 3 with the grid column by column, 2 and 4 the same
two read backwards. The prefix stays in front. Where the text's length is open the vectors are computed in the graph,
by the same lines of code: numbers and arrays there, values of the graph here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mdm.export.graph import Graph, Value

Index = Any  # numpy array or Value: int64 [n]


class Orders:
    """`text` is the count of text tokens, an int64 scalar of the graph; None where there are none."""

    def __init__(self, g: Graph, prefix: int, text: Value | None, height: int, width: int) -> None:
        self.g, self.prefix, self.text, self.height, self.width = g, prefix, text, height, width
        self._transitions: dict[tuple[int, int], Value] = {}

    def gather(self, x: Value, start: int, to: int) -> Value:
        """x [B,L,...] in order `start` -> in order `to`."""
        if start == to:
            return x
        if (start, to) not in self._transitions:
            with self.g.scope("orders", f"{start}_to_{to}", root=True):
                self._transitions[start, to] = self._transition(start, to)
        return self.g.op("Gather", x, self._transitions[start, to], name="reorder", axis=1)

    def _transition(self, start: int, to: int) -> Value:
        """Where each token of order `to` stands in order `start`: from `to` back to canonical, and on to `start`."""
        backwards, by_column = (start % 2 == 0, to % 2 == 0), (start > 2, to > 2)
        index = self._identity
        if by_column[0] == by_column[1]:
            if backwards[0] != backwards[1]:  # twice backwards is forwards
                index = self._reversed(index)
        else:
            index = self._reversed(index) if backwards[1] else index
            index = self._columns[index] if by_column[1] else self._rows[index]
            index = self._reversed(index) if backwards[0] else index
        index = index + self.prefix
        front = np.arange(self.prefix)
        if isinstance(index, Value):
            return self.g.concat(0, self.g.constant(front, "int64"), index)
        return self.g.constant(np.concatenate([front, index]), "int64")

    def _reversed(self, index: Index) -> Index:
        return self._length - 1 - index

    @cached_property
    def _length(self) -> Any:
        """Tokens of the body."""
        cells = self.height * self.width
        if self.text is None:
            return cells
        return self.text + (cells + 1 if cells else 0)

    @cached_property
    def _identity(self) -> Index:
        if self.text is None:
            return np.arange(self._length)
        return self._range(self._length)

    @cached_property
    def _columns(self) -> Index:
        return self._behind_text(np.arange(self.height * self.width).reshape(self.height, self.width).T.flatten())

    @cached_property
    def _rows(self) -> Index:
        """The way back from columns."""
        return self._behind_text(np.arange(self.height * self.width).reshape(self.width, self.height).T.flatten())

    def _behind_text(self, grid: np.ndarray) -> Index:
        if self.text is None:
            return grid
        ahead = self.text + 1  # text and separator
        return self.g.concat(0, self._range(ahead), self.g.constant(grid, "int64") + ahead)

    def _range(self, end: Value) -> Value:
        g = self.g
        return g.op("Range", g.constant(0, "int64"), end, g.constant(1, "int64"))
