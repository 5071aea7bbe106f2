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
from falqon.kernels import RmsNormQuantize, SwigluQuantize
from falqon.kernels.native import amx, amx_decoder, melded, ops
from falqon.kernels.native.attention import Ranges
from falqon.linear import MeldedLinear, has_hooks, is_as_made


class Decoder(NamedTuple):
    """A decoder layer's parts.

    Attributes:
        groups: melded layers that share an input, in the order in which they are applied: q/k/v, o,
            gate/up, down.
        live: whether the change that is pending acts, for each group.
        norms: weights of the norms before q/k/v and gate/up, [n].
        normed: these norms, each with the quantiser of what it makes.
        heads, kv: numbers of heads of queries and of keys.
        ranges: which keys each query sees.
        scaling: of the scores.
    """

    groups: tuple[Sequence[MeldedLinear], ...]
    live: tuple[bool, ...]
    norms: tuple[Tensor, Tensor]
    normed: tuple[RmsNormQuantize, RmsNormQuantize]
    heads: int
    kv: int
    ranges: Ranges
    scaling: float


def takes(
    groups: Sequence[Sequence[nn.Module]],
    modules: Sequence[nn.Module],
    x: Tensor,
    norms: Sequence[Tensor],
    d: int,
) -> bool:
    """Whether melded layers can be part of a decoder layer that is run as one.

    Not while a profiler is running: it is to see the parts.

    Args:
        groups: of melded layers that share an input, as in `Decoder`.
        modules: everything else that would not be called then.
        x: the decoder layer's input, [b, s, n].
        norms: weights of the norms.
        d: values in a head.
    """
    if not ops.usable(x, *norms) or torch.autograd._profiler_enabled() or not amx.attends(d):
        return False
    if torch.nn.modules.module._has_any_global_hook() or not all(map(_is_untouched, modules)):
        return False
    kinds = {type(module) for module in modules[-3:]}
    if kinds != {RmsNormQuantize, SwigluQuantize} or not ops.sums_as_torch():
        return False
    sides = []
    for layers in groups:
        if not run_together(layers) or any("forward" in vars(layer) for layer in layers):
            return False
        own: Sequence[MeldedLinear] = layers  # type: ignore[assignment]
        if not (is_as_made(own) and melded.follows(own[0].recipe)):
            return False
        found = [_sides(layer, own[0].rank) for layer in own]
        if None in found:
            return False
        sides.append(found)
    return _fit(sides, x, norms, d)  # type: ignore[arg-type]


def _is_untouched(module: nn.Module) -> bool:
    """Nobody wants to see it being called, or to be called instead."""
    return not has_hooks(module) and "forward" not in vars(module)


def _sides(layer: MeldedLinear, rank: int) -> tuple[int, int] | None:
    """Input and output features of a layer whose parameters are as they were made, else None."""
    codes, scale, proxy = map(layer._parameters.get, ("codes", "scale", "B"))
    bias = layer.bias
    for t in (codes, scale, proxy):
        if type(t) is not nn.Parameter or not (t.is_cpu and t.is_contiguous()):
            return None
    assert codes is not None and scale is not None and proxy is not None
    rows, columns = codes.shape
    if scale.dtype != torch.float32 or proxy.dtype != torch.float32:
        return None
    if proxy.shape != (rows - rank, rank):
        return None
    if bias is not None:
        frozen = ops.usable(bias) and bias.is_contiguous() and not bias.requires_grad
        if not frozen or bias.shape != (rows - rank,):
            return None
    return columns, rows - rank


def _fit(
    sides: Sequence[Sequence[tuple[int, int]]], x: Tensor, norms: Sequence[Tensor], d: int
) -> bool:
    """Whether AMX takes these sizes, and each part what the one before gives.

    The modules say so where it does not.
    """
    if [len(layers) for layers in sides] != [3, 1, 2, 1]:
        return False
    (q, k, v), (output,), (gate, up), (down,) = sides
    n = x.shape[-1]
    return (
        amx.fits(x.shape[:-1].numel(), [side for some in sides for both in some for side in both])
        and q[0] == k[0] == v[0] == output[1] == gate[0] == up[0] == down[1] == n
        and q[1] == output[0]
        and k[1] == v[1]
        and gate[1] == up[1] == down[0]
        and q[1] % d == k[1] % d == 0
        and all(norm.shape == (n,) and norm.is_contiguous() for norm in norms)
    )


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
        x = hidden_states.contiguous()
        layers = list(chain.from_iterable(parts.groups))
        pairs = zip(parts.groups, parts.live, strict=True)
        tensors = [
            *(cos.contiguous(), sin.contiguous(), *parts.norms),
            *(layer.codes for layer in layers),
            *(layer.scale for layer in layers),
            *(layer.B for some, live in pairs if live for layer in some),
        ]
        out, kept = _plan(parts, tensors).forward(x)
        # Of what is saved autograd notices if it is changed before the backward pass; and a saved
        # parameter is what FSDP2 has gathered again by then.
        ctx.save_for_backward(x, *kept, *tensors)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, rest, *tensors = ctx.saved_tensors
        _, _, _, want_input, *want_proxies = ctx.needs_input_grad
        of_input, of_proxies = _plan(ctx.parts, tensors).backward(
            grad.contiguous(), x, (gate, up, rest), want_input, want_proxies
        )
        return None, None, None, of_input, *of_proxies


def _plan(parts: Decoder, tensors: Sequence[Tensor]) -> amx_decoder.Plan:
    """With cosines, sines, weights of norms, codes, scales, and B where it is live."""
    cos, sin, first_norm, second_norm, *rest = tensors
    number = sum(map(len, parts.groups))
    codes, scales, proxies = rest[:number], rest[number : 2 * number], rest[2 * number :]
    groups, at, acting = [], 0, 0
    for layers, live in zip(parts.groups, parts.live, strict=True):
        first, end = layers[0], at + len(layers)
        acting_end = acting + len(layers) * live
        group = amx_decoder.Group(
            codes[at:end],
            scales[at:end],
            proxies[acting:acting_end],
            [layer.bias for layer in layers],
            [layer.lora_scaling for layer in layers],
            first.rank,
            first.recipe.emulate == "fp8",
        )
        groups.append(group)
        at, acting = end, acting_end
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
