"""A decoder layer of the Llama family as one autograd function, on x86 CPUs with AVX2.

The same operations in the same order as `falqon.blocks` has them module by module, so the same
bits. Between them there is neither autograd nor a call of a module, which together cost a seventh
of a step of a small model. What is kept for the backward pass is what the modules keep.

Shapes: b rows of s tokens, T = b s, n features, d values in a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from falqon.groups import run_together
from falqon.kernels import RmsNormQuantize, SwigluQuantize
from falqon.kernels.native import decoder_layer, melded, ops, products
from falqon.kernels.native.attention import Ranges
from falqon.kernels.native.decoder_layer import MEMBERS, Group, Shape
from falqon.linear import MeldedLinear, has_hooks, is_as_made


class Melded(NamedTuple):
    """The melded layers of a decoder layer, in the order in which they are applied.

    Attributes:
        groups: what those that share an input have in common: q/k/v, o, gate/up, down.
        outs: of each layer, its output features.
        factors: of each, that of its B.
        tensors: of each, codes, scale, B and bias.
    """

    groups: tuple[Group, ...]
    outs: tuple[int, ...]
    factors: tuple[float, ...]
    tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]]


class Decoder(NamedTuple):
    """A decoder layer's parts.

    Attributes:
        shape: sizes and numbers.
        melded: its melded layers.
        norms: weights of the norms before q/k/v and gate/up, [n].
        ranges: which keys each query sees.
    """

    shape: Shape
    melded: Melded
    norms: tuple[Tensor, Tensor]
    ranges: Ranges


def melded_parts(
    groups: Sequence[Sequence[nn.Module]],
    modules: Sequence[nn.Module],
    x: Tensor,
    norms: Sequence[Tensor],
    d: int,
) -> Melded | None:
    """The melded layers of a decoder layer, if it can be run as one.

    Not while a profiler is running: it is to see the parts.

    Args:
        groups: of melded layers that share an input, as in `Melded`.
        modules: everything else that would not be called then; the last three are the norms and
            the activation, each with the quantiser of what it makes.
        x: the decoder layer's input, [b, s, n].
        norms: weights of the norms, [n].
        d: values in a head.
    """
    if not ops.usable(x, *norms) or torch.autograd._profiler_enabled() or not products.attends(d):
        return None
    if torch.nn.modules.module._has_any_global_hook() or not all(map(_is_untouched, modules)):
        return None
    kinds = {type(module) for module in modules[-3:]}
    if kinds != {RmsNormQuantize, SwigluQuantize} or not ops.sums_as_torch():
        return None
    if tuple(map(len, groups)) != MEMBERS:
        return None
    common: list[Group] = []
    outs: list[int] = []
    factors: list[float] = []
    tensors: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    for layers in groups:
        if not run_together(layers):
            return None
        own: Sequence[MeldedLinear] = layers  # type: ignore[assignment]
        first = own[0]
        rank, recipe = first.rank, first.recipe
        if not (is_as_made(own) and melded.follows(recipe)):
            return None
        sides = set()
        for layer in own:
            found = _tensors(layer, rank)
            if found is None or "forward" in vars(layer):
                return None
            rows, columns = found[0].shape
            sides.add(columns)
            outs.append(rows - rank)
            factors.append(layer.lora_scaling)
            tensors.append(found)
        if len(sides) > 1:
            return None
        common.append(Group(sides.pop(), rank, recipe.emulate == "fp8", first.live))
    made = Melded(tuple(common), tuple(outs), tuple(factors), tensors)
    return made if _fit(made, x, norms, d) else None


def _is_untouched(module: nn.Module) -> bool:
    """Nobody wants to see it being called, or to be called instead."""
    return not has_hooks(module) and "forward" not in vars(module)


def _tensors(layer: MeldedLinear, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Codes, scale, B and bias of a layer whose parameters are as they were made, else None."""
    codes, scale, proxy = map(layer._parameters.get, ("codes", "scale", "B"))
    bias = layer.bias
    for t in (codes, scale, proxy):
        if type(t) is not nn.Parameter or not (t.is_cpu and t.is_contiguous()):
            return None
    assert codes is not None and scale is not None and proxy is not None
    if scale.dtype != torch.float32 or proxy.dtype != torch.float32:
        return None
    out = codes.shape[0] - rank
    if proxy.shape != (out, rank):
        return None
    if bias is not None:
        frozen = ops.usable(bias) and bias.is_contiguous() and not bias.requires_grad
        if not frozen or bias.shape != (out,):
            return None
    return codes, scale, proxy, bias


def _fit(of: Melded, x: Tensor, norms: Sequence[Tensor], d: int) -> bool:
    """Whether `products` takes these sizes, and each part what the one before gives.

    The modules say so where it does not.
    """
    into = [group.inputs for group in of.groups]
    q, k, v, output, gate, up, down = of.outs
    n = x.shape[-1]
    return (
        products.fits(x.shape[:-1].numel(), [*into, *of.outs])
        and into == [n, q, n, gate]
        and output == down == n
        and k == v
        and gate == up
        and q % d == k % d == 0
        and all(norm.shape == (n,) and norm.is_contiguous() for norm in norms)
    )


def apply_decoder(parts: Decoder, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a decoder layer.

    Args:
        parts: with layers that `melded_parts` found.
        hidden_states: [b, s, n].
        rotation: cosines and sines, [b or 1, s, d].

    Returns:
        [b, s, n].
    """
    proxies = [proxy for _, _, proxy, _ in parts.melded.tensors]
    out: Tensor = _DecoderFunction.apply(parts, *rotation, hidden_states, *proxies)
    return out


class _DecoderFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Decoder, cos: Tensor, sin: Tensor, hidden_states: Tensor, *_: Tensor
    ) -> Tensor:
        x = hidden_states.contiguous()
        shape, of, seen = parts.shape, parts.melded, (parts.ranges.first, parts.ranges.last)
        codes, scales, proxies, biases = zip(*of.tensors, strict=True)
        acting = [group.pending for group in of.groups]
        if not all(acting):
            live = [act for act, n in zip(acting, MEMBERS, strict=True) for _ in range(n)]
            proxies = tuple(p if act else None for p, act in zip(proxies, live, strict=True))
        before = (cos.contiguous(), sin.contiguous(), *parts.norms)
        behind = (*codes, *scales, *proxies)
        out, kept = decoder_layer.forward(shape, (*before, *seen, *behind, *biases), x)
        # Of what is saved autograd notices if it is changed before the backward pass; and a saved
        # parameter is what FSDP2 has gathered again by then. Ranges are nobody else's, and may have
        # been made in inference mode; biases are not needed again.
        ctx.save_for_backward(x, *kept, *before, *behind)
        ctx.shape, ctx.seen = shape, seen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, rest, *saved = ctx.saved_tensors
        _, _, _, want_input, *want_proxies = ctx.needs_input_grad
        tensors = (*saved[:4], *ctx.seen, *saved[4:], *[None] * len(want_proxies))  # no biases
        kept = (gate, up, rest)
        of_input, of_proxies = decoder_layer.backward(
            ctx.shape, tensors, grad.contiguous(), x, kept, want_input, want_proxies
        )
        return None, None, None, of_input, *of_proxies
