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


def unpack6(packed: Tensor) -> Tensor:
    """Inverse of `pack6`."""
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    codes = [x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2]
    return torch.stack(codes, -1).flatten(-2)
