"""Which rows make up which batch, on every rank, in every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from datamodules.packing import PADDING_ROW

MEGABATCH = 50
"""Batches that are sorted by length together, so that a batch holds rows of like length."""


class TrainBatchSampler(Sampler[list[int]]):
    """Shuffled batches for training, the same for the same (seed, epoch).

    Global batches are formed alike on all ranks, and each rank takes every world_size-th row of
    them, so all ranks have equally many batches of the same size. Every row occurs in every epoch;
    the last batch is filled up with rows from the start of the epoch's own order.

    Args:
        lengths: Number of tokens of every row, [rows] int64; at least one row.
        batch_size: Rows in a batch of one rank.
        seed: Seed of the order.
        world_size: Number of ranks that train on different rows.
        rank: Index of this one.
        group_by_length: Whether batches hold rows of like length, which saves padding: the shuffled
            rows are cut into pieces of `MEGABATCH` batches, each piece is sorted by length, and the
            order of the batches is shuffled.
        reshuffle: Whether each epoch has an order of its own.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        group_by_length: bool = True,
        reshuffle: bool = True,
    ) -> None:
        self.lengths = lengths
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.group_by_length = group_by_length
        self.reshuffle = reshuffle
        self.global_batch_size = batch_size * world_size
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> TrainBatchSampler:
        """This object: Lightning calls `set_epoch` on a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches are drawn next.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this rank, from number `start` on."""
        for batch in self.global_batches()[self.start :]:
            yield batch[self.rank :: self.world_size].tolist()

    def global_batches(self) -> npt.NDArray[np.int64]:
        """Rows of all batches of the epoch, over all ranks, [batches, global batch] int64."""
        generator = np.random.default_rng([self.seed, self.epoch if self.reshuffle else 0])
        order = generator.permutation(len(self.lengths))
        order = np.resize(order, len(self) * self.global_batch_size)  # repeats from the start
        if not self.group_by_length:
            return order.reshape(len(self), self.global_batch_size)
        piece = MEGABATCH * self.global_batch_size
        pieces = [order[i : i + piece] for i in range(0, len(order), piece)]
        pieces = [p[np.argsort(-self.lengths[p], kind="stable")] for p in pieces]
        batches = np.concatenate(pieces).reshape(len(self), self.global_batch_size)
        return batches[generator.permutation(len(batches))]


class EvalBatchSampler(Sampler[list[int]]):
    """All rows in their order, once each, with the same batches on every rank but for the rows.

    With several ranks the last batch is filled up with fewer than world_size rows of index
    `PADDING_ROW`, so that ranks have batches of equal number and size while sums over supervised
    tokens stay exact.

    Args:
        rows: Number of rows.
        batch_size: Rows in a batch of one rank.
        world_size: Number of ranks that evaluate different rows.
        rank: Index of this one.
    """

    def __init__(self, rows: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        self.rows = rows
        self.world_size = world_size
        self.rank = rank
        self.global_batch_size = batch_size * world_size

    def __len__(self) -> int:
        return math.ceil(self.rows / self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        padded = math.ceil(self.rows / self.world_size) * self.world_size
        for start in range(0, self.rows, self.global_batch_size):
            stop = min(start + self.global_batch_size, padded)
            mine = range(start + self.rank, stop, self.world_size)
            yield [row if row < self.rows else PADDING_ROW for row in mine]
