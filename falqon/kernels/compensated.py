"""Rounding whose errors cancel in the layer's output: later columns make up for earlier ones.

Rounding to nearest minimises the error of every weight. What counts is the error of the output,
`(Wq - W) x`, and inputs are correlated. The recursion of GPTQ (Frantar et al., arXiv:2210.17323)
rounds column after column and moves the columns that are still to come so that the expected squared
error of the output is as small as it can be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from falqon.fp8 import E4M3

_BLOCK = 32  # columns that are rounded before the ones behind them follow in one matmul


class Compensation(NamedTuple):
    """How rounding a column moves the others; the same for all layers with the same inputs.

    Attributes:
        order: int64 [in], the columns in the order in which they are rounded.
        factor: float32 [in, in], the upper triangular U of `H^-1 = U^T U`, in that order.
    """

    order: Tensor
    factor: Tensor


def compensation(moment: Tensor, damping: float = 0.01) -> Compensation:
    """Prepare `encode_compensated` for a layer's inputs.

    Columns with large inputs come first, while many are left to make up for them.

    Args:
        moment: second moment H of the inputs, `sum of x x^T`, floating [in, in]. All zero (a layer
            that saw no input) makes the rounding that to nearest.
        damping: added to the diagonal, as a share of its mean. It stands for what a sample of
            inputs does not tell, and bounds how far columns move.
    """
    hessian = moment.to(torch.float64)
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian[order][:, order] / torch.where(mean > 0, mean, 1.0)
    hessian.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return Compensation(order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32))


def encode_compensated(target: Tensor, compensation: Compensation) -> Tensor:
    """E4M3 codes of a weight, rounded to nearest column by column with compensation.

    A column takes over what its predecessors missed; beyond the format's range it saturates, and
    the part that is cut off is made up for as well.

    Args:
        target: float32 [k, in], in units of codes, finite.
        compensation: of the layer's inputs.

    Returns:
        uint8 [k, in].
    """
    order, factor = compensation
    left = target.index_select(1, order).t().contiguous()  # a column is contiguous
    codes = torch.empty(left.shape, dtype=E4M3.dtype, device=left.device)
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        upper = factor[start : start + len(block)]
        errors = torch.empty_like(block)
        for i, column in enumerate(block):
            codes[start + i] = column.clamp(-E4M3.max, E4M3.max)
            torch.sub(column, codes[start + i].to(torch.float32), out=errors[i])
            errors[i] /= upper[i, start + i]
            block[i + 1 :].addr_(upper[i, start + i + 1 : start + len(block)], errors[i], alpha=-1)
        left[start + len(block) :].addmm_(upper[:, start + len(block) :].t(), errors, alpha=-1)
    result = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    result[:, order] = codes.view(torch.uint8).t()
    return result
