"""The pending change in forward and backward: what B holds acts before it is written.

Thin matmuls on tensors that exist anyway. What they give is handed to the matmul of the backbone,
which adds it to its float32 sums and rounds once: added to a result that has been rounded already,
every change below half a step of that result would vanish.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falqon.fp8 import E4M3
from falqon.kernels.operands import operand
from falqon.kernels.wide import product


def pending_outputs(adapter: Tensor, proxy: Tensor) -> Tensor:
    """`O_A B^T`, what B adds to a layer's output.

    Args:
        adapter: O_A [T, r].
        proxy: B, times the LoRA scaling, float32 [out, r].

    Returns:
        [T, out] in the dtype of `adapter`, a tensor of its own.
    """
    return product(adapter, proxy.to(adapter.dtype).t())


def pending_gradient(
    grads: Sequence[Tensor],
    proxies: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> Tensor:
    """Sum of `(dL/dO_i B_i) A_i` over the layers of a group, in one matmul.

    Args:
        grads: dL/dO_i [T, out_i].
        proxies: B_i, times the LoRA scaling, float32 [out_i, r].
        codes: merged weights, uint8 [out_i + r, in] (or float32).
        scales: float32 [1] each.

    Returns:
        [T, in] in the dtype of `grads`, a tensor of its own.
    """
    rank = proxies[0].shape[1]
    dtype = grads[0].dtype
    adapters = operand(
        torch.cat([merged[merged.shape[0] - rank :] for merged in codes]), E4M3, torch.float32
    )
    if codes[0].dtype == torch.uint8:  # here and not on B, which would underflow in float16
        adapters = adapters / torch.cat(list(scales)).repeat_interleave(rank)[:, None]
    thin = [product(grad, proxy.to(dtype)) for grad, proxy in zip(grads, proxies, strict=True)]
    return product(torch.cat(thin, dim=1), adapters.to(dtype))
