"""Transposed copies of backbone codes that are kept from one backward pass to the next.

A copy belongs to the codes it was made from, for as long as these live, and counts as long as they
have not been written since (by autograd's version counter). Who writes codes and copy both, as the
row update on a GPU does, says so. Nothing here is saved or sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy(NamedTuple):
    """Where a layer's transposed codes are.

    Attributes:
        buffer: uint8 [in, sum of out_i] of the layer's group.
        start, end: its columns.
        version: of the codes when they were last equal.
        place: address of the codes then.
    """

    buffer: Tensor
    start: int
    end: int
    version: int
    place: int


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _current(codes: Tensor) -> _Copy | None:
    copy: _Copy | None = _COPIES.get(codes)
    if copy is None or (copy.version, copy.place) != (codes._version, codes.data_ptr()):
        return None
    return copy


def kept(codes: Sequence[Tensor], counts: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
    """The transposed backbone of a group: the kept one, or a new one, which is then kept.

    Args:
        codes: merged weights, uint8 [out_i + r, in].
        counts: out_i.
        make: gives uint8 [in, sum of out_i].

    Returns:
        uint8 [in, sum of out_i].
    """
    found = [_current(c) for c in codes]
    buffer = None if found[0] is None else found[0].buffer
    same = all(copy is not None and copy.buffer is buffer for copy in found)
    if buffer is not None and same and buffer.shape[1] == sum(counts):
        return buffer
    buffer, start = make(), 0
    for each, count in zip(codes, counts, strict=True):
        _COPIES[each] = _Copy(buffer, start, start + count, each._version, each.data_ptr())
        start += count
    return buffer


def view_of(codes: Tensor) -> Tensor | None:
    """A layer's part of the kept copy, uint8 [in, out], for who is going to write it; or None."""
    copy = _current(codes)
    return None if copy is None else copy.buffer[:, copy.start : copy.end]


def written(codes: Tensor) -> None:
    """Codes and what `view_of` gave were written once since, and are equal."""
    copy: _Copy | None = _COPIES.get(codes)
    if copy is not None and copy.version == codes._version - 1:
        _COPIES[codes] = copy._replace(version=codes._version)
