"""Gradient of the proxy buffer B from the saved adapter output (paper Alg. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.kernels import devices
from falqon.kernels.wide import product


def proxy_grad(grad: Tensor, adapter: Tensor) -> Tensor:
    """`dL/dB = (dL/dO)^T O_A`, straight from the high-precision gradient.

    Accumulated in float32; on a CPU a bfloat16 product is rounded once at its end. On a GPU by
    Triton: the sum over tokens is cut into parts, always the same ones, without atomics.

    Args:
        grad: dL/dO [T, out]; rows may be apart.
        adapter: O_A [T, r], same dtype.

    Returns:
        float32 [out, r].
    """
    if devices.uses_kernels(grad):
        return proxy_grad_gpu(grad, adapter)
    if grad.dtype == torch.float16:
        grad, adapter = grad.float(), adapter.float()
    return product(grad.t(), adapter).to(torch.float32)


@torch.library.custom_op("falqon::proxy_grad", mutates_args=())
def proxy_grad_gpu(grad: Tensor, adapter: Tensor) -> Tensor:
    """`proxy_grad` by Triton; see `falqon.kernels.proxy_grad_triton`."""
    from falqon.kernels.proxy_grad_triton import proxy_grad_triton

    return proxy_grad_triton(grad, adapter)


@proxy_grad_gpu.register_fake
def _(grad: Tensor, adapter: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[1], adapter.shape[1], dtype=torch.float32)


class ProxyGrad(nn.Module):
    """`proxy_grad` as a module."""

    def forward(self, grad: Tensor, adapter: Tensor) -> Tensor:
        """See `proxy_grad`."""
        return proxy_grad(grad, adapter)
