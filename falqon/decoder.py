"""A decoder layer of the Llama family as one autograd function, for the compiled CPU path.

The same operations in the same order as `falqon.blocks` has them module by module, so the same
bits. Between them there is neither autograd nor a call of a module, which together cost a tenth of
a step of a small model. What is kept for the backward pass is what the modules keep.

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
from falqon.kernels.native import attention, melded, ops
from falqon.linear import MeldedLinear, bias_gradient, has_hooks, is_as_made


class Decoder(NamedTuple):
    """A decoder layer's parts, in the order in which they are applied.

    Attributes:
        heads, output, gated, down: melded layers that share an input: q/k/v, o, gate/up, down.
        norms: weights of the norms before `heads` and `gated`, [n].
        normed: these norms, each with the quantiser of what it makes.
        activation: SwiGLU with the quantiser of what it makes.
        way: how attention is computed.
    """

    heads: Sequence[MeldedLinear]
    output: Sequence[MeldedLinear]
    gated: Sequence[MeldedLinear]
    down: Sequence[MeldedLinear]
    norms: tuple[Tensor, Tensor]
    normed: tuple[RmsNormQuantize, RmsNormQuantize]
    activation: SwigluQuantize
    way: attention.Way

    def groups(self) -> tuple[Sequence[MeldedLinear], ...]:
        """The melded layers, group by group."""
        return self.heads, self.output, self.gated, self.down


def takes(groups: Sequence[Sequence[nn.Module]], modules: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether melded layers can be part of a decoder layer that is run as one.

    Args:
        groups: of melded layers that share an input.
        modules: everything else that would not be called then.
        x: the decoder layer's input.
    """
    if any(map(has_hooks, modules)) or any("forward" in vars(module) for module in modules):
        return False  # transformers replaces `forward` of what it records
    for layers in groups:
        if not run_together(layers) or any("forward" in vars(layer) for layer in layers):
            return False
        own: Sequence[MeldedLinear] = layers  # type: ignore[assignment]
        codes = [layer.codes for layer in own]
        if not is_as_made(own) or not melded.takes(own[0].recipe, codes, [x]):
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
    tensors = [
        tensor
        for layers in parts.groups()
        for tensor in (*(layer.B for layer in layers), *(layer.bias for layer in layers))
    ]
    with torch.autocast(hidden_states.device.type, enabled=False):
        out: Tensor = _DecoderFunction.apply(parts, *rotation, hidden_states, *tensors)
    return out


class _DecoderFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Decoder,
        cos: Tensor,
        sin: Tensor,
        hidden_states: Tensor,
        *_: Tensor | None,
    ) -> Tensor:
        leading = hidden_states.shape[:-1]
        x = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        cos, sin = cos.contiguous(), sin.contiguous()
        values, of_x = parts.normed[0].values(x, parts.norms[0])
        outs, of_heads = _forward(parts.heads, values)
        query, key, value = (out.view(*leading, -1, cos.shape[-1]) for out in outs)
        attended, kept = parts.way.forward(query, key, value, cos, sin)
        (values,) = parts.output[0].quantize_input.values(  # type: ignore[operator]
            attended.view(len(x), -1)
        )
        (middle,), of_output = _forward(parts.output, values, onto=x)
        values, of_middle = parts.normed[1].values(middle, parts.norms[1])
        (gate, up), of_gated = _forward(parts.gated, values)
        (values,) = parts.activation.values(gate, up)
        (out,), of_down = _forward(parts.down, values, onto=middle)
        ctx.parts, ctx.shape = parts, hidden_states.shape
        ctx.counts = [len(some) for some in (of_heads, of_output, of_gated, of_down)]
        ctx.save_for_backward(
            *(*of_heads, *of_output, *of_gated, *of_down),
            *(x, of_x, middle, of_middle, *parts.norms, gate, up, cos, sin, *kept),
        )
        return out.view(hidden_states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts: Decoder = ctx.parts
        saved = list(ctx.saved_tensors)
        steps = []
        _, _, _, need_input, *needed = ctx.needs_input_grad
        for layers, count in zip(parts.groups(), ctx.counts, strict=True):
            need, needed = needed[: 2 * len(layers)], needed[2 * len(layers) :]
            steps.append(_Backward(layers, saved[:count], need, need_input))
            saved, need_input = saved[count:], need_input or any(need)
        of_heads, of_output, of_gated, of_down = steps
        x, of_x, middle, of_middle, first, second, gate, up, cos, sin, *kept = saved
        grad = grad.reshape(-1, grad.shape[-1])
        if of_down.needs_any():
            of_activation = of_down.run([grad])
        if of_gated.needs_any():
            of_values = of_gated.run(parts.activation.backward(of_activation, gate, up))
        if of_output.needs_any():
            grad = ops.rms_norm_grad(of_values, middle, second, of_middle, grad)
            of_attended = of_output.run([grad])
        if of_heads.needs_any():
            heads = of_attended.view(*ctx.shape[:-1], -1, cos.shape[-1])
            of_split = parts.way.backward(heads, kept, cos, sin)
            of_values = of_heads.run([part.reshape(len(grad), -1) for part in of_split])
        of_input = None
        if of_heads.want_input:
            of_input = ops.rms_norm_grad(of_values, x, first, of_x, grad).view(ctx.shape)
        return None, None, None, of_input, *chain.from_iterable(step.results for step in steps)


def _forward(
    layers: Sequence[MeldedLinear], values: Tensor, onto: Tensor | None = None
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Outputs of layers with one input, of a single one plus `onto`; and what `_Backward` takes."""
    codes, scales = [layer.codes for layer in layers], [layer.scale for layer in layers]
    live = [layer.B for layer in layers] if layers[0].live else []
    biases, factors = [layer.bias for layer in layers], [layer.lora_scaling for layer in layers]
    outs, adapters = melded.forward(
        values, codes, scales, biases, layers[0].rank, live, factors, onto
    )
    return outs, (*adapters, *codes, *scales, *live)


class _Backward:
    """The backward pass of layers with one input.

    Args:
        layers: of the group.
        saved: what `_forward` gave.
        needed: whether there is to be a gradient of each B, then of each bias.
        want_input: whether there is to be one of the input.

    Attributes:
        results: gradients of each B, then of each bias.
    """

    def __init__(
        self,
        layers: Sequence[MeldedLinear],
        saved: Sequence[Tensor],
        needed: Sequence[bool],
        want_input: bool,
    ) -> None:
        self.layers, self.saved, self.needed = layers, saved, needed
        self.want_input = want_input
        self.results: list[Tensor | None] = [None] * len(needed)

    def needs_any(self) -> bool:
        """Whether there is anything to do."""
        return self.want_input or any(self.needed)

    def run(self, grads: Sequence[Tensor]) -> Tensor:
        """Make `results` from the gradients of the outputs [T, out_i].

        Returns:
            Gradient of the input [T, in]; empty if it is not wanted.
        """
        number, first = len(self.layers), self.layers[0]
        adapters, codes, scales, live = (
            self.saved[i : i + number] for i in range(0, 4 * number, number)
        )
        of_input, proxies = melded.backward(
            grads,
            codes,
            scales,
            first.rank,
            live,
            [layer.lora_scaling for layer in self.layers],
            adapters,
            first.recipe.emulate == "fp8",
            self.want_input,
            self.needed[:number],
        )
        pairs = zip(grads, self.needed[number:], strict=True)
        self.results = [*proxies, *(bias_gradient(g) if need else None for g, need in pairs)]
        return grads[0].new_empty(0) if of_input is None else of_input
