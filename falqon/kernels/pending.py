"""The pending change in forward and backward: what B holds acts before it is written.

Two thin matmuls on tensors that exist anyway; `O_A` is part of the melded matmul's result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3
from falqon.kernels.operands import operand


def add_pending(out: Tensor, adapter: Tensor, proxy: Tensor) -> Tensor:
    """`O + O_A B^T`, in place.

    Args:
        out: O [T, out].
        adapter: O_A [T, r], same dtype.
        proxy: B, times the LoRA scaling, float32 [out, r].

    Returns:
        `out`.
    """
    return out.addmm_(adapter, proxy.to(out.dtype).t())


def add_pending_grad(
    grad_input: Tensor,
    grads: Sequence[Tensor],
    proxies: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> Tensor:
    """`dL/dx + sum of (dL/dO_i B_i) A_i` over the layers of a group, in place and one matmul.

    Args:
        grad_input: dL/dx [T, in].
        grads: dL/dO_i [T, out_i], same dtype.
        proxies: B_i, times the LoRA scaling, float32 [out_i, r].
        codes: merged weights, uint8 [out_i + r, in] (or float32).
        scales: float32 [1] each.

    Returns:
        `grad_input`.
    """
    rank = proxies[0].shape[1]
    adapters = torch.cat([merged[merged.shape[0] - rank :] for merged in codes])
    thin = [
        grad @ (proxy / scale).to(grad.dtype)
        for grad, proxy, scale in zip(grads, proxies, scales, strict=True)
    ]
    return grad_input.addmm_(torch.cat(thin, dim=1), operand(adapters, E4M3, grad_input.dtype))


class Pending(nn.Module):
    """`add_pending` and `add_pending_grad` as a module: forward and backward of one term."""

    def forward(self, out: Tensor, adapter: Tensor, proxy: Tensor) -> Tensor:
        """See `add_pending`."""
        return add_pending(out, adapter, proxy)

    def backward(
        self,
        grad_input: Tensor,
        grads: Sequence[Tensor],
        proxies: Sequence[Tensor],
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
    ) -> Tensor:
        """See `add_pending_grad`."""
        return add_pending_grad(grad_input, grads, proxies, codes, scales)
