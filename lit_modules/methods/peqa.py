"""PEQA: integer weights whose scales alone are trained (arXiv:2305.14152)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import Method
from lit_modules.methods.layers import swap_linears
from lit_modules.methods.packing import pack4, unpack4
from lit_modules.methods.quantised import QuantisedLinear, frozen, layers_of

LEVELS = 15  # 2^b - 1 for b = 4 bits
SHRINKINGS = [1.0 - 0.02 * i for i in range(26)]  # of the range that is tried for scale and zero


def asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and whole zero points near the least squared error (paper's eq. 1).

    `q = clamp(round(W / s) + z, 0, 15)`, with s and z of the group's range and of ranges shrunk
    down to a half of it: the one with the least `|W - s (q - z)|^2` is taken.

    Args:
        groups: float32 [out, groups, size].

    Returns:
        codes uint8 [out, groups, size]; scale and zero float32 [out, groups].
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(groups), torch.ones_like(low), torch.zeros_like(low)]
    for shrinking in SHRINKINGS:
        scale = (high - low) * shrinking / LEVELS
        scale = torch.where(scale > 0, scale, 1.0)
        zero = (-low * shrinking / scale).round()
        codes = (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, LEVELS)
        error = ((codes - zero[..., None]) * scale[..., None] - groups).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        for i, new in enumerate((codes, scale, zero)):
            best[i] = torch.where(better[..., None] if i == 0 else better, new, best[i])
    return best[0].to(torch.uint8), best[1], best[2]


class _ScaledMatmul(torch.autograd.Function):
    """`x W^T`, `W = s (q - z)`, with the gradient of s: the sum of `dW (q - z)` over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layer: ScaledLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return functional.linear(x, layer.dequantise(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,) = ctx.saved_tensors
        layer: ScaledLinear = ctx.layer
        d_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        d_scale = (d_weight.float().view(layer.shape) * layer.steps()).sum(-1)
        d_input = grad @ layer.dequantise(grad.dtype) if ctx.needs_input_grad[0] else None
        return d_input, d_scale, None


class ScaledLinear(QuantisedLinear):
    """`W = s (q - z)`: codes of 4 bits and zero points are frozen, scales train (eq. 2).

    Args:
        linear: the layer to be replaced.
        group_size: input features with one scale; None for all of a row.
        name: of the layer, for errors.

    Attributes:
        codes: uint8 [out, in / 2], two codes a byte.
        zero: float32 [out, groups], whole numbers.
        scale: float32 [out, groups], trainable.
    """

    def __init__(self, linear: nn.Linear, group_size: int | None, name: str) -> None:
        super().__init__(linear)
        size = group_size or self.in_features
        if size % 2 or self.in_features % size:
            raise InputError(
                f"method.group_size {group_size} does not fit {name}, which has "
                f"{self.in_features} input features: give an even divisor of them."
            )
        self.shape = (self.out_features, self.in_features // size, size)
        codes, scale, zero = asymmetric(linear.weight.detach().float().view(self.shape))
        self.codes, self.zero = frozen(pack4(codes.flatten(1))), frozen(zero)
        self.scale = nn.Parameter(scale)

    def steps(self) -> Tensor:
        """`q - z`, float32 [out, groups, size]."""
        return unpack4(self.codes).view(self.shape).float() - self.zero[..., None]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`s (q - z)`, float32 arithmetic."""
        return self.steps().mul_(self.scale.detach()[..., None]).flatten(1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], computed in the dtype of `x`."""
        return _ScaledMatmul.apply(x, self.scale, self)


class PEQA(Method):
    """INT4 weights, of which only the scales are trained; 16-bit activations.

    Settings: float32 scales, weights unpacked to bfloat16 before each matmul.

    Args:
        group_size: Input features with one scale. None is the paper's main setting, one for each
            output channel; a small model loses too much with it.

    Raises:
        InputError: for a size that fits no layer.
    """

    name = "peqa"
    autocast = False

    def __init__(self, group_size: int | None = None) -> None:
        if group_size is not None and group_size < 2:
            raise InputError(f"method.group_size is {group_size}; give at least 2, or null.")
        self.group_size = group_size

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Quantise every linear layer; its scales are all that trains."""
        model.requires_grad_(False)
        swap_linears(
            model, lambda n, layer: ScaledLinear(layer.to(self.device), self.group_size, n)
        )
        return model

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Plain layers with `s (q - z)`, rounded to the dtype of the original weights."""
        for name, layer in layers_of(model, ScaledLinear):
            model.set_submodule(name, layer.plain())
        return model
