"""Triton kernel of the two FP8 matmuls: forward through [W; A], backward through W.

`left [T, K] x right^T`, both with K running fastest ("K-major"), as FP8 tensor cores want them; the
backward takes a transposed copy of the weight, or with ROW_MAJOR the weight as it lies. Persistent
programs walk over tiles; sums are float32; scales and bias are applied at the end, once. The
columns of the result are cut into segments (backbone, then A, of each member of a group), and no
tile lies across a cut: each is stored where it belongs, without a copy.

K is added up in steps of as many values as the architecture, not the tile, decides, from the first
to the last, and never split over programs: the configuration that a device likes best changes the
time, not the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.kernels.devices import architecture, has_fp8_units, on_device, processors
from falqon.kernels.scaled_matmul import ADAPTER, MEMBERS, Segment, is_thin
from falqon.kernels.triton_fp8 import decode_half, round_to, widen

WITH_ADAPTERS, ADAPTERS_ALONE, ONTO = 0, 1, 2
"""Results with those of A; those of A only; without A, added to what is there already. A tile that
is best for one need not be for another."""
ALIGNMENT = 16
"""Bytes; rows of operands that tensor descriptors load must be multiples of it."""


@triton.jit  # type: ignore[untyped-decorator]
def matmul_kernel(  # type: ignore[no-untyped-def]
    left,  # [count, depth], FP8 or uint8
    right,  # FP8 or uint8: [lines, depth], with ROW_MAJOR [lines, width]
    left_scale,  # float32 [1] or [count]
    right_scale,  # float32 [members], with PER_ROW [lines]
    bias,  # of all members one behind the other, or anything without HAS_BIAS
    out_first,  # [count, rows of its segment]
    out_second,  # the same for a second member, or anything
    out_third,
    adapter,  # [count, adapter_columns], or anything if no segment goes there
    segments,  # int32 [SEGMENTS, 4], see `scaled_matmul.Segment`; 3 is ADAPTER
    count,
    depth,
    lines,
    width,
    adapter_columns,
    cut_first,  # ROW_MAJOR: rows of W after which rank rows of A follow, multiples of BLOCK_K;
    cut_second,  # beyond depth if none do
    rank,
    bucket,  # count rounded up to a power of two: what the configuration is chosen by
    FORMAT: tl.constexpr,  # of left: 4 or 5
    PER_TOKEN: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PART: tl.constexpr,  # WITH_ADAPTERS, ADAPTERS_ALONE or ONTO
    ROW_MAJOR: tl.constexpr,
    NATIVE: tl.constexpr,  # operands are FP8; otherwise bytes that are multiplied as float16
    DESCRIPTORS: tl.constexpr,
    WHOLE: tl.constexpr,  # depth is a multiple of BLOCK_K
    ALIGNED: tl.constexpr,  # all that segments say are multiples of 16
    ARCH: tl.constexpr,  # compute capability
    SEGMENTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scaled matmul; see `falqon.kernels.melded_matmul` and `backbone_matmul`."""
    down = tl.cdiv(count, BLOCK_M)
    across = 0
    for s in tl.static_range(SEGMENTS):
        across += tl.cdiv(tl.load(segments + 4 * s + 1), BLOCK_N)
    if DESCRIPTORS:
        left_tiles = tl.make_tensor_descriptor(left, [count, depth], [depth, 1], [BLOCK_M, BLOCK_K])
        if ROW_MAJOR:
            right_tiles = tl.make_tensor_descriptor(
                right, [lines, width], [width, 1], [BLOCK_K, BLOCK_N]
            )
        else:
            right_tiles = tl.make_tensor_descriptor(
                right, [lines, depth], [depth, 1], [BLOCK_N, BLOCK_K]
            )
    LEFT: tl.constexpr = "e4m3" if FORMAT == 4 else "e5m2"
    left_ones = tl.full((BLOCK_M, BLOCK_K // 32), 127, tl.uint8)  # powers of two: 2^0
    right_ones = tl.full((BLOCK_N, BLOCK_K // 32), 127, tl.uint8)
    UNROLL: tl.constexpr = 2 if ARCH == 89 and not ROW_MAJOR else 1
    # Tiles that run together share columns of the result: rows of left run fastest.
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=DESCRIPTORS):
        panel = tile // down
        start, size, column, to, member, before = 0, 0, 0, 0, 0, 0
        whole, bias_at, biased = 0, 0, 0
        for s in tl.static_range(SEGMENTS):
            length = tl.load(segments + 4 * s + 1)
            tiles = tl.cdiv(length, BLOCK_N)
            here = (panel >= before) & (panel < before + tiles)
            skip = (panel - before) * BLOCK_N
            start = tl.where(here, tl.load(segments + 4 * s) + skip, start)
            size = tl.where(here, length - skip, size)
            column = tl.where(here, tl.load(segments + 4 * s + 2) + skip, column)
            result_number = tl.load(segments + 4 * s + 3)
            to = tl.where(here, result_number, to)
            member = tl.where(here, s // 2, member)
            whole = tl.where(here, length, whole)
            bias_at = tl.where(here, biased + skip, bias_at)
            biased += tl.where(result_number == 3, 0, length)
            before += tiles
        if ALIGNED:  # tells the compiler, so that it loads and stores 16 bytes at a time
            start, size, column = start // 16 * 16, size // 16 * 16, column // 16 * 16
            whole, bias_at = whole // 16 * 16, bias_at // 16 * 16
        first = (tile % down) * BLOCK_M
        row, n, k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        # Rows beyond the end are the last one again, and are not stored: loads need no mask for it.
        left_at = left + tl.minimum(row, count - 1).to(tl.int64)[:, None] * depth + k[None, :]
        from_row = (start + tl.minimum(n, size - 1)).to(tl.int64)
        if ROW_MAJOR:
            right_at = right + k.to(tl.int64)[:, None] * width + (start + n)[None, :]
        else:
            right_at = right + from_row[None, :] * depth + k[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # On Ada, Triton would carry single bytes from turn to turn; not with two dots a turn.
        for at in tl.range(0, depth, BLOCK_K, loop_unroll_factor=UNROLL):
            below = tl.where(at >= cut_first, rank, 0) + tl.where(at >= cut_second, rank, 0)
            if DESCRIPTORS:
                a = left_tiles.load([first, at])
                if ROW_MAJOR:
                    b = right_tiles.load([at + below, start])
                else:
                    b = right_tiles.load([start, at]).T
            else:
                right_now = right_at + ((at + below).to(tl.int64) * width if ROW_MAJOR else at)
                if WHOLE:
                    a = tl.load(left_at + at)
                else:
                    a = tl.load(left_at + at, mask=(at + k < depth)[None, :], other=0.0)
                if WHOLE and ROW_MAJOR:
                    b = tl.load(right_now, mask=(n < size)[None, :], other=0.0)
                elif ROW_MAJOR:
                    inside = (at + k < depth)[:, None] & (n < size)[None, :]
                    b = tl.load(right_now, mask=inside, other=0.0)
                elif WHOLE:
                    b = tl.load(right_now)
                else:
                    b = tl.load(right_now, mask=(at + k < depth)[:, None], other=0.0)
            if not NATIVE:
                sums = tl.dot(decode_half(a, FORMAT), decode_half(b, 4), sums)
            elif ARCH == 120:  # its plain FP8 instruction runs at half the rate of the scaled one
                sums = tl.dot_scaled(a, left_ones, LEFT, b, right_ones, "e4m3", sums)
            elif ARCH == 90:
                sums = tl.dot(a, b, sums, max_num_imprecise_acc=BLOCK_K)
            else:
                sums = tl.dot(a, b, sums)

        if PER_TOKEN:
            unit = tl.load(left_scale + row, mask=row < count, other=1.0)[:, None]
        else:
            unit = tl.load(left_scale)
        if PER_ROW:
            other = tl.load(right_scale + start + n, mask=n < size, other=1.0)[None, :]
        else:
            other = tl.load(right_scale + member)
        result = sums * tl.div_rn(1.0, unit * other)
        inside = (row < count)[:, None] & (n < size)[None, :]
        token = row.to(tl.int64)[:, None]
        result_at = tl.where(to == 1, out_second, out_first)
        result_at = tl.where(to == 2, out_third, result_at)
        result_at = tl.where(to == 3, adapter, result_at)
        stride = tl.where(to == 3, adapter_columns, whole)
        result_at = result_at + token * stride + (column + n)[None, :]
        if PART == 2:
            result += widen(tl.load(result_at, mask=inside, other=0.0))
        if HAS_BIAS:
            with_bias = tl.where(to == 3, 0, size)  # rows of A have none
            given = tl.load(bias + bias_at + n, mask=n < with_bias, other=0.0)
            result = round_to(result, out_first.dtype.element_ty) + widen(given)[None, :]
        result = round_to(result, out_first.dtype.element_ty).to(out_first.dtype.element_ty)
        tl.store(result_at, result, mask=inside)


def configurations(
    arch: int,
    row_major: bool = False,
    segments: int = 1,
    aligned: bool = True,
    onto: bool = False,
) -> list[triton.Config]:
    """Tiles to choose from on an architecture (0: without FP8 units, 16-bit operands on chip).

    Square tiles load least for what they compute, for many tokens; flat ones leave fewer processors
    idle, for few. BLOCK_K is one cache line, on Hopper also how many products its tensor cores sum
    in less than float32; half of it where shared memory is small. No configuration spills
    registers; docs/kernels.md has the table.
    """
    square, flat = {"BLOCK_M": 128, "BLOCK_N": 128}, {"BLOCK_M": 64, "BLOCK_N": 128}
    wide = {"BLOCK_M": 128, "BLOCK_N": 256}
    block = 128 if arch in (90, 100) else 64
    if not aligned:
        chosen = [(flat, 4, 3), (flat, 4, 4)]
    elif arch == 100:
        fits = segments <= 2 and not onto  # in registers
        chosen = [(square, 8, 3), (flat, 4, 4)] + ([(wide, 8, 3)] if fits else [])
    elif arch in (89, 90, 120) and not row_major:
        chosen = [(square, 8, 3), (square, 8, 4), (flat, 4, 4)]
    else:
        chosen = [(square, 8, 3), (flat, 8, 3)]
    return [
        triton.Config({**tile, "BLOCK_K": block}, num_warps=w, num_stages=s)
        for tile, w, s in chosen
    ]


def _for_device(
    configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any
) -> list[triton.Config]:
    return configurations(
        kwargs["ARCH"],
        kwargs["ROW_MAJOR"],
        kwargs["SEGMENTS"],
        kwargs["ALIGNED"],
        kwargs["PART"] == ONTO,
    )


tuned_matmul_kernel = triton.autotune(
    configurations(0),
    # Everything that decides which program is compiled, and the device, is in the key: one process
    # may drive several kinds. Tokens enter as a power of two, lest every length be timed anew.
    key=[
        "bucket",
        "depth",
        "lines",
        "width",
        "PART",
        "ROW_MAJOR",
        "DESCRIPTORS",
        "ALIGNED",
        "SEGMENTS",
        "ARCH",
        "PROGRAMS",
    ],
    restore_value=["out_first", "out_second", "out_third"],  # with ONTO each run adds
    prune_configs_by={"early_config_prune": _for_device},
    cache_results=True,
)(matmul_kernel)


@lru_cache(maxsize=1024)
def _segments(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32, device=device)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def matmul_triton(
    left: Tensor,
    left_scale: Tensor,
    fmt: str,
    right: Tensor,
    right_scale: Tensor,
    segments: tuple[Segment, ...],
    dtype: torch.dtype,
    bias: Tensor | None = None,
    cuts: tuple[int, ...] | None = None,
    rank: int = 0,
    onto: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Run the kernel.

    Args:
        left: uint8 codes [T, K], contiguous.
        left_scale: float32 [1] or [T, 1].
        fmt: of `left`, `e4m3` or `e5m2`.
        right: uint8 E4M3 codes, contiguous: [rows, K], or with `cuts` [K and rows of A, columns].
        right_scale: float32 [members], two segments each; or one for each row, [rows] (columns,
            with `cuts`).
        segments: which rows of `right` (columns, with `cuts`) become which columns of which result;
            one for each of at most three members, in their order, and rows of A between.
        dtype: of the results.
        bias: of all members one behind the other, or None.
        cuts: `right` is row-major; after so many of its backbone rows, multiples of 128, `rank`
            rows of A follow, which take no part. At most two come before the last backbone row.
        rank: r.
        onto: [T, rows of its segment] of `dtype` for each member, contiguous, which results are
            added to before they are rounded, in place; segments of A are empty then.

    Returns:
        [T, rows of its segment] for each member, and [T, rows of A of all of them].
    """
    if len(segments) > 2 * MEMBERS:
        raise ValueError(f"at most {MEMBERS} layers at a time, got {len(segments) // 2}")
    count, depth = left.shape
    columns = [s[1] for s in segments if s[3] != ADAPTER]
    columns.append(sum(s[1] for s in segments if s[3] == ADAPTER))
    empty = [torch.empty(count, n, dtype=dtype, device=left.device) for n in columns]
    outs, adapter = (empty[:-1] if onto is None else list(onto)), empty[-1]
    if count == 0:
        return outs, adapter
    native = has_fp8_units(left.device)
    arch = architecture(left.device) if native else 0
    row_major = cuts is not None
    inner = [c for c in cuts or () if c < depth]
    far = 2**31 - 1
    first, second = (*inner, far, far)[:2]
    if native:
        kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[fmt]
        left, right = left.view(kind), right.view(torch.float8_e4m3fn)
    aligned = all(x.shape[1] % ALIGNMENT == 0 and x.data_ptr() % 16 == 0 for x in (left, right))
    block = configurations(arch)[0].kwargs["BLOCK_K"]
    regular = all(n % 16 == 0 for s in segments for n in s[:3])
    descriptors = native and arch >= 90 and aligned and regular
    if descriptors:
        triton.set_allocator(_allocate)
    programs = processors(left.device)
    members = -(-len(segments) // 2)
    part = ADAPTERS_ALONE if is_thin(segments) else WITH_ADAPTERS
    part = part if onto is None else ONTO
    kernel: Any = tuned_matmul_kernel
    tile: dict[str, Any] = {}
    if not left.is_cuda:  # Triton's interpreter, which cannot measure
        kernel, tile = (
            matmul_kernel,
            configurations(arch, row_major, len(segments), regular)[-1].kwargs,
        )
    with on_device(left.device):
        kernel[(programs,)](
            left,
            right,
            left_scale,
            right_scale,
            adapter if bias is None else bias,
            *(outs + [adapter] * MEMBERS)[:MEMBERS],
            adapter,
            _segments(segments, left.device),
            count,
            depth,
            right.shape[0],
            right.shape[1],
            columns[-1],
            first,
            second,
            rank,
            triton.next_power_of_2(count),
            FORMAT=4 if fmt == "e4m3" else 5,
            PER_TOKEN=left_scale.numel() > 1,
            PER_ROW=right_scale.numel() > members,
            HAS_BIAS=bias is not None,
            PART=part,
            ROW_MAJOR=row_major,
            NATIVE=native,
            DESCRIPTORS=descriptors,
            WHOLE=depth % block == 0,
            ALIGNED=regular,
            ARCH=arch,
            SEGMENTS=len(segments),
            PROGRAMS=programs,
            **tile,
        )
    return outs, adapter
