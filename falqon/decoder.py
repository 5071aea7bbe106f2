"""A decoder layer of the Llama family as one autograd function, on processors with AMX.

The same operations in the same order as `falqon.blocks` has them module by module, so the same
bits. Between them there is neither autograd nor a call of a module, which together cost a seventh
of a step of a small model. What is kept for the backward pass is what the modules keep.

Shapes: b rows of s tokens, T = b s, n features, d values in a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from falqon.groups import run_together
from falqon.kernels import RmsNormQuantize
from falqon.kernels.native import amx, amx_decoder, melded
from falqon.kernels.native.attention import Ranges
from falqon.linear import MeldedLinear, has_hooks, is_as_made


class Decoder(NamedTuple):
    """A decoder layer's parts.

    Attributes:
        groups: melded layers that share an input, in the order in which they are applied: q/k/v, o,
            gate/up, down.
        norms: weights of the norms before q/k/v and gate/up, [n].
        normed: these norms, each with the quantiser of what it makes.
        heads, kv: numbers of heads of queries and of keys.
        ranges: which keys each query sees.
        scaling: of the scores.
    """

    groups: tuple[Sequence[MeldedLinear], ...]
    norms: tuple[Tensor, Tensor]
    normed: tuple[RmsNormQuantize, RmsNormQuantize]
    heads: int
    kv: int
    ranges: Ranges
    scaling: float


def takes(groups: Sequence[Sequence[nn.Module]], modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether melded layers can be part of a decoder layer that is run as one.

    Not while a profiler is running: it is to see the parts.

    Args:
        groups: of melded layers that share an input.
        modules: everything else that would not be called then.
        x: the decoder layer's input, [b, s, n].
    """
    if torch.autograd._profiler_enabled() or not amx.present():
        return False
    if any(map(has_hooks, modules)) or any("forward" in vars(module) for module in modules):
        return False  # transformers replaces `forward` of what it records
    tokens = x.shape[:-1].numel()
    for layers in groups:
        if not run_together(layers) or any("forward" in vars(layer) for layer in layers):
            return False
        own: Sequence[MeldedLinear] = layers  # type: ignore[assignment]
        codes, rank = [layer.codes for layer in own], own[0].rank
        biases = [layer.bias for layer in own if layer.bias is not None]
        if not (
            is_as_made(own)
            and melded.takes(own[0].recipe, codes, [x, *biases])
            and amx.takes(codes, tokens, rank)
            and all(layer.B.is_contiguous() for layer in own)
            and not any(bias.requires_grad for bias in biases)
        ):
            return False
    return True


def apply_decoder(parts: Decoder, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a decoder layer.

    Args:
        parts: of which `takes` said that they can be.
        hidden_states: [b, s, n].
        rotation: cosines and sines, [b or 1, s, d].

    Returns:
        [b, s, n].
    """
    proxies = [layer.B for layer in chain.from_iterable(parts.groups)]
    out: Tensor = _DecoderFunction.apply(parts, *rotation, hidden_states, *proxies)
    return out


class _DecoderFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Decoder, cos: Tensor, sin: Tensor, hidden_states: Tensor, *_: Tensor
    ) -> Tensor:
        x = hidden_states.detach().reshape(-1, hidden_states.shape[-1]).contiguous()
        layers = list(chain.from_iterable(parts.groups))
        tensors = [
            *(cos.contiguous(), sin.contiguous(), *parts.norms),
            *(layer.codes for layer in layers),
            *(layer.scale for layer in layers),
            *(layer.B for layer in layers if layer.live),
        ]
        out, kept = _plan(parts, tensors).forward(x)
        # Of what is saved autograd notices if it is changed before the backward pass; and a saved
        # parameter is what FSDP2 has gathered again by then.
        ctx.save_for_backward(x, *kept, *tensors)
        ctx.parts, ctx.shape = parts, hidden_states.shape
        return out.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, rest, *tensors = ctx.saved_tensors
        _, _, _, want_input, *want_proxies = ctx.needs_input_grad
        of_input, of_proxies = _plan(ctx.parts, tensors).backward(
            grad.reshape(x.shape).contiguous(), x, (gate, up, rest), want_input, want_proxies
        )
        of_input = None if of_input is None else of_input.view(ctx.shape)
        return None, None, None, of_input, *of_proxies


def _plan(parts: Decoder, tensors: Sequence[Tensor]) -> amx_decoder.Plan:
    """With cosines, sines, weights of norms, codes, scales, and B where it is live."""
    cos, sin, first_norm, second_norm, *rest = tensors
    number = sum(map(len, parts.groups))
    codes, scales, proxies = rest[:number], rest[number : 2 * number], rest[2 * number :]
    groups, at, live = [], 0, 0
    for layers in parts.groups:
        first, end = layers[0], at + len(layers)
        live_end = live + len(layers) * first.live
        group = amx_decoder.Group(
            codes[at:end],
            scales[at:end],
            proxies[live:live_end],
            [layer.bias for layer in layers],
            [layer.lora_scaling for layer in layers],
            first.rank,
            first.recipe.emulate == "fp8",
        )
        groups.append(group)
        at, live = end, live_end
    return amx_decoder.Plan(
        groups,
        (first_norm, second_norm),
        [norm.eps for norm in parts.normed],
        parts.heads,
        parts.kv,
        cos,
        sin,
        parts.ranges.first,
        parts.ranges.last,
        parts.scaling,
    )
