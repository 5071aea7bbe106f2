"""Gradient of the proxy buffer B from the saved adapter output (paper Alg. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def proxy_grad(grad: Tensor, adapter: Tensor) -> Tensor:
    """`dL/dB = (dL/dO)^T O_A`, straight from the high-precision gradient.

    Accumulated in float32; on a CPU a bfloat16 product is rounded once at its end.

    Args:
        grad: dL/dO [T, out].
        adapter: O_A [T, r], same dtype.

    Returns:
        float32 [out, r].
    """
    if grad.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.t(), adapter, out_dtype=torch.float32)
    if grad.dtype == torch.float16:
        grad, adapter = grad.float(), adapter.float()
    return (grad.t() @ adapter).to(torch.float32)


class ProxyGrad(nn.Module):
    """`proxy_grad` as a module."""

    def forward(self, grad: Tensor, adapter: Tensor) -> Tensor:
        """See `proxy_grad`."""
        return proxy_grad(grad, adapter)
