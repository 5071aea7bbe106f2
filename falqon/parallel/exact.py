"""Sums of gradients that do not depend on how rows are split over devices and batches.

Floating-point addition is not associative: the gradient of eight rows differs in its last bits
between one device, two devices, and two accumulated batches. Here the gradient of every row of the
data is rounded once to a fixed-point number, and those are added as integers, in any order to the
same result. What is left to make equal is each row's own gradient: rows run through the model one
by one, without the padding that a batch would give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from falqon.errors import InputError
from falqon.kernels import ProxyGrad
from falqon.linear import MeldedLinear
from falqon.parallel.strategies import in_many

_UNIT = 2.0**-36  # of one step; float32 keeps as much of numbers above 2^-12
_LARGEST = 2.0**15  # of one row's gradient
_ROWS = 2**12  # so many of the largest fit into an int64


class _Unit(torch.autograd.Function):
    """Passes a loss on, and gives its gradient as exactly one, whatever it is scaled by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ones_like(grad)


def unit_gradient(loss: Tensor) -> Tensor:
    """A loss with gradient one: what divides or multiplies it later changes no bit."""
    out: Tensor = _Unit.apply(loss)
    return out


def rows_of(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The rows of a batch one by one, each up to its last supervised token.

    What comes after it, padding above all, acts on no supervised token of a causal model.

    Args:
        batch: `labels` [b, s] and other tensors [b, s].
    """
    for row, labels in enumerate(batch["labels"]):
        supervised = (labels != -100).nonzero()
        end = int(supervised[-1]) + 1 if len(supervised) else 1
        yield {name: tensor[row : row + 1, :end] for name, tensor in batch.items()}


class _ExactProxyGrad(ProxyGrad):
    """`ProxyGrad` that adds to integers instead of returning what it computed.

    Attributes:
        sums: int64 [out, r], in units of 2^-36.
        invalid: int64 [1], gradients that were not finite or too large.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        # Not buffers: nobody is to send them round or save them.
        self.sums = torch.zeros(shape, dtype=torch.int64, device=device)
        self.invalid = torch.zeros(1, dtype=torch.int64, device=device)

    def forward(self, grad: Tensor, adapter: Tensor) -> Tensor:
        gradient = super().forward(grad, adapter)
        if self.sums.device != gradient.device:
            self.sums, self.invalid = (t.to(gradient.device) for t in (self.sums, self.invalid))
        fits = gradient.abs() < _LARGEST  # NaN does not
        self.invalid += (~fits).sum()
        steps = torch.where(fits, gradient, 0.0).double() / _UNIT
        self.sums += steps.round().to(torch.int64)
        return torch.zeros_like(gradient)


class ExactSums:
    """Exact sums of the gradients of all B of a model.

    It takes the place of every layer's `proxy_grad`, which then returns zero to autograd.

    Args:
        layers: by full name.
    """

    def __init__(self, layers: Mapping[str, MeldedLinear]) -> None:
        self.layers = dict(layers)
        self.rows = 0
        for layer in self.layers.values():
            shape = (layer.out_features, layer.rank)
            layer.proxy_grad = _ExactProxyGrad(shape, layer.B.device)

    def count(self, rows: int) -> None:
        """Note that so many rows were run."""
        self.rows += rows

    @torch.no_grad()
    def finish(self, group: Any = None) -> None:
        """Put the sums over all ranks into the gradients of B, and start again.

        Args:
            group: the ranks that have different rows; all if None.

        Raises:
            InputError: for more rows in a step than sums are sure to hold.
        """
        first = next(iter(self.layers.values()))
        rows = torch.tensor([self.rows], device=first.B.device)
        if in_many(group):
            dist.all_reduce(rows, group=group)
        if int(rows) > _ROWS:
            raise InputError(
                f"exact_sums holds the gradients of {_ROWS} rows, and this step has {int(rows)}: "
                "make the batch smaller, accumulate less, or set exact_sums to false."
            )
        for layer in self.layers.values():
            own = layer.proxy_grad
            assert isinstance(own, _ExactProxyGrad)
            if in_many(group):
                dist.all_reduce(own.sums, group=group)
                dist.all_reduce(own.invalid, group=group)
            gradient = (own.sums.double() * _UNIT).float() * layer.lora_scaling
            gradient = torch.where(own.invalid > 0, torch.nan, gradient)
            _set_gradient(layer.B, gradient)
            own.sums.zero_()
            own.invalid.zero_()
        self.rows = 0


def _set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.grad = gradient
        return
    from falqon.parallel.slices import local_part

    local = local_part(gradient, parameter).contiguous()
    parameter.grad = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
