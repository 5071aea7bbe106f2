"""SwiGLU and quantise in one: the input of down (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from falqon.fp8 import Format, quantize
from falqon.kernels import devices
from falqon.kernels.native import ops
from falqon.kernels.quantize import FORMATS
from falqon.recipe import ScaleRounding


def swiglu_quantize(
    gate: Tensor, up: Tensor, fmt: Format | None, rounding: ScaleRounding
) -> tuple[Tensor, Tensor]:
    """`Q(silu(gate) * up)` with one scale a token.

    Rounded where the modules of transformers round, so that the codes are the same to the last bit:
    `silu(gate)` and the product, both to the dtype of the operands.

    Args:
        gate, up: [T, n], of one floating dtype.
        fmt: target format; None not to quantise.
        rounding: of the scales.

    Returns:
        codes uint8 [T, n] and scale float32 [T, 1], or values [T, n] and a scale [1] of one.
    """
    product = functional.silu(gate) * up
    if fmt is None:
        return product, torch.ones(1, dtype=torch.float32, device=gate.device)
    return quantize(product, fmt, "per_token", rounding)


def swiglu_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`g up silu'(gate)` and `g silu(gate)`, rounded where autograd rounds.

    Args:
        grad: g, gradient of `silu(gate) * up` [T, n].
        gate, up: [T, n], same dtype.

    Returns:
        Gradients of gate and up, [T, n] each, to the last bit those of autograd.
    """
    d_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
    return d_gate, grad * functional.silu(gate)


@torch.library.custom_op("falqon::swiglu_quantize", mutates_args=())
def swiglu_quantize_gpu(gate: Tensor, up: Tensor, fmt: str, rounding: str) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` by Triton; `fmt` is the format's name."""
    from falqon.kernels.swiglu_quantize_triton import swiglu_quantize_triton

    return swiglu_quantize_triton(gate, up, FORMATS[fmt], rounding)  # type: ignore[arg-type]


@swiglu_quantize_gpu.register_fake
def _(gate: Tensor, up: Tensor, fmt: str, rounding: str) -> tuple[Tensor, Tensor]:
    scale = gate.new_empty(gate.shape[0], 1, dtype=torch.float32)
    return gate.new_empty(gate.shape, dtype=torch.uint8), scale


@torch.library.custom_op("falqon::swiglu_grad", mutates_args=())
def swiglu_grad_gpu(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_grad` by Triton."""
    from falqon.kernels.swiglu_quantize_triton import swiglu_grad_triton

    return swiglu_grad_triton(grad, gate, up)


@swiglu_grad_gpu.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


class SwigluQuantize(nn.Module):
    """`swiglu_quantize` and `swiglu_grad` as a module: forward and backward of one operation.

    Args:
        fmt: target format; None not to quantise.
        scale_rounding: of the scales, one a token.
    """

    def __init__(self, fmt: Format | None, scale_rounding: ScaleRounding) -> None:
        super().__init__()
        self.fmt = fmt
        self.scale_rounding: ScaleRounding = scale_rounding

    def forward(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """See `swiglu_quantize`."""
        if self.fmt is not None and devices.uses_kernels(gate):
            done = swiglu_quantize_gpu(gate, up, self.fmt.name, self.scale_rounding)
            return done[0], done[1]
        return swiglu_quantize(gate, up, self.fmt, self.scale_rounding)

    def values(self, gate: Tensor, up: Tensor) -> tuple[Tensor]:
        """Values of the codes, by the compiled CPU path."""
        return (ops.swiglu_quantized(gate, up, self.fmt is not None),)

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up; see `swiglu_grad`."""
        if ops.usable(grad, gate, up):
            return ops.swiglu_grad(grad, gate, up)
        if devices.uses_kernels(gate):
            both = swiglu_grad_gpu(grad, gate, up)
            return both[0], both[1]
        return swiglu_grad(grad, gate, up)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        name = self.fmt.name if self.fmt else "not quantised"
        return f"{name}, scale_rounding={self.scale_rounding}"
