"""What the reference matmuls share: operands without their scale, and where the scale goes."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon.fp8 import Format, decode


def compute_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for bfloat16 results, else float32 (unscaled FP8 products overflow float16)."""
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


def operand(codes: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """A matmul operand: decoded FP8 codes (uint8), or high-precision values cast to `dtype`."""
    return decode(codes, fmt, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)


def scaled_matmul(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    power_of_two: bool,
) -> Tensor:
    """`(left @ right) / (left_scale * right_scale)` with float32 accumulation.

    Power-of-two scales are applied to the left operand, where they are exact in bfloat16; others to
    the product, which a bfloat16 matmul has rounded once by then.

    Args:
        left: [T, m], decoded, in `compute_dtype(dtype)`; may be overwritten.
        right: [m, n], decoded, same dtype.
        left_scale: float32 [1] or [T, 1].
        right_scale: float32 [1].
        dtype: of the result.
        power_of_two: both scales are powers of two.

    Returns:
        [T, n] of `dtype`.
    """
    inverse = 1.0 / (left_scale * right_scale)
    if power_of_two:
        return (left.mul_(inverse.to(left.dtype)) @ right).to(dtype)
    product = left @ right
    return torch.mul(product, inverse, out=torch.empty_like(product, dtype=dtype))
