"""The kernels of a decoder layer of melded layers, grouped and fused as this project aims at.

q, k and v are one GEMM, and gate and up are; what comes before a GEMM writes its FP8 codes, one
scale a token. It is a plan: of these kernels only some are written. T tokens, h hidden and f
intermediate features, r adapter rank.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.step_ops import (
    Listing,
    Op,
    Saved,
    Settings,
    elementwise,
    gemm,
    quantise,
    transpose,
)
from falqon.linear import MeldedLinear


def attention(batch: int, tokens: int, heads: int, dim: int, causal: bool = True) -> Listing:
    """Flash attention in bfloat16: q, k, v and o cross the bus, scores do not.

    The backward pass makes the scores again: five matmuls against the forward pass's two.
    """
    size = 2 * batch * heads * tokens * dim
    lse = 4 * batch * heads * tokens
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    flops = 4 * batch * heads * pairs * dim
    forward = Op("flash forward", "attention", 3 * size, size + lse, flops, "bf16")
    read, written = 5 * size + lse, 3 * size
    backward = Op("flash backward", "attention", read, written, flops * 5 // 2, "bf16", 3)
    saved: tuple[Saved, ...] = (
        ((batch, tokens, heads, dim), torch.bfloat16),
        ((batch, heads, tokens), torch.float32),
    )
    return Listing((forward,), (), (backward,), saved)


def norm_and_quantise(name: str, t: int, h: int) -> Op:
    """Residual add, RMSNorm and cast to FP8 in one pass; writes the residual stream and codes."""
    return elementwise(name, t * h, 4, 3)


def norm_backward(name: str, t: int, h: int) -> Op:
    """RMSNorm backward, residual add and cast in one pass: dx, x, d(residual) to sum and codes."""
    return elementwise(name, t * h, 6, 3)


def _group(
    name: str, layers: list[MeldedLinear], settings: Settings, live: bool
) -> tuple[list[Op], list[Op]]:
    """Forward and backward GEMMs of melded layers that share their input."""
    t, n_in, rank = settings.total, layers[0].in_features, layers[0].rank
    merged = sum(layer.codes.shape[0] for layer in layers)
    outs = [layer.out_features for layer in layers]
    forward = [gemm(f"{name}: melded GEMM", t, merged, n_in, "fp8")]
    backward = [gemm(f"{name}: dx", t, n_in, sum(outs), "fp8", accumulate=live)]
    if not settings.cached_transpose:
        backward.insert(0, transpose(f"{name}: transpose W codes", sum(outs), n_in))
    if live:
        thin, ranks = "thin gemm", rank * len(outs)
        casts = [elementwise(f"{name}: cast B", o * rank, 4, 2) for o in outs]
        forward = [
            gemm(f"{name}: O_A", t, ranks, n_in, "fp8", kind=thin),
            *casts,
            *(gemm(f"{name}: O_A B^T", t, o, rank, "bf16", kind=thin) for o in outs),
            gemm(f"{name}: + backbone", t, sum(outs), n_in, "fp8", accumulate=True),
        ]
        backward = [
            *casts,
            *(gemm(f"{name}: dO B", t, rank, o, "bf16", kind=thin) for o in outs),
            elementwise(f"{name}: decode A", ranks * n_in, 1, 2),
            gemm(f"{name}: dO B A", t, n_in, ranks, "bf16", kind=thin),
            *backward,
        ]
    backward += [gemm(f"{name}: dB", o, rank, t, "bf16", out=4, kind="thin gemm") for o in outs]
    return forward, backward


def fused_layer(layer: Any, settings: Settings, live: bool = False) -> Listing:
    """A whole LlamaDecoderLayer whose linears are melded.

    dB is in bfloat16, straight from the gradient. `live`: the pending change of B acts: it is made
    by thin GEMMs, and those of the backbone add to it before they round.
    """
    mlp, attn = layer.mlp, layer.self_attn
    t = settings.total
    h, f = mlp.gate_proj.in_features, mlp.gate_proj.out_features
    dim = attn.head_dim
    heads = h // dim
    groups = {
        "qkv": [attn.q_proj, attn.k_proj, attn.v_proj],
        "o": [attn.o_proj],
        "gate, up": [mlp.gate_proj, mlp.up_proj],
        "down": [mlp.down_proj],
    }
    both = {name: _group(name, layers, settings, live) for name, layers in groups.items()}
    flash = attention(settings.batch, settings.tokens, heads, dim)
    forward = (
        norm_and_quantise("add, norm, quantise", t, h),
        *both["qkv"][0],
        elementwise("rotary", 2 * t * h, 2, 2),
        *flash.forward,
        quantise("quantise attention", t, h, "per_token"),
        *both["o"][0],
        norm_and_quantise("add, norm, quantise", t, h),
        *both["gate, up"][0],
        elementwise("SwiGLU, quantise", t * f, 4, 1),
        *both["down"][0],
    )
    backward = (
        *both["down"][1],
        elementwise("SwiGLU backward, quantise", t * f, 6, 6),
        *both["gate, up"][1],
        norm_backward("norm backward, add, quantise", t, h),
        *both["o"][1],
        *flash.grad_input,
        Op("rotary backward, quantise", "elementwise", 6 * t * h, (4 + 3) * t * h),
        *both["qkv"][1],
        norm_backward("norm backward, add, quantise", t, h),
    )
    adapters = sum(len(layers) for layers in groups.values()) * settings.rank
    saved: tuple[Saved, ...] = (
        ((2, t, h), torch.bfloat16),  # residual stream before each norm
        ((2, t), torch.float32),  # 1 / rms
        ((4, t, h), torch.bfloat16),  # q, k, v, attention
        ((t, heads), torch.float32),  # logsumexp
        ((2, t, f), torch.bfloat16),  # gate, up
        ((t, adapters), torch.bfloat16),  # O_A
    )
    # d(SwiGLU), dgate and dup with their codes, one transposed weight.
    scratch = (2 + 4 + 2) * t * f + (0 if settings.cached_transpose else 2 * f * h)
    return Listing(forward, backward, (), saved, scratch=scratch)
