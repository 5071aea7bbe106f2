"""What the reference matmuls share: operands without their scale, and where the scale goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falqon.fp8 import Format, decode


def compute_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for bfloat16 results, else float32 (unscaled FP8 products overflow float16)."""
    return torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32


def operand(codes: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """A matmul operand: decoded FP8 codes (uint8), or high-precision values cast to `dtype`."""
    return decode(codes, fmt, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)


def are_consecutive(parts: Sequence[Tensor]) -> bool:
    """Whether plain tensors [n_i, m] lie one directly behind the other in one storage."""
    first = parts[0]
    end = first.data_ptr() if type(first) in (Tensor, torch.nn.Parameter) else 0
    for part in parts:
        if (
            type(part) not in (Tensor, torch.nn.Parameter)  # DTensor, FakeTensor: no address
            or part.data_ptr() != end
            or not part.is_contiguous()
            or (part.dtype, part.shape[1]) != (first.dtype, first.shape[1])
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return False
        end += part.numel() * part.element_size()
    return True


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several tensors in one: a view where they are consecutive, otherwise a copy.

    Where the parts lie is looked at every time, so that no view can be out of date. Traced code
    knows no addresses and copies, which a compiler fuses with what reads it.

    Args:
        parts: [n_i, m] each, of one dtype and device.

    Returns:
        [sum of n_i, m].
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.compiler.is_compiling() or not are_consecutive(parts):
        return torch.cat(list(parts))
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    return first.as_strided(shape, (first.shape[1], 1))


def rescaled(product: Tensor, scale: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """`product / scale` as a new, contiguous tensor.

    Args:
        product: [T, n], any strides.
        scale: float32 [1] or [T, 1].
        dtype: of the result.
        power_of_two: the scale is a power of two, exact in the dtype of the product.

    Returns:
        [T, n] of `dtype`.
    """
    inverse = 1.0 / scale
    if power_of_two:
        inverse = inverse.to(product.dtype)  # of one dtype, for one vectorised pass
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    return torch.mul(product, inverse, out=out)
