"""Several examples in one row, and the view of a split as rows of one or more documents."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from datamodules.encoding import Document, TokenRows

PADDING_ROW = -1
"""Index of a row that only evens out the batches of several ranks: nothing in it is supervised."""


def pack(lengths: npt.NDArray[np.int64], max_length: int, seed: int) -> list[list[int]]:
    """Puts examples together so that few rows of at most max_length tokens hold them all.

    Best fit, longest example first: each goes into the fullest row that still has room. Equal
    lengths are taken in an order that depends on the seed alone, so the result is the same on every
    machine and rank. Rows are formed once; training shuffles them anew each epoch.

    Args:
        lengths: Number of tokens of every example, [examples] int64, none above max_length.
        max_length: Room in a row.
        seed: Order of examples of equal length.

    Returns:
        For every packed row, the indices of its examples.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> rows with that much room
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            target, room = len(bins), max_length
            bins.append([])
        else:
            room = rooms[at]
            target = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        bins[target].append(index)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(target)
    return bins


class DocumentRows(Dataset[list[Document]]):
    """Rows of a split, each a list of documents: one, or several if packed.

    Args:
        rows: Token ids of all examples; at least one.
        bins: For every packed row, the indices of its examples; None for one example a row.
    """

    def __init__(self, rows: TokenRows, bins: list[list[int]] | None = None) -> None:
        self.rows = rows
        self.bins = bins

    def __len__(self) -> int:
        return len(self.rows) if self.bins is None else len(self.bins)

    def __getitem__(self, index: int) -> list[Document]:
        """Documents of a row; for `PADDING_ROW` those of the first row, not supervised."""
        if index == PADDING_ROW:
            return [(tokens, np.zeros_like(mask)) for tokens, mask in self[0]]
        return [self.rows[i] for i in ([index] if self.bins is None else self.bins[index])]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of every row, [rows] int64."""
        if self.bins is None:
            return self.rows.lengths
        return np.array([self.rows.lengths[members].sum() for members in self.bins], dtype=np.int64)
