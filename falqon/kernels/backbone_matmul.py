"""Backward matmul to the input: the gradient through the backbone alone (paper Alg. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, E5M2
from falqon.kernels.operands import compute_dtype, operand, scaled_matmul


def backbone_matmul(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
) -> Tensor:
    """`dL/dx = g W / (s_g s_W)`; the rows of A take no part.

    Args:
        grad: E5M2 codes of dL/dO, uint8 [T, out] (or values, in a recipe without FP8 rounding).
        grad_scale: float32 [1] or [T, 1].
        codes: merged weight, uint8 [out + r, in] (or float32).
        scale: float32 [1].
        rank: r.
        dtype: of the result.
        power_of_two: both scales are powers of two (a faster exact path).

    Returns:
        dL/dx [T, in].
    """
    compute = compute_dtype(dtype)
    backbone = codes[: codes.shape[0] - rank]
    left, right = operand(grad, E5M2, compute), operand(backbone, E4M3, compute)
    if codes.dtype != torch.uint8:
        return (left @ right).to(dtype)
    return scaled_matmul(left, right, grad_scale, scale, dtype, power_of_two)


class BackboneMatmul(nn.Module):
    """`backbone_matmul` as a module.

    Args:
        rank: r, the number of rows of A under the backbone.
        power_of_two: all scales are powers of two.
    """

    def __init__(self, rank: int, power_of_two: bool = False) -> None:
        super().__init__()
        self.rank, self.power_of_two = rank, power_of_two

    def forward(
        self, grad: Tensor, grad_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See `backbone_matmul`."""
        return backbone_matmul(grad, grad_scale, codes, scale, self.rank, dtype, self.power_of_two)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rank={self.rank}, power_of_two={self.power_of_two}"
