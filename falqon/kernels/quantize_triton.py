"""Triton kernels of `Quantize`: per token in one pass, per tensor in two, delayed in one.

Traffic: per token each value is read once and its code written once, the row stays on chip (rows
of more than `LONGEST_ROW` values are read twice). Per tensor the amax needs a read of its own. With
a scale that is known (delayed scaling) one pass casts, notes the amax and counts what overflows.
Amaxes are maxima of integers, so that any order of reduction gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.fp8 import Format
from falqon.kernels.devices import LONGEST_ROW, has_fp8_units, on_device
from falqon.kernels.triton_fp8 import encode, magnitude_bits, scale_of, widen
from falqon.recipe import Granularity, ScaleRounding

TILE = 4096  # values of a per-tensor program at a time
SIDE = 64  # of a square tile, where codes are written transposed as well
PARTS = 1024  # most partial amaxes of a tensor


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x,  # [count, features], any floating dtype and strides
    codes,  # uint8 [count, features], contiguous
    scale,  # float32 [count]
    count,
    features,
    row_stride,
    column_stride,
    FORMAT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,  # a row is one block
):
    """Per-token quantisation of ROWS rows; see `fp8.quantize`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    start = row[:, None] * row_stride
    if ONCE:
        inside = (row < count)[:, None] & (column < features)[None, :]
        at = start + column[None, :].to(tl.int64) * column_stride
        values = widen(tl.load(x + at, mask=inside, other=0.0))
        factor = scale_of(tl.max(magnitude_bits(values), axis=1), FORMAT, POWER_OF_TWO)
        out = encode(values * factor[:, None], FORMAT, HARDWARE)
        tl.store(codes + row[:, None] * features + column[None, :], out, mask=inside)
    else:
        largest = tl.zeros((ROWS, BLOCK), tl.int32)
        for first in tl.range(0, features, BLOCK):
            inside = (row < count)[:, None] & (first + column < features)[None, :]
            at = start + (first + column)[None, :].to(tl.int64) * column_stride
            values = widen(tl.load(x + at, mask=inside, other=0.0))
            largest = tl.maximum(largest, magnitude_bits(values))
        factor = scale_of(tl.max(largest, axis=1), FORMAT, POWER_OF_TWO)
        for first in tl.range(0, features, BLOCK):
            inside = (row < count)[:, None] & (first + column < features)[None, :]
            at = start + (first + column)[None, :].to(tl.int64) * column_stride
            values = widen(tl.load(x + at, mask=inside, other=0.0))
            out = encode(values * factor[:, None], FORMAT, HARDWARE)
            at_code = row[:, None] * features + (first + column)[None, :]
            tl.store(codes + at_code, out, mask=inside)
    tl.store(scale + row, factor, mask=row < count)


@triton.jit  # type: ignore[untyped-decorator]
def amax_kernel(  # type: ignore[no-untyped-def]
    x,
    parts,  # int32 [programs], bits of the largest magnitude that each has seen
    count,
    features,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Largest magnitudes of a tensor, one for each program."""
    across = tl.cdiv(features, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, ROWS) * across, tl.num_programs(0)):
        row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < features)[None, :]
        at = row[:, None] * row_stride + column[None, :] * column_stride
        values = widen(tl.load(x + at, mask=inside, other=0.0))
        largest = tl.maximum(largest, magnitude_bits(values))
    tl.store(parts + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def cast_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,  # uint8 [count, features], contiguous
    transposed,  # uint8 [features, count], contiguous, or anything without TRANSPOSED
    scale,  # float32 [1]: given with OBSERVE, else written
    parts,  # int32 [PARTS]: partial amaxes; with OBSERVE written, one for each program
    overflowed,  # int32 [programs], with OBSERVE: values beyond the scale
    count,
    features,
    row_stride,
    column_stride,
    number,  # of parts to read
    FORMAT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GIVEN: tl.constexpr,  # the scale is given
    OBSERVE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cast with one scale for the tensor."""
    if GIVEN:
        factor = tl.load(scale)
    else:
        part = tl.arange(0, PARTS)
        bits = tl.load(parts + part, mask=part < number, other=0)
        factor = scale_of(tl.max(bits, axis=0), FORMAT, POWER_OF_TWO)
        tl.store(scale, factor, mask=tl.program_id(0) == 0)
    across = tl.cdiv(features, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    beyond = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, ROWS) * across, tl.num_programs(0)):
        row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < features)[None, :]
        at = row[:, None] * row_stride + column[None, :] * column_stride
        values = widen(tl.load(x + at, mask=inside, other=0.0))
        out = encode(values * factor, FORMAT, HARDWARE)
        tl.store(codes + row[:, None] * features + column[None, :], out, mask=inside)
        if TRANSPOSED:
            at_other = column[:, None] * count + row[None, :]
            tl.store(transposed + at_other, tl.trans(out), mask=tl.trans(inside))
        if OBSERVE:
            largest = tl.maximum(largest, magnitude_bits(values))
            # The margin is that of the reference: x * scale may round up to the limit.
            limit: tl.constexpr = 448.0 if FORMAT == 4 else 57344.0
            beyond += (tl.abs(values) > limit * (1 + 2.0**-20) / factor).to(tl.int32)
    if OBSERVE:
        tl.store(parts + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))
        tl.store(overflowed + tl.program_id(0), tl.sum(tl.sum(beyond, axis=1), axis=0))


def row_blocks(features: int) -> dict[str, Any]:
    """Tile of `quantize_rows_kernel`: whole rows, several if they are short."""
    block = min(triton.next_power_of_2(max(features, 16)), LONGEST_ROW)
    rows = max(1, 2048 // block)
    warps = min(16, max(4, block // 1024))
    return {"ROWS": rows, "BLOCK": block, "ONCE": features <= block, "num_warps": warps}


def tile_blocks(features: int, transposed: bool) -> dict[str, Any]:
    """Tile of the per-tensor kernels: long rows to read, or a square to turn."""
    if transposed:
        return {"ROWS": SIDE, "COLUMNS": SIDE, "num_warps": 4}
    columns = min(1024, triton.next_power_of_2(max(features, 16)))
    return {"ROWS": TILE // columns, "COLUMNS": columns, "num_warps": 4}


def quantize_triton(
    x: Tensor,
    fmt: Format,
    granularity: Granularity,
    rounding: ScaleRounding,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`fp8.quantize` by kernels, with the scale of the tensor at hand.

    Args:
        x: [T, n], floating, any strides.
        fmt: target format.
        granularity: one scale for the tensor or one a row.
        rounding: of the scale.
        transposed: give the codes in [n, T] as well; per-tensor only.

    Returns:
        codes uint8 [T, n]; scale float32 [1] or [T, 1]; codes uint8 [n, T] or None.
    """
    count, features = x.shape
    codes = torch.empty(count, features, dtype=torch.uint8, device=x.device)
    other = torch.empty(features, count, dtype=torch.uint8, device=x.device) if transposed else None
    sizes = (count, features, x.stride(0), x.stride(1))
    options = {
        "FORMAT": 4 if fmt.name == "e4m3" else 5,
        "POWER_OF_TWO": rounding == "power_of_two",
        "HARDWARE": has_fp8_units(x.device),
    }
    per_token = granularity == "per_token"
    shape = (count, 1) if per_token else (1,)
    if x.numel() == 0:
        return codes, torch.ones(shape, device=x.device), other
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        if per_token:
            blocks = row_blocks(features)
            grid = (triton.cdiv(count, blocks["ROWS"]),)
            quantize_rows_kernel[grid](x, codes, scale, *sizes, **options, **blocks)
            return codes, scale, None
        blocks = tile_blocks(features, False)
        number = min(PARTS, _tiles(x, blocks))
        parts = torch.empty(number, dtype=torch.int32, device=x.device)
        amax_kernel[(number,)](x, parts, *sizes, **blocks)
        blocks = tile_blocks(features, transposed)
        cast_kernel[(_tiles(x, blocks),)](
            x,
            codes,
            codes if other is None else other,
            scale,
            parts,
            parts,
            *sizes,
            number,
            **options,
            TRANSPOSED=transposed,
            GIVEN=False,
            OBSERVE=False,
            PARTS=PARTS,
            **blocks,
        )
    return codes, scale, other


def quantize_delayed_triton(
    x: Tensor, fmt: Format, scale: Tensor, observe: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast with a known scale, in one pass.

    Args:
        x: [T, n], floating, any strides.
        fmt: target format.
        scale: float32 [1].
        observe: give the amax and the number of values that saturate as well.

    Returns:
        codes uint8 [T, n]; amax float32 [1] and count int64 scalar, or None.
    """
    count, features = x.shape
    codes = torch.empty(count, features, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        nothing = torch.zeros(1, device=x.device)
        return codes, *((nothing, nothing[0].long()) if observe else (None, None))
    blocks = tile_blocks(features, False)
    number = min(PARTS, _tiles(x, blocks))
    seen = torch.empty(2, number if observe else 1, dtype=torch.int32, device=x.device)
    with on_device(x.device):
        cast_kernel[(number,)](
            x,
            codes,
            codes,
            scale,
            seen[0],
            seen[1],
            count,
            features,
            x.stride(0),
            x.stride(1),
            0,
            FORMAT=4 if fmt.name == "e4m3" else 5,
            POWER_OF_TWO=True,
            HARDWARE=has_fp8_units(x.device),
            TRANSPOSED=False,
            GIVEN=True,
            OBSERVE=observe,
            PARTS=1,
            **blocks,
        )
    if not observe:
        return codes, None, None
    amax = seen[0].max().reshape(1).view(torch.float32)
    return codes, amax, seen[1].sum()


def _tiles(x: Tensor, blocks: dict[str, Any]) -> int:
    count, features = x.shape
    return triton.cdiv(count, blocks["ROWS"]) * triton.cdiv(features, blocks["COLUMNS"])
