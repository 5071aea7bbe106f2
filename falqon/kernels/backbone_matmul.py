"""Backward matmul to the input: the gradient through the backbones alone (paper Alg. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, E5M2
from falqon.kernels import devices
from falqon.kernels.operands import compute_dtype, operand, rescaled, stacked
from falqon.kernels.scaled_matmul import MEMBERS, scaled_matmul
from falqon.kernels.transposed import kept
from falqon.kernels.wide import product


def joined_gradients(
    grads: Sequence[Tensor], scales: Sequence[Tensor], power_of_two: bool = False
) -> Tensor:
    """Gradients of a group's outputs side by side, in units of the first layer's weight scale.

    `[g_0 | g_1 s_0/s_1 | ...]`: with the weight scale `s_0` for all of them, `backbone_matmul` is
    then the sum over the layers. Exact where the scales are powers of two.

    Args:
        grads: dL/dO_i [T, out_i], one dtype.
        scales: weight scales s_i, float32 [1] each.
        power_of_two: the scales are powers of two.

    Returns:
        [T, sum of out_i]; float32 if the factors are not exact in the gradients' dtype. With one
        layer its gradient itself.
    """
    if len(grads) == 1:
        return grads[0]
    # float16 has the bits for the factor but not the exponents.
    is_exact = power_of_two and grads[0].dtype != torch.float16
    dtype = grads[0].dtype if is_exact else torch.float32
    factors = [(scales[0] / scale).to(dtype) for scale in scales]
    return torch.cat([g * factor for g, factor in zip(grads, factors, strict=True)], dim=1)


def backbone_matmul(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Sequence[Tensor],
    scale: Tensor,
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """`dL/dx = g [W_0; W_1; ...] / (s_g s_0)`; the rows of A take no part.

    Args:
        grad: E5M2 codes of `joined_gradients`, uint8 [T, sum of out_i] (or values, in a recipe
            that does not round them; scale 1).
        grad_scale: float32 [1] or [T, 1].
        codes: merged weights of the group, uint8 [out_i + r, in] (or float32).
        scale: s_0, float32 [1].
        rank: r, the number of rows of A in each.
        dtype: of the result.
        power_of_two: both scales are powers of two (a faster exact path).
        onto: [T, in] of `dtype` to be added before the sum is rounded, used up; or None.

    Returns:
        dL/dx [T, in], summed over the group in float32.
    """
    compute = compute_dtype(dtype)
    backbones = [merged[: merged.shape[0] - rank] for merged in codes]
    backbone = backbones[0] if len(backbones) == 1 else torch.cat(backbones)
    left, right = operand(grad, E5M2, compute), operand(backbone, E4M3, compute)
    unit = grad_scale * scale
    if backbone.dtype == torch.uint8 and power_of_two:
        inverse = (1.0 / unit).to(compute)
        left = left.mul_(inverse) if grad.dtype == torch.uint8 else left * inverse
    if backbone.dtype != torch.uint8 or power_of_two:
        return product(left, right, None if onto is None else onto.to(compute)).to(dtype)
    begin = None if onto is None else (onto * unit).to(compute)
    return rescaled(product(left, right, begin), unit, dtype, power_of_two)


def _on_gpu(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Sequence[Tensor],
    scale: Tensor,
    rank: int,
    dtype: torch.dtype,
    keep: bool,
    onto: Tensor | None,
) -> Tensor:
    """`backbone_matmul` on a GPU; with `onto` in its memory.

    The codes are read as they lie where that is the faster (`reads_row_major`), otherwise turned
    first; with `keep` what was turned stays in memory until the codes change.
    """
    from falqon.kernels.transpose_triton import transpose_triton

    counts = [len(merged) - rank for merged in codes]
    cuts = tuple(accumulate(counts))[:-1]
    segments = ((0, codes[0].shape[1], 0, 0),)
    begin = None if onto is None else [onto]
    if reads_row_major(devices.capability(grad.device), grad.shape[0], cuts, keep):
        weight = stacked(codes)
        outs, _ = scaled_matmul(
            grad, grad_scale, "e5m2", weight, scale, segments, dtype, None, cuts, rank, begin
        )
        return outs[0]

    def turn() -> Tensor:
        parts = []
        for at in range(0, len(codes), MEMBERS):
            some = slice(at, at + MEMBERS)
            inner = tuple(accumulate(counts[some]))[:-1]
            parts.append(transpose_triton(stacked(codes[some]), sum(counts[some]), inner, rank))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    turned = kept(codes, counts, turn) if keep else turn()
    outs, _ = scaled_matmul(grad, grad_scale, "e5m2", turned, scale, segments, dtype, onto=begin)
    return outs[0]


@torch.library.custom_op("falqon::backbone_matmul", mutates_args=())
def backbone_matmul_gpu(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Sequence[Tensor],
    scale: Tensor,
    rank: int,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    """`backbone_matmul` on a GPU."""
    return _on_gpu(grad, grad_scale, codes, scale, rank, dtype, keep, None)


@torch.library.custom_op("falqon::backbone_matmul_onto", mutates_args={"onto"})
def backbone_matmul_onto_gpu(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Sequence[Tensor],
    scale: Tensor,
    rank: int,
    keep: bool,
    onto: Tensor,
) -> None:
    """`backbone_matmul` on a GPU, added to `onto` in place; an operator may not return it."""
    _on_gpu(grad, grad_scale, codes, scale, rank, onto.dtype, keep, onto)


@backbone_matmul_gpu.register_fake
def _(
    grad: Tensor,
    grad_scale: Tensor,
    codes: Sequence[Tensor],
    scale: Tensor,
    rank: int,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    return grad.new_empty(grad.shape[0], codes[0].shape[1], dtype=dtype)


FEW_TOKENS = 256
"""Up to so many, reading the weight takes longer than multiplying by it; see docs/kernels.md."""


def reads_row_major(capability: int, tokens: int, cuts: Sequence[int], keep: bool) -> bool:
    """Whether the backward matmul reads the codes as they lie, rather than a transposed copy.

    Args:
        capability: NVIDIA compute capability; 0 for others.
        tokens: T.
        cuts: backbone rows between which rows of A lie: the kernel steps over them only at
            multiples of its block of 128.
        keep: a copy that is there already costs nothing but memory.
    """
    if len(cuts) > 2 or any(cut % 128 for cut in cuts):
        return False
    reads_both_orders = capability // 10 == 10  # tensor cores of data-centre Blackwell
    return reads_both_orders or (tokens <= FEW_TOKENS and not keep)


class BackboneMatmul(nn.Module):
    """`backbone_matmul` as a module.

    Args:
        rank: r, the number of rows of A under each backbone.
        power_of_two: all scales are powers of two.

    Attributes:
        keep_transposed: on a GPU that wants the codes transposed, keep them so: one more byte a
            weight, and no transposition in backward passes before the codes change.
    """

    def __init__(self, rank: int, power_of_two: bool = False) -> None:
        super().__init__()
        self.rank, self.power_of_two = rank, power_of_two
        self.keep_transposed = False

    def forward(
        self,
        grad: Tensor,
        grad_scale: Tensor,
        codes: Sequence[Tensor],
        scale: Tensor,
        dtype: torch.dtype,
        onto: Tensor | None = None,
    ) -> Tensor:
        """See `backbone_matmul`."""
        if devices.uses_kernels(grad) and grad.dtype == torch.uint8:
            given = (grad, grad_scale, codes, scale, self.rank)
            if onto is None:
                return backbone_matmul_gpu(*given, dtype, self.keep_transposed)
            backbone_matmul_onto_gpu(*given, self.keep_transposed, onto)
            return onto
        return backbone_matmul(
            grad, grad_scale, codes, scale, self.rank, dtype, self.power_of_two, onto
        )

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rank={self.rank}, power_of_two={self.power_of_two}"
