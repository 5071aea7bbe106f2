"""Triton kernel that turns backbone codes [out, in] into [in, out] for the backward matmul."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.kernels.devices import on_device

SIDE = 128  # of a tile: whole memory sectors are read and written
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def transpose_kernel(  # type: ignore[no-untyped-def]
    codes,  # uint8 [lines, features]
    turned,  # uint8 [features, count]
    count,  # backbone rows
    features,
    cut_first,  # backbone rows after which rank rows of A follow; beyond count if none do
    cut_second,
    rank,
    SIDE: tl.constexpr,
):
    """Turn one tile; rows of A between the backbones of a group are left out."""
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    line = row + tl.where(row >= cut_first, rank, 0) + tl.where(row >= cut_second, rank, 0)
    inside = (row < count)[:, None] & (column < features)[None, :]
    at = line.to(tl.int64)[:, None] * features + column[None, :]
    tile = tl.load(codes + at, mask=inside, other=0)
    at = column.to(tl.int64)[:, None] * count + row[None, :]
    tl.store(turned + at, tl.trans(tile), mask=tl.trans(inside))


def transpose_triton(codes: Tensor, count: int, cuts: tuple[int, ...], rank: int) -> Tensor:
    """Backbone rows of stacked codes, transposed: reads and writes each byte once.

    Args:
        codes: uint8 [backbone rows and rows of A, in], contiguous.
        count: number of backbone rows.
        cuts: backbone rows after which `rank` rows of A follow, but for the last; at most two.
        rank: r.

    Returns:
        uint8 [in, count].
    """
    if len(cuts) > 2:
        raise ValueError(f"at most two cuts, got {len(cuts)}")
    features = codes.shape[1]
    turned = torch.empty(features, count, dtype=torch.uint8, device=codes.device)
    far = 2**31 - 1
    first, second = (*cuts, far, far)[:2]
    grid = (triton.cdiv(features, SIDE), triton.cdiv(count, SIDE))
    if turned.numel():
        with on_device(codes.device):
            transpose_kernel[grid](
                codes, turned, count, features, first, second, rank, SIDE=SIDE, num_warps=WARPS
            )
    return turned
