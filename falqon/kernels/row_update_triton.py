"""Triton kernel of `row_update`: one pass over the written rows.

Reads each written row's codes once (and its origin), the rows of A once a block of columns, and
writes the codes. What is counted leaves as one line a program, added up in a fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.kernels.triton_fp8 import decode_e4m3, encode_e4m3, encode_e4m3_stochastic

BLOCK_ROWS = 16  # the smallest that a matmul tile takes
BLOCK_COLUMNS = 64
CHUNK = 16  # columns of B at a time
WARPS = 4
STAGES = 1  # more would keep more of A in registers than there are


@triton.jit(do_not_specialize=["count", "step", "layer", "seed"])  # type: ignore[untyped-decorator]
def row_update_kernel(  # type: ignore[no-untyped-def]
    codes,  # uint8 [out + r, features], written in place
    scale,  # float32 [1]
    rows,  # int64 [count], or anything without HAS_ROWS
    change,  # float32 [count, rank], B[K]
    total,  # float32 [count, rank], what is added to the origin; B[K] itself without one
    origin,  # uint8 or floating [count, features], or anything with ORIGIN 0
    remainder,  # float32 [count, features], or anything without REMAINDER
    turned,  # uint8 [features, out] with turned_stride, written too, or anything without TURNED
    counted,  # int64 [programs, 4]: rows, codes, flipped, saturated
    summed,  # float32 [programs, 2]: landed x wanted, wanted x wanted, in units of codes
    count,
    out,
    features,
    rank,
    turned_stride,
    limit,
    step,
    layer,
    seed,
    HAS_ROWS: tl.constexpr,
    ORIGIN: tl.constexpr,  # 0: the codes themselves, 1: codes, 2: values
    STOCHASTIC: tl.constexpr,
    REMAINDER: tl.constexpr,
    TURNED: tl.constexpr,
    RANK: tl.constexpr,  # rank rounded up to a power of two of at least 16
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of rows by a block of columns; see `row_update` for what it computes."""
    # Columns run fastest: programs next to each other share rows of B.
    block = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, RANK)
    is_row, is_column = k < count, n < features
    row = tl.load(rows + k, mask=is_row, other=0) if HAS_ROWS else k.to(tl.int64)

    whole = is_row[:, None] & (j[None, :] < rank)
    row_of_b = tl.load(change + k[:, None] * rank + j[None, :], mask=whole, other=0.0)
    size = tl.sum(tl.abs(row_of_b), axis=1)  # NaN and infinity fail the comparison
    keep = is_row & (size < limit) & (size > 0)
    inside = keep[:, None] & is_column[None, :]

    # A chunk of the rank at a time; at once, the operands would not fit into registers.
    wanted = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    derived = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    c = tl.arange(0, CHUNK)
    for start in tl.range(0, rank, CHUNK):
        in_rank = start + c < rank
        in_a = in_rank[:, None] & is_column[None, :]
        at_a = (out + start + c).to(tl.int64)[:, None] * features + n[None, :]
        a = decode_e4m3(tl.load(codes + at_a, mask=in_a, other=0).to(tl.int32))
        in_b = keep[:, None] & in_rank[None, :]
        at_b = k[:, None] * rank + start + c[None, :]
        b = tl.load(change + at_b, mask=in_b, other=0.0)
        wanted = tl.dot(b, a, wanted, input_precision="ieee")
        if ORIGIN != 0:
            t = tl.load(total + at_b, mask=in_b, other=0.0)
            derived = tl.dot(t, a, derived, input_precision="ieee")

    at = row[:, None] * features + n[None, :]
    old = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    before = decode_e4m3(old)
    if ORIGIN == 0:
        target = before + wanted
    else:
        at_origin = k.to(tl.int64)[:, None] * features + n[None, :]
        values = tl.load(origin + at_origin, mask=inside, other=0)
        if ORIGIN == 1:
            target = decode_e4m3(values.to(tl.int32)) + derived
        else:
            target = values.to(tl.float32) * tl.load(scale) + derived

    if STOCHASTIC:
        column = (n[None, :] + tl.zeros_like(row[:, None])).to(tl.uint32)
        number = (row[:, None] + tl.zeros_like(n[None, :])).to(tl.uint32)
        zero = tl.zeros_like(column)
        random, _, _, _ = tl.philox(
            seed, column, number, zero + step.to(tl.uint32), zero + layer.to(tl.uint32)
        )
        new = encode_e4m3_stochastic(target, random)
    else:
        new = encode_e4m3(target)
    tl.store(codes + at, new.to(tl.uint8), mask=inside)
    if TURNED:
        at_turned = n.to(tl.int64)[:, None] * turned_stride + row[None, :]
        tl.store(turned + at_turned, tl.trans(new).to(tl.uint8), mask=tl.trans(inside))

    after = decode_e4m3(new)
    if REMAINDER:
        at_rest = k.to(tl.int64)[:, None] * features + n[None, :]
        tl.store(remainder + at_rest, target - after, mask=inside)
    landed = tl.where(inside, after - before, 0.0)
    wanted = tl.where(inside, wanted, 0.0)
    flipped = inside & (new != old)
    saturated = inside & ((new & 0x7F) == 0x7E)
    line = block * tl.num_programs(0) + tl.program_id(0)
    kept = tl.sum(keep.to(tl.int32), axis=0)
    columns = tl.sum(is_column.to(tl.int32), axis=0)
    first = (tl.program_id(0) == 0).to(tl.int32)
    tl.store(counted + 4 * line, (kept * first).to(tl.int64))
    tl.store(counted + 4 * line + 1, (kept * columns).to(tl.int64))
    tl.store(counted + 4 * line + 2, tl.sum(tl.sum(flipped.to(tl.int32), 1), 0).to(tl.int64))
    tl.store(counted + 4 * line + 3, tl.sum(tl.sum(saturated.to(tl.int32), 1), 0).to(tl.int64))
    tl.store(summed + 2 * line, tl.sum(tl.sum(landed * wanted, axis=1), axis=0))
    tl.store(summed + 2 * line + 1, tl.sum(tl.sum(wanted * wanted, axis=1), axis=0))


def launch_row_update(
    codes: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    proxy: Tensor,
    limit: float,
    counter: tuple[int, int, int] | None,
    origin: Tensor | None,
    total: Tensor | None,
    remainder: bool,
    transposed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the kernel; arguments as of `falqon.kernels.row_update.row_update`.

    Args:
        codes: uint8 [out + r, in], contiguous, written in place.
        scale: float32 [1].
        rows: int64 [k] or None for all.
        proxy: float32 [k, r].
        limit: rows whose B has an L1 norm of this or more (or of zero) are left alone.
        counter: seed, step and layer for stochastic rounding; None rounds to nearest.
        origin: uint8 or floating [k, in], or None.
        total: float32 [k, r] to add to the origin, or None.
        remainder: ask for what rounding left, in units of codes.
        transposed: a copy of the backbone codes, uint8 [in, out] with stride 1 along out, to be
            kept in step; None if there is none.

    Returns:
        int64 [4] (rows, codes, flipped, saturated), float64 [2] (landed x wanted, wanted x wanted,
        in units of codes), and float32 [k, in] (zero in rows that were not written) or None.
    """
    count, rank = proxy.shape
    features = codes.shape[1]
    if count == 0 or features == 0:
        nothing = torch.zeros(4, dtype=torch.int64, device=codes.device)
        rest = torch.zeros(count, features, device=codes.device) if remainder else None
        return nothing, nothing[:2].double(), rest
    grid = (triton.cdiv(features, BLOCK_COLUMNS), triton.cdiv(count, BLOCK_ROWS))
    counted = torch.zeros(grid[0] * grid[1], 4, dtype=torch.int64, device=codes.device)
    summed = torch.zeros(grid[0] * grid[1], 2, dtype=torch.float32, device=codes.device)
    rest = torch.zeros(count, features, device=codes.device) if remainder else None
    seed, step, layer = counter or (0, 0, 0)
    proxy = proxy.contiguous()
    on_device = torch.cuda.device(codes.device) if codes.is_cuda else nullcontext()
    with on_device:
        row_update_kernel[grid](
            codes,
            scale,
            proxy if rows is None else rows,
            proxy,
            proxy if total is None else total.contiguous(),
            proxy if origin is None else origin.contiguous(),
            proxy if rest is None else rest,
            codes if transposed is None else transposed,
            counted,
            summed,
            count,
            codes.shape[0] - rank,
            features,
            rank,
            0 if transposed is None else transposed.stride(0),
            limit,
            step,
            layer,
            seed,
            HAS_ROWS=rows is not None,
            ORIGIN=0 if origin is None else (1 if origin.dtype == torch.uint8 else 2),
            STOCHASTIC=counter is not None,
            REMAINDER=remainder,
            TURNED=transposed is not None,
            RANK=max(16, triton.next_power_of_2(rank)),
            CHUNK=CHUNK,
            BLOCK_K=BLOCK_ROWS,
            BLOCK_N=BLOCK_COLUMNS,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
    return counted.sum(dim=0), summed.sum(dim=0, dtype=torch.float64), rest
