"""The pending change in forward and backward: what B holds acts before it is written.

Two thin matmuls on tensors that exist anyway; `O_A` is part of the melded matmul's result.
"""

from __future__ import annotations

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
    grad_input: Tensor, grad: Tensor, proxy: Tensor, codes: Tensor, scale: Tensor
) -> Tensor:
    """`dL/dx + (dL/dO B) A`, in place.

    Args:
        grad_input: dL/dx [T, in].
        grad: dL/dO [T, out], same dtype.
        proxy: B, times the LoRA scaling, float32 [out, r].
        codes: merged weight, uint8 [out + r, in] (or float32).
        scale: float32 [1].

    Returns:
        `grad_input`.
    """
    adapter = operand(codes[codes.shape[0] - proxy.shape[1] :], E4M3, grad.dtype)
    thin = grad @ (proxy / scale).to(grad.dtype)
    return grad_input.addmm_(thin, adapter)


class Pending(nn.Module):
    """`add_pending` and `add_pending_grad` as a module: forward and backward of one term."""

    def forward(self, out: Tensor, adapter: Tensor, proxy: Tensor) -> Tensor:
        """See `add_pending`."""
        return add_pending(out, adapter, proxy)

    def backward(
        self, grad_input: Tensor, grad: Tensor, proxy: Tensor, codes: Tensor, scale: Tensor
    ) -> Tensor:
        """See `add_pending_grad`."""
        return add_pending_grad(grad_input, grad, proxy, codes, scale)
