"""What changed between two matrices of codes, as two streams of bytes: where, and by how much.

How much is the difference of the bytes modulo 256. Since neighbouring FP8 values have neighbouring
codes it is +1 or -1 nearly always; adding it makes the new bytes, subtracting it the old ones.
Where is the number of unchanged codes (or rows) before each changed one: a byte, after one of 255
for every 255 of them. Both streams are compressed with Zstandard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import zstandard
from torch import Tensor

By = Literal["codes", "rows"]
_LEVEL = 3  # what is left are bytes without order, which higher levels only search longer
_ESCAPE = 255


@dataclass(frozen=True)
class Change:
    """A change of one layer, compressed.

    Attributes:
        by: whether single `codes` are listed, or whole `rows` with at least one changed code.
        places, differences: the two streams.
        codes: changed codes.
        rows: rows that have any.
    """

    by: By
    places: bytes
    differences: bytes
    codes: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Of both streams."""
        return len(self.places) + len(self.differences)


def encode(before: Tensor, after: Tensor) -> Change:
    """Compress a change, by codes or by rows, whichever is smaller.

    Args:
        before, after: uint8 [out, in], on the CPU.
    """
    difference = after - before  # of uint8: modulo 256
    changed = difference != 0
    positions = changed.view(-1).nonzero()[:, 0]
    rows = changed.any(dim=1).nonzero()[:, 0]
    counts = (len(positions), len(rows))
    by_code = Change(
        "codes", _pack(_gaps(positions)), _pack(difference.view(-1)[positions].numpy()), *counts
    )
    by_row = Change("rows", _pack(_gaps(rows)), _pack(difference[rows].numpy()), *counts)
    return min(by_code, by_row, key=lambda change: change.nbytes)


@torch.no_grad()
def apply(codes: Tensor, change: Change, undo: bool = False) -> None:
    """Put a change into codes, in place.

    Args:
        codes: uint8 [out, in], contiguous, on any device.
        change: made against these codes; with `undo`, put into them before.
        undo: take it out again.

    Raises:
        ValueError: the streams do not fit the codes.
    """
    by_code = change.by == "codes"
    limit, width = (codes.numel(), 1) if by_code else codes.shape
    places = _places(_unpack(change.places, limit + limit // _ESCAPE + 1))
    differences = _unpack(change.differences, codes.numel())
    if len(differences) != len(places) * width or (len(places) and places[-1] >= limit):
        raise ValueError("the change does not fit the codes")
    # Laid out in full and added: less work than looking up every changed code on its own.
    amount = np.zeros((limit, width), dtype=np.uint8)
    amount[places] = differences.reshape(-1, width)
    full = torch.from_numpy(amount).view(codes.shape).to(codes.device)
    codes.copy_(codes - full if undo else codes + full)


def _gaps(places: Tensor) -> np.ndarray:
    """Unchanged ones before each place, int64 ascending, as bytes with escapes."""
    gaps = np.diff(places.numpy(), prepend=-1) - 1
    escapes = gaps // _ESCAPE
    stream = np.full(int(escapes.sum()) + len(gaps), _ESCAPE, dtype=np.uint8)
    stream[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return stream


def _places(stream: np.ndarray) -> np.ndarray:
    """What `_gaps` was given."""
    is_place = stream != _ESCAPE
    steps = stream.astype(np.int64)  # an escape has passed 255,
    steps += is_place  # a place itself as well
    places: np.ndarray = np.cumsum(steps, out=steps)[is_place]
    places -= 1
    return places


def _pack(stream: np.ndarray) -> bytes:
    # Without a checksum of its own: the file has one.
    return zstandard.ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(stream).data)


def _unpack(data: bytes, limit: int) -> np.ndarray:
    """Raises ValueError for what is no stream, or is longer than can be."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > limit:
            raise ValueError(f"a stream of {size} bytes is too long")
        stream = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"a stream cannot be decompressed: {error}") from error
    return np.frombuffer(stream, dtype=np.uint8).copy()
