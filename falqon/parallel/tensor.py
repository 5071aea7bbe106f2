"""Tensor parallelism of melded layers: q, k, v, gate, up by rows of the weight, others by columns.

    x, the same on all ranks -> column-parallel: each rank some rows -> its heads or features ->
    row-parallel: each rank some columns -> O and O_A are summed, the same on all ranks

Scales of tensors that no rank has all of are computed from the largest amax of any: of a
row-parallel layer's input, and of a column-parallel layer's gradient. So ranks quantise as one
device does; what differs is the order in which the sums of a matmul are formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from falqon.blocks import ATTENTION_GROUP, MLP_GROUP, Grouped, GroupedMlp
from falqon.errors import InputError
from falqon.fp8 import amax_of, compute_scale, quantize
from falqon.groups import tie
from falqon.kernels import BackboneMatmul, MeldedMatmul, Quantize
from falqon.linear import MeldedLinear
from falqon.meld import melded_layers
from falqon.parallel.layers import TensorPart

BY_ROWS = (*ATTENTION_GROUP, *MLP_GROUP)
BY_COLUMNS = ("o_proj", "down_proj")


class _GroupQuantize(Quantize):
    """`Quantize` of a tensor [T, n] of which every rank of a group has some columns."""

    def __init__(self, like: Quantize, group: Any) -> None:
        super().__init__(like.fmt, like.granularity, like.scale_rounding)
        self.group = group

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        amax = amax_of(x, self.granularity)
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.group)
        scale = compute_scale(amax, self.fmt, self.scale_rounding)
        return quantize(x, self.fmt, self.granularity, self.scale_rounding, scale)


class _RowParallelMatmul(MeldedMatmul):
    """`MeldedMatmul` over some columns of input and weight; O and O_A are summed over the group."""

    def __init__(self, like: MeldedMatmul, group: Any) -> None:
        super().__init__(like.rank, like.power_of_two)
        self.group = group

    def adapters(self, *args: Any) -> list[Tensor]:
        """O_A_i, summed before B acts on them."""
        return self._summed(super().adapters(*args))

    def _summed(self, parts: list[Tensor]) -> list[Tensor]:
        parts = [part.contiguous() for part in parts]
        for part in parts:
            dist.all_reduce(part, group=self.group)
        return parts

    def forward(
        self,
        x: Tensor,
        x_scale: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
        proxies: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        none = [None] * len(codes)
        if dist.get_rank(self.group):  # what B adds is whole on every rank and counts once
            proxies = [torch.zeros_like(proxy) for proxy in proxies]
        outs, adapters = super().forward(x, x_scale, codes, scales, none, dtype, proxies)
        adapters = adapters if proxies else self._summed(adapters)
        outs = self._summed(outs)
        for out, bias in zip(outs, biases, strict=True):
            if bias is not None:
                out.add_(bias.to(dtype))
        return outs, adapters


class _ColumnParallelBackbone(BackboneMatmul):
    """`BackboneMatmul` through some rows of weight and B; dL/dx is summed over the group."""

    def __init__(self, like: BackboneMatmul, group: Any) -> None:
        super().__init__(like.rank, like.power_of_two)
        self.group = group

    def forward(
        self,
        grad: Tensor,
        grad_scale: Tensor,
        codes: Sequence[Tensor],
        scale: Tensor,
        dtype: torch.dtype,
        onto: Tensor | None = None,
    ) -> Tensor:
        grad_input = super().forward(grad, grad_scale, codes, scale, dtype, onto)
        dist.all_reduce(grad_input, group=self.group)
        return grad_input


def check(model: nn.Module, count: int) -> None:
    """Refuse a model that so many ranks cannot share, before anything is cut.

    Raises:
        InputError: naming the layer and what does not divide, or what is not supported.
    """
    for name, layer in melded_layers(model).items():
        kind = name.rpartition(".")[2]
        if kind not in BY_ROWS + BY_COLUMNS:
            raise InputError(
                f"tensor parallelism knows {', '.join(BY_ROWS + BY_COLUMNS)}, and {name} is "
                "none of them: exclude it, or use tensor_parallel_size 1."
            )
        size = layer.out_features if kind in BY_ROWS else layer.in_features
        what = "output" if kind in BY_ROWS else "input"
        if size % count:
            raise InputError(
                f"{name} has {size} {what} features, which tensor_parallel_size {count} does not "
                "divide: use another size."
            )
        if layer.recipe.scaling == "delayed":
            raise InputError(
                "tensor parallelism needs scales of the tensor at hand: use the recipe's scaling "
                "'dynamic', or tensor_parallel_size 1."
            )
    config: Any = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % count:
            raise InputError(
                f"the model's {key} is {heads}, which tensor_parallel_size {count} does not "
                "divide: use another size."
            )


@torch.no_grad()
def tensor_parallel(model: nn.Module, group: Any) -> None:
    """Leave every melded layer the part of this rank, in place; what is cut already stays.

    Args:
        model: after melding, whole.
        group: the ranks that share the layers' work.

    Raises:
        InputError: as `check` does.
    """
    count, index = dist.get_world_size(group), dist.get_rank(group)
    layers = melded_layers(model)
    if count == 1 or any(hasattr(layer, "tensor_part") for layer in layers.values()):
        return
    check(model, count)
    for name, layer in layers.items():
        if name.rpartition(".")[2] in BY_ROWS:
            _by_rows(layer, TensorPart(True, group, index, count))
        else:
            _by_columns(layer, TensorPart(False, group, index, count))
    for module in model.modules():
        if isinstance(module, GroupedMlp):
            module.swiglu_quantize = None  # its scales are of what one rank has
        if isinstance(module, Grouped):
            tie(module.group())


def _by_rows(layer: MeldedLinear, part: TensorPart) -> None:
    size = layer.out_features // part.count
    rows = slice(part.index * size, (part.index + 1) * size)
    codes = layer.codes.data
    layer.codes.data = torch.cat([codes[rows], codes[layer.out_features :]])
    layer.B.data = layer.B.data[rows].clone()
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[rows].clone()
    layer.out_features = size
    layer.backbone_matmul = _ColumnParallelBackbone(layer.backbone_matmul, part.group)
    if isinstance(layer.quantize_gradient, Quantize):
        layer.quantize_gradient = _GroupQuantize(layer.quantize_gradient, part.group)
    layer.tensor_part = part  # type: ignore[assignment]


def _by_columns(layer: MeldedLinear, part: TensorPart) -> None:
    size = layer.in_features // part.count
    columns = slice(part.index * size, (part.index + 1) * size)
    layer.codes.data = layer.codes.data[:, columns].clone(memory_format=torch.contiguous_format)
    layer.in_features = size
    layer.melded_matmul = _RowParallelMatmul(layer.melded_matmul, part.group)
    if isinstance(layer.quantize_input, Quantize):
        layer.quantize_input = _GroupQuantize(layer.quantize_input, part.group)
    layer.tensor_part = part  # type: ignore[assignment]
