"""Which rows make up which batch: determinism, ranks, padding, length grouping."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from datamodules.packing import PADDING_ROW
from datamodules.sampling import EvalBatchSampler, TrainBatchSampler

LENGTHS = np.random.default_rng(0).integers(10, 500, 1003)


def batches(epoch: int = 0, **options: int | bool) -> list[list[int]]:
    settings = {"batch_size": 4, "seed": 0, **options}
    sampler = TrainBatchSampler(LENGTHS, **settings)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    result = list(sampler)
    assert len(result) == len(sampler)
    return result


@pytest.mark.parametrize("grouped", [True, False])
def test_order_depends_on_seed_and_epoch_alone(grouped: bool) -> None:
    first = batches(group_by_length=grouped)
    assert first == batches(group_by_length=grouped)
    assert first != batches(epoch=1, group_by_length=grouped)
    assert first != batches(seed=1, group_by_length=grouped)
    assert first == batches(epoch=5, group_by_length=grouped, reshuffle=False)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_comes_and_all_batches_are_full(grouped: bool, world_size: int) -> None:
    ranks = [
        batches(rank=rank, world_size=world_size, group_by_length=grouped)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) == 4 for rank in ranks for batch in rank)
    rows = list(chain.from_iterable(chain.from_iterable(ranks)))
    assert set(rows) == set(range(1003))
    assert len(rows) - 1003 < 4 * world_size  # only the last batch is filled up


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    """Two ranks of 4 rows train on the batches of one rank of 8."""
    one = batches(batch_size=8)
    two = [batches(batch_size=4, world_size=2, rank=rank) for rank in range(2)]
    assert [set(b) for b in one] == [set(a) | set(b) for a, b in zip(*two, strict=True)]


def test_fewer_rows_than_a_batch() -> None:
    sampler = TrainBatchSampler(np.array([3, 4, 5]), batch_size=4, seed=0, world_size=2, rank=1)
    assert len(sampler) == 1 and [len(b) for b in sampler] == [4]


def test_grouping_by_length_saves_padding() -> None:
    def padding(result: list[list[int]]) -> float:
        widths = [LENGTHS[batch].max() * len(batch) for batch in result]
        return 1 - sum(LENGTHS[batch].sum() for batch in result) / sum(widths)

    assert padding(batches(group_by_length=False)) > 0.3
    assert padding(batches(group_by_length=True)) < 0.06
    longest = [LENGTHS[batch].max() for batch in batches()]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # batches are shuffled


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_row_once(rows: int, world_size: int) -> None:
    ranks = [list(EvalBatchSampler(rows, 4, world_size, rank)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(EvalBatchSampler(rows, 4, world_size))}
    for step in zip(*ranks, strict=True):
        assert len({len(batch) for batch in step}) == 1 and step[0]
    seen = list(chain.from_iterable(chain.from_iterable(ranks)))
    assert sorted(row for row in seen if row != PADDING_ROW) == list(range(rows))
    assert seen.count(PADDING_ROW) < world_size


def test_evaluation_order_is_that_of_the_data() -> None:
    assert list(EvalBatchSampler(5, 2)) == [[0, 1], [2, 3], [4]]
