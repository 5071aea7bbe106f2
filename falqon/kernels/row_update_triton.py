"""Triton kernel of `row_update`: one pass over the written rows of a layer, or of a group.

Reads each written row's codes once (and its origin), the rows of A once a block of columns, and
writes the codes. What is counted leaves as one line a program, added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.kernels.devices import on_device
from falqon.kernels.operands import stacked
from falqon.kernels.triton_fp8 import decode_e4m3, encode_e4m3, encode_e4m3_stochastic

if TYPE_CHECKING:
    from falqon.kernels.row_update import RowWrite

BLOCK_ROWS = 16  # the smallest that a matmul tile takes
BLOCK_COLUMNS = 64
CHUNK = 16  # columns of B at a time
WARPS = 4
STAGES = 1  # more would keep more of A in registers than there are


@triton.jit(do_not_specialize=["step", "seed"])  # type: ignore[untyped-decorator]
def row_update_kernel(  # type: ignore[no-untyped-def]
    codes,  # uint8 [rows of all members, features], written in place
    scale,  # float32 [members]
    rows,  # int64 [count], within their member, or anything without HAS_ROWS
    change,  # float32 [count, rank], B[K] of one member after the other
    total,  # float32 [count, rank], what is added to the origin; B[K] itself without one
    origin,  # uint8 or floating [count, features], or anything with ORIGIN 0
    remainder,  # float32 [count, features], or anything without REMAINDER
    turned,  # uint8 [features, backbone rows] with turned_stride, or anything without TURNED
    blocks,  # int32 [blocks, 8], see `_blocks`
    counted,  # int64 [programs, 4]: rows, codes, flipped, saturated
    summed,  # float32 [programs, 2]: landed x wanted, wanted x wanted, in units of codes
    features,
    rank,
    turned_stride,
    limit,
    step,
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
    about = blocks + 8 * block
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j, c = tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    k = tl.load(about) + c
    is_row, is_column = c < tl.load(about + 1), n < features
    if HAS_ROWS:
        number = tl.load(rows + k, mask=is_row, other=0)  # within the layer
    else:
        number = (tl.load(about + 2) + c).to(tl.int64)
    row = tl.load(about + 3) + number  # of the codes
    first_of_a = tl.load(about + 4)
    unit = tl.load(scale + tl.load(about + 5))

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
        at_a = (first_of_a + start + c).to(tl.int64)[:, None] * features + n[None, :]
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
            target = values.to(tl.float32) * unit + derived

    if STOCHASTIC:
        column = (n[None, :] + tl.zeros_like(row[:, None])).to(tl.uint32)
        line = (number[:, None] + tl.zeros_like(n[None, :])).to(tl.uint32)
        zero = tl.zeros_like(column)
        layer = tl.load(about + 6).to(tl.uint32)
        random, _, _, _ = tl.philox(seed, column, line, zero + step.to(tl.uint32), zero + layer)
        new = encode_e4m3_stochastic(target, random)
    else:
        new = encode_e4m3(target)
    tl.store(codes + at, new.to(tl.uint8), mask=inside)
    if TURNED:
        at_turned = n.to(tl.int64)[:, None] * turned_stride + tl.load(about + 7) + number[None, :]
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


class Written(NamedTuple):
    """What a launch did for one layer.

    Attributes:
        counted: int64 [4]: rows, codes, flipped, saturated.
        summed: float64 [2]: landed x wanted, wanted x wanted, in units of codes.
        rest: what rounding left, in units of codes, float32 [k, in] (zero in rows that were not
            written), or None if nobody asked.
    """

    counted: Tensor
    summed: Tensor
    rest: Tensor | None


@lru_cache(maxsize=4096)
def _blocks(
    members: tuple[tuple[int, int, int, int], ...], rank: int, device: torch.device
) -> Tensor:
    """Blocks of rows of all members, none across two: int32 [blocks, 8].

    First of the given rows, number of rows, the same within the layer, first row of the layer's
    codes, of its A, the layer's number in the group, in the model, and its first column in the
    transposed codes.

    Args:
        members: rows to write, backbone rows, number in the model, column in the transposed codes.
        rank: r.
        device: of the result.
    """
    lines, given, start = [], 0, 0
    for member, (count, out, layer, column) in enumerate(members):
        for first in range(0, count, BLOCK_ROWS):
            number = min(BLOCK_ROWS, count - first)
            where = (given + first, number, first, start, start + out)
            lines.append((*where, member, layer, column))
        given, start = given + count, start + out + rank
    return torch.tensor(lines, dtype=torch.int32, device=device).reshape(-1, 8)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return (there[0].contiguous() if len(there) == 1 else torch.cat(there)) if there else None


def launch_row_updates(
    writes: Sequence[RowWrite],
    limit: float,
    counter: tuple[int, int] | None,
    transposed: Sequence[Tensor | None],
) -> list[Written]:
    """Run the kernel once for layers whose codes lie one behind the other.

    Args:
        writes: uint8 codes of equal rank and features; rows, origins and the wish for a remainder
            given for all of them or for none, origins of one dtype. Codes are written in place.
        limit: rows whose B has an L1 norm of this or more (or of zero) are left alone.
        counter: seed and step for stochastic rounding; None rounds to nearest.
        transposed: copies of the backbone codes, uint8 [in, out] with stride 1 along out, parts of
            one tensor, to be kept in step; None for all of them if there are none.

    Returns:
        What was done, for each of the layers.
    """
    first = writes[0]
    rank, features = first.proxy.shape[1], first.codes.shape[1]
    device, codes = first.codes.device, stacked([w.codes for w in writes])
    change = _joined([w.proxy for w in writes])
    assert change is not None
    rows = _joined([w.rows for w in writes])
    origin = _joined([None if w.origin is None else w.origin.values for w in writes])
    total = _joined([None if w.origin is None else w.origin.total for w in writes])
    wanted = first.gram_inverse is not None
    rest = torch.zeros(len(change), features, device=device) if wanted else None
    turned = transposed[0]
    columns = [0 if t is None or turned is None else _apart(turned, t) for t in transposed]
    members = tuple(
        (len(w.proxy), len(w.codes) - rank, w.layer, column)
        for w, column in zip(writes, columns, strict=True)
    )
    blocks = _blocks(members, rank, device)
    across = triton.cdiv(features, BLOCK_COLUMNS)
    counted = torch.zeros(len(blocks) * across, 4, dtype=torch.int64, device=device)
    summed = torch.zeros(len(blocks) * across, 2, dtype=torch.float32, device=device)
    seed, step = counter or (0, 0)
    if len(counted):
        with on_device(device):
            row_update_kernel[across, len(blocks)](
                codes,
                _joined([w.scale for w in writes]),
                change if rows is None else rows,
                change,
                change if total is None else total,
                change if origin is None else origin,
                change if rest is None else rest,
                codes if turned is None else turned,
                blocks,
                counted,
                summed,
                features,
                rank,
                0 if turned is None else turned.stride(0),
                limit,
                step,
                seed,
                HAS_ROWS=rows is not None,
                ORIGIN=0 if origin is None else (1 if origin.dtype == torch.uint8 else 2),
                STOCHASTIC=counter is not None,
                REMAINDER=wanted,
                TURNED=turned is not None,
                RANK=max(16, triton.next_power_of_2(rank)),
                CHUNK=CHUNK,
                BLOCK_K=BLOCK_ROWS,
                BLOCK_N=BLOCK_COLUMNS,
                num_warps=WARPS,
                num_stages=STAGES,
                enable_fp_fusion=False,
            )
    lines = [triton.cdiv(count, BLOCK_ROWS) * across for count, *_ in members]
    counts = [part.sum(dim=0) for part in counted.split(lines)]
    sums = [part.sum(dim=0, dtype=torch.float64) for part in summed.split(lines)]
    rests = [None] * len(writes) if rest is None else rest.split([len(w.proxy) for w in writes])
    return [Written(*each) for each in zip(counts, sums, rests, strict=True)]


def _apart(first: Tensor, other: Tensor) -> int:
    """Columns between two parts of one tensor of bytes."""
    return other.data_ptr() - first.data_ptr()
