"""FP8 matmul with scales on a GPU: Triton's kernel or the vendor's `torch._scaled_mm`.

What the melded and the backbone matmul run on a CUDA device; on others plain torch does
(`falqon.kernels.operands`). Which of the two is the faster depends on the GPU and on the shape, so
it is measured, see `falqon.kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from falqon.kernels import backend
from falqon.kernels.devices import architecture, has_fp8_units

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

Segment = tuple[int, int, int, int]
"""First row of the right operand, number of rows, first column of the result, which result that is.

Results 0 to 2 are those of a group's members, each of as many columns as its segment has rows;
`ADAPTER` is the one for the rows of A of all of them.
"""
ADAPTER = 3
MEMBERS = 3
"""Most layers of a group."""


def vendor_matmul(
    left: Tensor,
    left_scale: Tensor,
    fmt: str,
    right: Tensor,
    right_scale: Tensor,
    segments: tuple[Segment, ...],
    dtype: torch.dtype,
    bias: Tensor | None,
    onto: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`torch._scaled_mm`; arguments as of `falqon.kernels.matmul_triton.matmul_triton`.

    It multiplies by scales, and has one for the tensor or one for each row of both operands. The
    result is one matrix, from which each part is copied: results are tensors of their own. It adds
    to nothing: with `onto` its result is float32, and the sum is rounded.
    """
    per_row = left_scale.numel() > 1 or right_scale.numel() > 1
    inverse, unit = 1.0 / left_scale, 1.0 / right_scale
    if per_row:
        if right_scale.numel() <= len(segments):  # one a member, not one a row
            unit = unit[_owners(segments, right.shape[0], right.device)]
        unit = unit.reshape(1, -1).contiguous()
        inverse = inverse.reshape(-1, 1).expand(left.shape[0], 1).contiguous()
    else:
        inverse, unit = inverse.reshape(()), unit.reshape(())
    both = torch._scaled_mm(
        left.view(_KINDS[fmt]),
        right.view(torch.float8_e4m3fn).t(),
        inverse,
        unit,
        out_dtype=dtype if onto is None else torch.float32,
        use_fast_accum=False,
    )
    outs = [both[:, a : a + n].contiguous() for a, n, _, to in segments if to != ADAPTER]
    if onto is not None:
        outs = [begin.copy_(out.add_(begin)) for out, begin in zip(outs, onto, strict=True)]
    adapters = [both[:, a : a + n] for a, n, _, to in segments if to == ADAPTER]
    adapter = torch.cat(adapters, dim=1) if adapters else both.new_empty(len(both), 0)
    if bias is not None:  # in place: with `onto` these are its tensors, and nobody looks elsewhere
        for out, part in zip(outs, bias.split([o.shape[1] for o in outs]), strict=True):
            out.add_(part)
    if len(outs) == 1 and not adapters and onto is None:
        outs = [both]
    return outs, adapter.contiguous()


@lru_cache(maxsize=1024)
def _owners(segments: tuple[Segment, ...], rows: int, device: torch.device) -> Tensor:
    """Number of the member that each row belongs to, int64 [rows]; made once, not in each step."""
    owners = torch.zeros(rows, dtype=torch.int64)
    for number, (first, length, _, _) in enumerate(segments):
        owners[first : first + length] = number // 2
    return owners.to(device)


def is_thin(segments: tuple[Segment, ...]) -> bool:
    """Whether rows of A alone take part."""
    return all(to == ADAPTER for _, length, _, to in segments if length)


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
    onto: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The faster of the two; arguments as of `falqon.kernels.matmul_triton.matmul_triton`.

    Returns:
        Results of the members, and the adapters' result.
    """
    from falqon.kernels.matmul_triton import matmul_triton

    def run(name: str, begin: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        given = (left, left_scale, fmt, right, right_scale, segments, dtype, bias)
        if name == "vendor":
            return vendor_matmul(*given, begin)
        return matmul_triton(*given, cuts, rank, begin)

    name = backend.wanted()
    count, depth = left.shape
    possible = cuts is None and has_fp8_units(left.device) and count > 0
    possible = possible and not is_thin(segments)
    possible = possible and depth % 16 == 0 and right.shape[0] % 16 == 0
    # With a scale a row the vendor's results are float32 on Hopper only.
    per_row = left_scale.numel() > 1 or right_scale.numel() > 1
    possible = possible and (onto is None or not per_row or architecture(left.device) == 90)
    if not possible:
        name = "triton"
    if name == "auto":
        bucket = 1 << (count - 1).bit_length()
        kind = "token" if left_scale.numel() > 1 else "tensor"
        key = f"{fmt} {bucket}x{depth}x{right.shape[0]} {kind} {len(segments)} {dtype}"
        key += "" if onto is None else " onto"

        def trial(name: str) -> tuple[list[Tensor], Tensor]:  # what is timed may not add up
            return run(name, None if onto is None else [begin.clone() for begin in onto])

        both = {name: partial(trial, name) for name in ("triton", "vendor")}
        name = backend.choices(left.device.index).get(key, both, backend.milliseconds)
    return run(name, onto)
