"""FP8 matmul with scales on a GPU: Triton's kernel or the vendor's `torch._scaled_mm`.

What the melded and the backbone matmul run on a CUDA device; on others plain torch does
(`falqon.kernels.operands`). Which of the two is the faster depends on the GPU and on the shape, so
it is measured, see `falqon.kernels.backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from falqon.kernels import backend
from falqon.kernels.devices import has_fp8_units

if TYPE_CHECKING:
    from falqon.kernels.matmul_triton import Segment

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def vendor_matmul(
    left: Tensor,
    left_scale: Tensor,
    fmt: str,
    right: Tensor,
    right_scale: Tensor,
    segments: tuple[Segment, ...],
    dtype: torch.dtype,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`torch._scaled_mm`; arguments as of `falqon.kernels.matmul_triton.matmul_triton`.

    It multiplies by scales, and has one for the tensor or one for each row of both operands. The
    result is one matrix: with a single layer O is a view of it, otherwise the parts are copied.
    """
    per_row = left_scale.numel() > 1 or right_scale.numel() > 1
    inverse, unit = 1.0 / left_scale, 1.0 / right_scale
    if per_row:
        lengths = torch.zeros(len(right_scale), dtype=torch.int64)
        for number, (_, rows, _, _) in enumerate(segments):
            lengths[number // 2] += rows
        counts = lengths.to(right.device)
        unit = torch.repeat_interleave(unit, counts, output_size=right.shape[0])[None, :]
        inverse = inverse.reshape(-1, 1).expand(left.shape[0], 1).contiguous()
    else:
        inverse, unit = inverse.reshape(()), unit.reshape(())
    both = torch._scaled_mm(
        left.view(_KINDS[fmt]),
        right.view(torch.float8_e4m3fn).t(),
        inverse,
        unit,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, rows, _, other in segments:
        parts[other].append(both[:, first : first + rows])
    out = parts[0][0] if len(parts[0]) == 1 else torch.cat(parts[0], dim=1)
    nothing = both.new_empty(both.shape[0], 0)
    adapter = torch.cat(parts[1], dim=1) if parts[1] else nothing
    if len(parts[1]) == 1:
        adapter = adapter.clone(memory_format=torch.contiguous_format)
    return out if bias is None else out + bias, adapter


def scaled_matmul(
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
) -> tuple[Tensor, Tensor]:
    """The faster of the two; arguments as of `falqon.kernels.matmul_triton.matmul_triton`.

    Returns:
        Backbone and adapter results.
    """
    from falqon.kernels.matmul_triton import matmul_triton

    def by_triton() -> tuple[Tensor, Tensor]:
        return matmul_triton(
            left, left_scale, fmt, right, right_scale, segments, dtype, bias, cuts, rank
        )

    def by_vendor() -> tuple[Tensor, Tensor]:
        return vendor_matmul(left, left_scale, fmt, right, right_scale, segments, dtype, bias)

    name = backend.wanted()
    count, depth = left.shape
    possible = cuts is None and has_fp8_units(left.device) and count > 0
    possible = possible and depth % 16 == 0 and right.shape[0] % 16 == 0
    if not possible or name == "triton":
        return by_triton()
    if name == "auto":
        bucket = 1 << (count - 1).bit_length()
        kind = "token" if left_scale.numel() > 1 else "tensor"
        key = f"{fmt} {bucket}x{depth}x{right.shape[0]} {kind} {len(segments)} {dtype}"
        both = {"triton": by_triton, "vendor": by_vendor}
        name = backend.choices(left.device.index).get(key, both, backend.milliseconds)
    return by_vendor() if name == "vendor" else by_triton()
