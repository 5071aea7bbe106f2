"""Melded layers on a CPU: FP8 values straight in bfloat16, between matrix products of torch.

The same numbers as the reference path's, to the last bit: codes are never written, only the values
that they would be decoded to, and scales that are powers of two are exact wherever they are
applied. For recipes with one dynamic, power-of-two scale a token, or that round weights alone; see
`takes`.

Shapes: T tokens, `in`/`out` features, r adapter rank; layers of a group have one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from falqon.kernels.native import ops
from falqon.recipe import Fp8Recipe


def takes(recipe: Fp8Recipe, codes: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether this path computes layers of a recipe with these codes and inputs."""
    by_token = recipe.activations == recipe.gradients == "per_token"
    rounded = by_token and recipe.scaling == "dynamic" and recipe.scale_rounding == "power_of_two"
    return (
        (recipe.emulate == "weights" or (recipe.emulate == "fp8" and rounded))
        and recipe.weight_scale_rounding == "power_of_two"
        and all(type(c) is torch.nn.Parameter and c.is_contiguous() for c in codes)
        and ops.usable(*inputs)
    )


class Weights(NamedTuple):
    """Values of a group's merged weights.

    Attributes:
        backbone: bfloat16 [sum of out_i, in].
        adapter: A of every layer, bfloat16 [r for each layer, in].
    """

    backbone: Tensor
    adapter: Tensor


def decoded(codes: Sequence[Tensor], scales: Sequence[Tensor], rank: int) -> Weights:
    """Decode the weights of a group.

    Args:
        codes: merged weights, uint8 [out_i + r, in].
        scales: float32 [1] each, powers of two.
        rank: r.
    """
    both = ops.decoded(codes, scales, rank)
    rows = len(both) - len(codes) * rank
    return Weights(both[:rows], both[rows:])


def forward(
    x: Tensor,
    weights: Weights,
    biases: Sequence[Tensor | None],
    outs: Sequence[int],
    rank: int,
    proxies: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """O_i and O_A_i; see `falqon.kernels.melded_matmul.MeldedMatmul`.

    Args:
        x: FP8 values [T, in], or what the recipe does not round.
        weights: of the group.
        biases: [out_i] or None each.
        outs: out_i.
        rank: r.
        proxies: B_i, times the LoRA scaling, bfloat16 [out_i, r]; none if nothing pending acts.

    Returns:
        O_i [T, out_i], tensors of their own, and O_A_i [T, r]: parts of one tensor.
    """
    adapter = x @ weights.adapter.t()
    single = len(outs) == 1
    adapters = [adapter] if single else list(adapter.split(rank, dim=1))
    backbones = [weights.backbone] if single else weights.backbone.split(list(outs))
    if proxies:
        onto = [a @ proxy.t() for a, proxy in zip(adapters, proxies, strict=True)]
        results = [to.addmm_(x, w.t()) for to, w in zip(onto, backbones, strict=True)]
    else:
        results = [x @ weight.t() for weight in backbones]
    for result, bias in zip(results, biases, strict=True):
        if bias is not None:
            result.add_(bias)
    return results, adapters


def backward(
    grads: Sequence[Tensor],
    weights: Weights,
    scales: Sequence[Tensor],
    proxies: Sequence[Tensor],
    rounded: bool = True,
) -> Tensor:
    """dL/dx [T, in]: `backbone_matmul` of the quantised gradients, plus the pending change's part.

    Args:
        grads: dL/dO_i [T, out_i].
        weights: of the group.
        scales: weight scales, float32 [1] each: gradients are quantised in units of the first's.
        proxies: B_i, times the LoRA scaling, bfloat16 [out_i, r]; none if nothing pending acts.
        rounded: gradients are quantised.
    """
    if rounded:
        values = [1.0] if len(scales) == 1 else torch.cat(list(scales)).tolist()
        factors = [values[0] / value for value in values]
        left = ops.quantized(grads, factors, e5m2=True)
    else:
        left = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
    if not proxies:
        return left @ weights.backbone
    thin = [grad @ proxy for grad, proxy in zip(grads, proxies, strict=True)]
    onto = (thin[0] if len(thin) == 1 else torch.cat(thin, dim=1)) @ weights.adapter
    return onto.addmm_(left, weights.backbone)
