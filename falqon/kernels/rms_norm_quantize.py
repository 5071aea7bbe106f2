"""RMSNorm and quantise in one: the input of q/k/v and of gate/up (Zhang, Sennrich, 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.fp8 import Format, quantize
from falqon.kernels import devices
from falqon.kernels.native import ops
from falqon.kernels.quantize import FORMATS
from falqon.recipe import ScaleRounding


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, fmt: Format | None, rounding: ScaleRounding
) -> tuple[Tensor, Tensor, Tensor]:
    """`Q(w * (x / rms(x)))` with `rms(x) = sqrt(mean(x^2) + eps)` and one scale a token.

    Rounded where the modules of transformers round, so that the codes are the same to the last bit:
    the mean in float32, `x / rms(x)` to the dtype of `x`, the product with `w` to that dtype.

    Args:
        x: [T, n], floating.
        weight: w, [n], same dtype.
        eps: added to the mean square.
        fmt: target format; None not to quantise.
        rounding: of the scales.

    Returns:
        codes uint8 [T, n] and scale float32 [T, 1], or values [T, n] and a scale [1] of one;
        1 / rms(x) float32 [T, 1], for the gradient.
    """
    wide = x.to(torch.float32)
    inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = weight * (wide * inverse_rms).to(x.dtype)
    if fmt is None:
        return normed, wide.new_ones(1), inverse_rms
    codes, scale = quantize(normed, fmt, "per_token", rounding)
    return codes, scale, inverse_rms


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """`dL/dx = (g w - x mean(g w x) / rms^2) / rms`, in float32, rounded once at the end.

    Args:
        grad: g, gradient of the normed tensor [T, n].
        x: [T, n], what was normed.
        weight: w, [n].
        inverse_rms: 1 / rms(x), float32 [T, 1].

    Returns:
        [T, n] in the dtype of `x`. There is none for the weight, which is frozen.
    """
    weighted = grad.to(torch.float32) * weight.to(torch.float32)
    wide = x.to(torch.float32)
    along = (weighted * wide).mean(-1, keepdim=True) * inverse_rms.square()
    return ((weighted - wide * along) * inverse_rms).to(x.dtype)


@torch.library.custom_op("falqon::rms_norm_quantize", mutates_args=())
def rms_norm_quantize_gpu(
    x: Tensor, weight: Tensor, eps: float, fmt: str, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` by Triton; `fmt` is the format's name."""
    from falqon.kernels.rms_norm_quantize_triton import rms_norm_quantize_triton

    return rms_norm_quantize_triton(x, weight, eps, FORMATS[fmt], rounding)  # type: ignore[arg-type]


@rms_norm_quantize_gpu.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, fmt: str, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    scale, inverse = (x.new_empty(x.shape[0], 1, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.uint8), scale, inverse


@torch.library.custom_op("falqon::rms_norm_grad", mutates_args=())
def rms_norm_grad_gpu(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """`rms_norm_grad` by Triton."""
    from falqon.kernels.rms_norm_quantize_triton import rms_norm_grad_triton

    return rms_norm_grad_triton(grad, x, weight, inverse_rms)


@rms_norm_grad_gpu.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class RmsNormQuantize(nn.Module):
    """`rms_norm_quantize` and `rms_norm_grad` as a module: forward and backward of one operation.

    Args:
        eps: added to the mean square.
        fmt: target format; None not to quantise.
        scale_rounding: of the scales, one a token.
    """

    def __init__(self, eps: float, fmt: Format | None, scale_rounding: ScaleRounding) -> None:
        super().__init__()
        self.eps, self.fmt = eps, fmt
        self.scale_rounding: ScaleRounding = scale_rounding

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `rms_norm_quantize`."""
        fits = x.shape[1] <= devices.LONGEST_NORMED_ROW
        if self.fmt is not None and fits and devices.uses_kernels(x):
            done = rms_norm_quantize_gpu(x, weight, self.eps, self.fmt.name, self.scale_rounding)
            return done[0], done[1], done[2]
        return rms_norm_quantize(x, weight, self.eps, self.fmt, self.scale_rounding)

    def values(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the codes, by the compiled CPU path; and 1 / rms(x)."""
        return ops.rms_norm_quantized(x, weight, self.eps, self.fmt is not None)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor
    ) -> tuple[Tensor, None]:
        """Gradients of `x` and of the weight (none); see `rms_norm_grad`."""
        if ops.usable(grad, x, weight):
            return ops.rms_norm_grad(grad, x, weight, inverse_rms), None
        if devices.uses_kernels(x) and x.shape[1] <= devices.LONGEST_NORMED_ROW:
            return rms_norm_grad_gpu(grad, x, weight, inverse_rms), None
        return rms_norm_grad(grad, x, weight, inverse_rms), None

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        name = self.fmt.name if self.fmt else "not quantised"
        return f"{name}, eps={self.eps}, scale_rounding={self.scale_rounding}"
