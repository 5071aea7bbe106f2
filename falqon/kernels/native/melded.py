"""Melded layers on a CPU: FP8 values straight in bfloat16, between matrix products of torch.

The same numbers as the reference path's, to the last bit: codes are never written, only the values
that they would be decoded to, and scales that are powers of two are exact wherever they are
applied. For recipes with one dynamic, power-of-two scale a token; see `takes`.

Shapes: T tokens, `in`/`out` features, r adapter rank; layers of a group have one input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falqon.kernels.native import ops
from falqon.recipe import Fp8Recipe


def takes(recipe: Fp8Recipe, codes: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether this path computes layers of a recipe with these codes and inputs."""
    return (
        recipe.emulate == "fp8"
        and recipe.scaling == "dynamic"
        and recipe.activations == recipe.gradients == "per_token"
        and recipe.scale_rounding == recipe.weight_scale_rounding == "power_of_two"
        and all(type(c) is torch.nn.Parameter and c.is_contiguous() for c in codes)
        and ops.usable(*inputs)
    )


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of a merged weight, bfloat16 [out + r, in].

    Args:
        codes: uint8 [out + r, in].
        scale: float32 [1], a power of two.
    """
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    return ops.decode_e4m3(codes, 1.0 / float(scale), out)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], rank: int
) -> tuple[list[Tensor], list[Tensor]]:
    """O_i and O_A_i; see `falqon.kernels.melded_matmul.melded_matmul`.

    Args:
        x: FP8 values [T, in].
        weights: what `decoded` gives, for each layer.
        biases: [out_i] or None each.
        rank: r.
    """
    outs, adapters = [], []
    for weight, bias in zip(weights, biases, strict=True):
        split = weight.shape[0] - rank
        out = x @ weight[:split].t()
        outs.append(out if bias is None else out.add_(bias))
        adapters.append(x @ weight[split:].t())
    return outs, adapters


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    proxies: Sequence[Tensor],
    rank: int,
) -> Tensor:
    """dL/dx [T, in]: `backbone_matmul` of the quantised gradients, plus the pending change's part.

    Args:
        grads: dL/dO_i [T, out_i].
        weights: what `decoded` gives, for each layer.
        scales: weight scales, float32 [1] each: gradients are quantised in units of the first's.
        proxies: B_i, times the LoRA scaling, float32 [out_i, r]; none if nothing pending acts.
        rank: r.
    """
    first = float(scales[0])
    values = ops.quantized(grads, [first / float(scale) for scale in scales], e5m2=True)
    backbones = [weight[: weight.shape[0] - rank] for weight in weights]
    grad_input = values @ (backbones[0] if len(backbones) == 1 else torch.cat(backbones))
    if proxies:
        thin = [g @ proxy.to(g.dtype) for g, proxy in zip(grads, proxies, strict=True)]
        adapters = [weight[weight.shape[0] - rank :] for weight in weights]
        grad_input.addmm_(torch.cat(thin, dim=1), torch.cat(adapters))
    return grad_input
