"""Triton kernels of `RmsNormQuantize`: norm and per-token quantisation in one pass, and back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.errors import InputError
from falqon.fp8 import Format
from falqon.kernels.devices import LONGEST_NORMED_ROW, has_fp8_units, on_device
from falqon.kernels.triton_fp8 import encode, magnitude_bits, round_to, scale_of, widen
from falqon.recipe import ScaleRounding


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_quantize_kernel(  # type: ignore[no-untyped-def]
    x,  # [count, features], row stride given
    weight,  # [features]
    codes,  # uint8 [count, features]
    scale,  # float32 [count]
    inverse_rms,  # float32 [count]
    features,
    row_stride,
    epsilon,
    FORMAT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: read once, its codes written once, the normalised row never leaves the chip."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = widen(tl.load(x + row * row_stride + column, mask=inside, other=0.0))
    mean = tl.sum(values * values, axis=0) / features
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    # The roundings of the separate modules, so that the codes are theirs.
    normed = round_to(values * inverse, x.dtype.element_ty)
    normed *= widen(tl.load(weight + column, mask=inside, other=0.0))
    normed = round_to(normed, x.dtype.element_ty)
    factor = scale_of(tl.max(magnitude_bits(normed), axis=0), FORMAT, POWER_OF_TWO)
    out = encode(normed * factor, FORMAT, HARDWARE)
    tl.store(codes + row * features + column, out, mask=inside)
    tl.store(scale + row, factor)
    tl.store(inverse_rms + row, inverse)


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_grad_kernel(  # type: ignore[no-untyped-def]
    grad,  # [count, features], row stride given
    x,  # [count, features], row stride given
    weight,  # [features]
    inverse_rms,  # float32 [count]
    out,  # [count, features]
    features,
    grad_stride,
    row_stride,
    BLOCK: tl.constexpr,
):
    """One row of `rms_norm_grad`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    values = widen(tl.load(x + row * row_stride + column, mask=inside, other=0.0))
    g = widen(tl.load(grad + row * grad_stride + column, mask=inside, other=0.0))
    g *= widen(tl.load(weight + column, mask=inside, other=0.0))
    inverse = tl.load(inverse_rms + row)
    values *= inverse
    mean = tl.sum(g * values, axis=0) / features
    result = round_to(inverse * (g - values * mean), out.dtype.element_ty)
    tl.store(out + row * features + column, result.to(out.dtype.element_ty), mask=inside)


def row_block(features: int) -> dict[str, Any]:
    """Block that holds a row.

    Raises:
        InputError: if it does not fit on the chip.
    """
    if features > LONGEST_NORMED_ROW:
        raise InputError(
            f"rows of {features} values do not fit into a program; use separate norm and Quantize."
        )
    block = triton.next_power_of_2(max(features, 16))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm_quantize_triton(
    x: Tensor, weight: Tensor, epsilon: float, fmt: Format, rounding: ScaleRounding
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` by its kernel.

    Args:
        x: [T, n], floating; rows may be apart.
        weight: of the norm, [n].
        epsilon: of the norm.
        fmt: target format.
        rounding: of the scale.

    Returns:
        codes uint8 [T, n]; scale float32 [T, 1]; inverse root mean square float32 [T, 1].
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    count, features = x.shape
    codes = torch.empty(count, features, dtype=torch.uint8, device=x.device)
    scale = torch.ones(count, 1, dtype=torch.float32, device=x.device)
    inverse = torch.ones_like(scale)
    if x.numel():
        with on_device(x.device):
            rms_norm_quantize_kernel[(count,)](
                x,
                weight,
                codes,
                scale,
                inverse,
                features,
                x.stride(0),
                epsilon,
                FORMAT=4 if fmt.name == "e4m3" else 5,
                POWER_OF_TWO=rounding == "power_of_two",
                HARDWARE=has_fp8_units(x.device),
                **row_block(features),
            )
    return codes, scale, inverse


def rms_norm_grad_triton(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """`rms_norm_grad` by its kernel.

    Args:
        grad: gradient of the normalised rows, [T, n], floating.
        x: [T, n].
        weight: [n].
        inverse_rms: float32 [T, 1].

    Returns:
        Gradient of `x`, [T, n] in its dtype.
    """
    grad, x = (y if y.stride(1) == 1 else y.contiguous() for y in (grad, x))
    count, features = x.shape
    out = torch.empty(count, features, dtype=x.dtype, device=x.device)
    if x.numel():
        with on_device(x.device):
            rms_norm_grad_kernel[(count,)](
                grad,
                x,
                weight,
                inverse_rms,
                out,
                features,
                grad.stride(0),
                x.stride(0),
                **row_block(features),
            )
    return out
