"""Forward matmul of a melded layer: one GEMM gives backbone and adapter output (paper Alg. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3
from falqon.kernels.operands import compute_dtype, operand, scaled_matmul


def melded_matmul(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """`[O | O_A] = x M^T / (s_x s_W)`, plus the bias on O.

    Args:
        x: E4M3 codes uint8 [T, in] (or values, in a recipe without FP8 rounding).
        x_scale: float32 [1] or [T, 1].
        codes: merged weight M, uint8 [out + r, in] (or float32): backbone rows, then rows of A.
        scale: float32 [1].
        bias: [out] or None.
        rank: r, the number of rows of A.
        dtype: of the results.
        power_of_two: both scales are powers of two (a faster exact path).

    Returns:
        O [T, out] and O_A [T, r], contiguous tensors of their own: keeping O_A keeps no O.
    """
    compute = compute_dtype(dtype)
    split = codes.shape[0] - rank
    left, right = operand(x, E4M3, compute), operand(codes, E4M3, compute).t()
    if codes.dtype == torch.uint8:
        both = scaled_matmul(left, right, x_scale, scale, dtype, power_of_two)
    else:
        both = (left @ right).to(dtype)
    # Copies: with a single token both slices are contiguous, and `contiguous` would share storage.
    out, adapter = both[:, :split], both[:, split:].clone(memory_format=torch.contiguous_format)
    if bias is None:
        return out.clone(memory_format=torch.contiguous_format), adapter
    return out + bias.to(dtype), adapter


class MeldedMatmul(nn.Module):
    """`melded_matmul` as a module.

    Args:
        rank: r, the number of rows of A under the backbone.
        power_of_two: all scales are powers of two.
    """

    def __init__(self, rank: int, power_of_two: bool = False) -> None:
        super().__init__()
        self.rank, self.power_of_two = rank, power_of_two

    def forward(
        self,
        x: Tensor,
        x_scale: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """See `melded_matmul`."""
        return melded_matmul(x, x_scale, codes, scale, bias, self.rank, dtype, self.power_of_two)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rank={self.rank}, power_of_two={self.power_of_two}"
