"""What the methods with a frozen quantised backbone share: the layer, the adapter, the walk.

Shapes: T tokens, `in`/`out` features, r adapter rank.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import Method
from lit_modules.methods.layers import check_rank, plain_linear, swap_linears

M = TypeVar("M", bound=nn.Module)


class KeepsDtypes(nn.Module):
    """A module of which `model.to(dtype)` moves, but never rounds, all tensors but the bias."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtypes:
        kept = {n: p.data for n, p in self.named_parameters(recurse=False) if n != "bias"}
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
                parameter.grad = None  # of the other dtype; there is none while a model is set up
        for name, before in buffers.items():
            self._buffers[name] = before.to(self.get_buffer(name).device)
        return self


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not train. Not a buffer: DDP sends buffers again in every forward."""
    return nn.Parameter(tensor, requires_grad=False)


class _FrozenMatmul(torch.autograd.Function):
    """`x W^T`: weights are made when needed, in both passes; neither they nor x are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantise(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantise(grad.dtype), None


class QuantisedLinear(KeepsDtypes, abc.ABC):
    """A frozen linear layer that holds codes and scales instead of its weight.

    Args:
        linear: the layer to be replaced; its bias is kept, frozen.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype = linear.weight.dtype
        self.bias = None if linear.bias is None else frozen(linear.bias.data)

    @abc.abstractmethod
    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Values of the codes, [out, in] in `dtype`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], computed in the dtype of `x`."""
        return _FrozenMatmul.apply(x, self)

    def plain(self, delta: Tensor | None = None) -> nn.Linear:
        """An `nn.Linear` of the original dtype with these weights and `delta` [out, in] added."""
        weight = self.dequantise(torch.float32)
        weight = weight if delta is None else weight + delta
        return plain_linear(weight.to(self.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LoraLinear(KeepsDtypes):
    """`base(x) + alpha / r * B A x` (LoRA, arXiv:2106.09685, eq. 3), computed in the dtype of x.

    Args:
        base: frozen layer.
        rank: r.
        alpha: alpha.
        inputs: features that A takes, if not those of the layer.

    Attributes:
        A: float32 [r, in], uniform in +-1/sqrt(in) as in LoRA.
        B: float32 [out, r], zero at first.
    """

    def __init__(self, base: Any, rank: int, alpha: float, inputs: int | None = None) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        device = next(base.parameters()).device
        self.A = nn.Parameter(torch.empty(rank, inputs or base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.base(x) + self.adapter(x) * self.scaling

    def adapter(self, x: Tensor) -> Tensor:
        """The adapter's term before scaling."""
        return functional.linear(functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32 [out, in]."""
        return self.B @ self.A * self.scaling

    def merged(self) -> nn.Module:
        """A layer without adapter that computes the same."""
        base, delta = self.base, self.delta()
        if isinstance(base, QuantisedLinear):
            return base.plain(delta)
        return plain_linear((base.weight.float() + delta).to(base.weight.dtype), base.bias)


class LoraOnFrozen(Method):
    """LoRA adapters in float32 on a backbone that `convert` makes of each linear layer.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.

    Raises:
        InputError: for a value out of range.
    """

    autocast = False  # adapters compute in the dtype of their input, bfloat16, as it is

    def __init__(self, rank: int = 64, alpha: float = 16.0) -> None:
        if alpha <= 0:
            raise InputError(f"method.alpha is {alpha}; it must be above 0.")
        self.rank, self.alpha = rank, alpha

    @abc.abstractmethod
    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        """The frozen layer for `linear`, whose full name is for errors."""

    def adapt(self, base: nn.Module) -> LoraLinear:
        """The adapter around a converted layer."""
        return LoraLinear(base, self.rank, self.alpha)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Convert every linear layer and put an adapter around it; nothing else trains."""
        check_rank(model, self.rank)
        model.requires_grad_(False)
        swap_linears(model, lambda n, layer: self.adapt(self.convert(n, layer.to(self.device))))
        return model

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Plain layers with `W + alpha / r B A`, rounded to the dtype of the original weights."""
        for name, layer in layers_of(model, LoraLinear):
            model.set_submodule(name, layer.merged())
        return model


def layers_of(model: nn.Module, kind: type[M]) -> list[tuple[str, M]]:
    """Modules of a class with their full names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]
