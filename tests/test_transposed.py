"""Transposed copies of codes are kept as long as they are right."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from falqon.kernels import transposed
from falqon.kernels.backbone_matmul import FEW_TOKENS, reads_row_major


def codes(rows: int, seed: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (rows, 5), generator=generator).to(torch.uint8)
    return nn.Parameter(values, requires_grad=False)


class Group:
    """Two layers with two rows of A each, and how often their copy was made."""

    def __init__(self) -> None:
        self.codes = [codes(6, 1), codes(8, 2)]
        self.made = 0

    def turn(self) -> Tensor:
        self.made += 1
        return torch.cat([c[:-2] for c in self.codes]).t().contiguous()

    def kept(self) -> Tensor:
        return transposed.kept(self.codes, [4, 6], self.turn)


def test_made_once_until_codes_are_written() -> None:
    group = Group()
    first = group.kept()
    assert group.kept() is first and group.made == 1
    group.codes[1][0] = 3
    second = group.kept()
    assert group.made == 2 and second[0, 4] == 3
    assert group.kept() is second


def test_a_writer_keeps_it_in_step() -> None:
    group = Group()
    buffer = group.kept()
    for layer, start in ((0, 0), (1, 4)):
        target = group.codes[layer]
        view = transposed.view_of(target)
        assert view is not None
        assert torch.equal(view, target[:-2].t())
        assert view.data_ptr() == buffer[:, start:].data_ptr()
        target[1] = 7
        view[:, 1] = 7
        transposed.written(target)
    assert group.kept() is buffer and group.made == 1
    assert torch.equal(buffer, group.turn())


def test_a_writer_who_found_none_makes_none_valid() -> None:
    group = Group()
    group.kept()
    target = group.codes[0]
    target[0] = 1  # somebody else
    assert transposed.view_of(target) is None
    target[1] = 2
    transposed.written(target)
    assert transposed.view_of(target) is None
    transposed.written(codes(3, 5))  # never seen
    assert group.kept()[0, 0] == 1 and group.made == 2


def test_other_memory_or_another_group_is_another_copy() -> None:
    group = Group()
    group.kept()
    group.codes[0].data = group.codes[0].data.clone()
    group.kept()
    assert group.made == 2
    alone = transposed.kept(group.codes[:1], [4], lambda: group.codes[0][:-2].t().contiguous())
    assert alone.shape == (5, 4)
    assert group.kept().shape == (5, 10) and group.made == 3


def test_a_copy_dies_with_its_codes() -> None:
    group = Group()
    copy = weakref.ref(group.kept())
    assert copy() is not None
    del group
    gc.collect()
    assert copy() is None


@pytest.mark.parametrize(
    ("capability", "tokens", "cuts", "keep", "as_it_lies"),
    [
        (100, 8192, (4096, 5120), False, True),
        (100, 8192, (4096, 5120), True, True),
        (100, 8192, (100,), False, False),
        (103, 8192, (), False, True),
        (90, FEW_TOKENS, (), False, True),
        (90, FEW_TOKENS, (), True, False),
        (90, FEW_TOKENS + 1, (), False, False),
        (89, 8192, (), False, False),
        (120, 1, (128,), False, True),
        (0, 1, (128, 256, 384), False, False),
    ],
)
def test_when_codes_are_read_as_they_lie(
    capability: int, tokens: int, cuts: tuple[int, ...], keep: bool, as_it_lies: bool
) -> None:
    assert reads_row_major(capability, tokens, cuts, keep) is as_it_lies
