"""Melded layers on a CPU: FP8 values straight in bfloat16, in matrix products of torch or our own.

The same numbers as the reference path's, to the last bit (our own as `products` says): codes are
never written, only the values that they would be decoded to, and scales that are powers of two are
exact wherever they are applied. For recipes with one dynamic, power-of-two scale a token, or that
round weights alone; see `takes`.

Shapes: T tokens, `in`/`out` features, r adapter rank; layers of a group have one input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falqon.kernels.native import ops, products
from falqon.kernels.proxy_grad import proxy_grad
from falqon.kernels.wide import product
from falqon.recipe import Fp8Recipe


def takes(recipe: Fp8Recipe, codes: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether this path computes layers of a recipe with these codes and inputs."""
    plain = all(type(c) is torch.nn.Parameter and c.is_contiguous() for c in codes)
    return plain and follows(recipe) and ops.usable(*inputs)


def follows(recipe: Fp8Recipe) -> bool:
    """Whether this path rounds as a recipe says."""
    by_token = recipe.activations == recipe.gradients == "per_token"
    rounded = by_token and recipe.scaling == "dynamic" and recipe.scale_rounding == "power_of_two"
    return (
        recipe.emulate == "weights" or (recipe.emulate == "fp8" and rounded)
    ) and recipe.weight_scale_rounding == "power_of_two"


def forward(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    proxies: Sequence[Tensor],
    factors: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """O_i and O_A_i; see `falqon.kernels.melded_matmul.MeldedMatmul`.

    Args:
        x: FP8 values [T, in], or what the recipe does not round.
        codes: merged weights, uint8 [out_i + r, in].
        scales: float32 [1] each.
        biases: [out_i] or None each.
        rank: r.
        proxies: B_i, float32 [out_i, r]; none if nothing pending acts.
        factors: LoRA scaling of each.

    Returns:
        O_i [T, out_i], tensors of their own, and O_A_i [T, r]: parts of one tensor.
    """
    if products.takes(codes, x.shape[0], rank):
        results, adapters = products.forward(x, codes, scales, rank, proxies, factors)
    else:
        backbones, of_adapters = _decoded(codes, scales, rank)
        adapter = product(x, of_adapters.t())
        adapters = [adapter] if len(codes) == 1 else list(adapter.split(rank, dim=1))
        if proxies:
            acting = _acting(proxies, factors)
            pending = [product(a, b.t()) for a, b in zip(adapters, acting, strict=True)]
            parts = backbones.split([len(c) - rank for c in codes])
            onto = zip(pending, parts, strict=True)
            results = [product(x, w.t(), to) for to, w in onto]
        else:
            parts = backbones.split([len(c) - rank for c in codes])
            results = [product(x, w.t()) for w in parts]
    for result, bias in zip(results, biases, strict=True):
        if bias is not None:
            result.add_(bias)
    return results, adapters


def backward(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    proxies: Sequence[Tensor],
    factors: Sequence[float],
    adapters: Sequence[Tensor],
    rounded: bool,
    want_input: bool,
    want_proxies: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of B.

    dL/dx is `backbone_matmul` of the quantised gradients, plus the pending change's part; dL/dB is
    `proxy_grad`, times the LoRA scaling.

    Args:
        grads: dL/dO_i [T, out_i].
        codes, scales, rank, proxies, factors: as in `forward`. Gradients are quantised in units of
            the first scale.
        adapters: O_A_i [T, r].
        rounded: gradients are quantised.
        want_input, want_proxies: which of the results to make.

    Returns:
        [T, in] or None; float32 [out_i, r] or None each.
    """
    if not (want_input or any(want_proxies)):
        return None, [None for _ in codes]
    if products.takes(codes, grads[0].shape[0], rank):
        wanted = (adapters, rounded, want_input, want_proxies)
        return products.backward(grads, codes, scales, rank, proxies, factors, *wanted)
    grad_input = None
    if want_input:
        grad_input = _input_gradient(grads, codes, scales, rank, proxies, factors, rounded)
    parts = zip(grads, adapters, factors, want_proxies, strict=True)
    return grad_input, [_scaled(proxy_grad(g, a), f) if want else None for g, a, f, want in parts]


def _input_gradient(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    proxies: Sequence[Tensor],
    factors: Sequence[float],
    rounded: bool,
) -> Tensor:
    backbones, of_adapters = _decoded(codes, scales, rank)
    if rounded:
        values = [1.0] if len(scales) == 1 else torch.cat(list(scales)).tolist()
        left = ops.quantized(grads, [values[0] / value for value in values], e5m2=True)
    else:
        left = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
    if not proxies:
        return product(left, backbones)
    acting = _acting(proxies, factors)
    thin = [product(grad, proxy) for grad, proxy in zip(grads, acting, strict=True)]
    onto = product(thin[0] if len(thin) == 1 else torch.cat(thin, dim=1), of_adapters)
    return product(left, backbones, onto)


def _decoded(codes: Sequence[Tensor], scales: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Backbones of a group, bfloat16 [sum of out_i, in], and A of every layer, [r for each, in]."""
    both = ops.decoded(codes, scales, rank)
    rows = len(both) - len(codes) * rank
    return both[:rows], both[rows:]


def _acting(proxies: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    scaled = (_scaled(proxy, factor) for proxy, factor in zip(proxies, factors, strict=True))
    return [proxy.to(torch.bfloat16) for proxy in scaled]


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
