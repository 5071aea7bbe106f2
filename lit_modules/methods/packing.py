"""Codes of less than a byte, packed along the last dimension; the inverse gives back every bit."""

from __future__ import annotations

import torch
from torch import Tensor


def pack4(codes: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte, the first in the low half: uint8 [..., n] to [..., n / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """Inverse of `pack4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack6(codes: Tensor) -> Tensor:
    """Four codes of 6 bits to three bytes, little end first: uint8 [..., n] to [..., 3 n / 4]."""
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], -1).flatten(-2)


def pairs6(packed: Tensor) -> Tensor:
    """Two packed codes of 6 bits as one number: uint8 [..., 3 n / 4] to int32 [..., n / 2]."""
    x, y, z = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([x | ((y & 15) << 8), (y >> 4) | (z << 4)], -1).flatten(-2)


def pair_table(values: Tensor) -> Tensor:
    """Values of two codes for each pair of them, [n * n, 2]: one look-up serves two weights.

    Args:
        values: of each code, [n]; n a power of two, the first code in the low bits.
    """
    count = len(values)
    pairs = torch.arange(count * count, device=values.device)
    return torch.stack([values[pairs % count], values[pairs // count]], dim=1)


def look_up(table: Tensor, pairs: Tensor) -> Tensor:
    """Values of pairs of codes, [..., 2 n] in the dtype of the table, for [..., n]."""
    # As one integer a pair: index_select is then several times faster than indexing.
    whole = table.view(torch.int32 if table.itemsize == 2 else torch.int64).flatten()
    values = torch.index_select(whole, 0, pairs.flatten().to(torch.int32))
    return values.view(table.dtype).view(*pairs.shape[:-1], -1)
