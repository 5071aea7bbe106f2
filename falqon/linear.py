"""MeldedLinear: an FP8 linear layer that is backbone and LoRA adapter in one (paper sec. 4).

Shapes: T tokens, `in`/`out` features, r adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from falqon.fp8 import E4M3, E5M2, dequantize
from falqon.kernels import (
    BackboneMatmul,
    MeldedMatmul,
    PassThrough,
    ProxyGrad,
    Quantize,
    joined_gradients,
    pending_gradient,
)
from falqon.kernels.native import melded
from falqon.recipe import Fp8Recipe

unsafe_view = torch.ops.aten._unsafe_view.default
"""As `view`, which a Function's output must not be: it may then not be changed in place."""


def has_hooks(module: nn.Module, besides_fsdp: bool = False) -> bool:
    """Whether somebody wants to see the module being called.

    Args:
        module: to look at.
        besides_fsdp: leave out FSDP2's hooks, which gather the weights and look at nothing.
    """
    before, after = module._forward_pre_hooks, module._forward_hooks
    back_before, back = module._backward_pre_hooks, module._backward_hooks
    if not (before or after or back_before or back):  # nearly always, and asked for thousands of
        return False  # times a step
    every = chain.from_iterable(found.values() for found in (before, after, back_before, back))
    return any(not (besides_fsdp and _is_of_fsdp(hook)) for hook in every)


def _is_of_fsdp(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", None))
    return owner.__module__.startswith("torch.distributed.fsdp.")


class _MeldedFunction(torch.autograd.Function):
    """Alg. 2 forward, Alg. 3 backward of layers with one input; see `apply_melded`.

    Of each layer only O_A [T, r] is saved. The input is not, unless it has to be derived from what
    comes in (a norm or a gated activation, fused with its quantiser): then that is saved instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[MeldedLinear],
        source: nn.Module | None,
        count: int,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        parameters = tensors[count:]
        # A view made here of what needs a gradient would have no place in the graph; a detached one
        # needs none. Of the inputs only the first is rows even with one dimension.
        given = [t.detach() for t in tensors[:count]]
        inputs = [t if i and t.dim() == 1 else _as_rows(t) for i, t in enumerate(given)]
        codes, scales, proxies, biases = (
            parameters[i : i + len(layers)] for i in range(0, len(parameters), len(layers))
        )
        first, dtype = layers[0], inputs[0].dtype
        quantize = first.quantize_input if source is None else source
        native = _has_own_steps(first, quantize) and melded.takes(first.recipe, codes, inputs)
        live = proxies if first.live else ()
        if native:
            x_values, *extra = quantize.values(*inputs)  # type: ignore[operator]
            factors = [layer.lora_scaling for layer in layers]
            outs, adapters = melded.forward(
                x_values, codes, scales, biases, first.rank, live, factors
            )
        else:
            pending = [_scaled(p, layer) for p, layer in zip(live, layers, strict=bool(live))]
            x_codes, x_scale, *extra = quantize(*inputs)
            outs, adapters = first.melded_matmul(
                x_codes, x_scale, codes, scales, biases, dtype, pending
            )
        # B is saved rather than read from the layer in backward: autograd then refuses a B that was
        # changed in between.
        kept = () if source is None else (*inputs, *extra)
        ctx.save_for_backward(*adapters, *codes, *scales, *live, *kept)
        ctx.layers, ctx.source, ctx.count, ctx.live = layers, source, count, first.live
        ctx.native, ctx.shapes = native, [t.shape for t in tensors[:count]]
        leading = tensors[0].shape[:-1]
        return tuple(unsafe_view(out, [*leading, out.shape[-1]]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers, count, number = ctx.layers, ctx.count, len(ctx.layers)
        grads = tuple(_as_rows(grad) for grad in grads)
        first: MeldedLinear = layers[0]
        saved = list(ctx.saved_tensors)
        adapters, codes, scales = (saved[i * number : (i + 1) * number] for i in range(3))
        live = saved[3 * number : 4 * number] if ctx.live else []
        kept = saved[(3 + ctx.live) * number :]
        _, _, _, *needed = ctx.needs_input_grad
        need_input = any(needed[:count])
        need_proxy, need_bias = (needed[count + i * number :][:number] for i in (2, 3))
        at_once = ctx.native and all(map(_has_own_proxy_grad, layers))
        grad_input = None
        grad_proxies: list[Tensor | None] = [None] * number
        if ctx.native:
            factors = [layer.lora_scaling for layer in layers]
            given = (grads, codes, scales, first.rank, live, factors, adapters)
            wanted = (need_input, need_proxy if at_once else [False] * number)
            rounded = first.recipe.emulate == "fp8"
            grad_input, grad_proxies = melded.backward(*given, rounded, *wanted)
        elif need_input:
            pending = [_scaled(p, layer) for p, layer in zip(live, layers, strict=bool(live))]
            joined = joined_gradients(grads, scales, first.backbone_matmul.power_of_two)
            grad_codes, grad_scale = first.quantize_gradient(joined)
            onto = pending_gradient(grads, pending, codes, scales) if pending else None
            grad_input = first.backbone_matmul(
                grad_codes, grad_scale, codes, scales[0], grads[0].dtype, onto
            )
        if not at_once:
            parts = zip(need_proxy, layers, grads, adapters, strict=True)
            grad_proxies = [
                _scaled(layer.proxy_grad(grad, adapter), layer) if need else None
                for need, layer, grad, adapter in parts
            ]
        grad_inputs: Sequence[Tensor | None] = [None] * count
        if grad_input is not None:
            source = ctx.source
            rows = [grad_input] if source is None else source.backward(grad_input, *kept)
            shapes = zip(rows, ctx.shapes, strict=True)
            grad_inputs = [None if grad is None else grad.view(shape) for grad, shape in shapes]
        grad_biases = [
            grad.sum(dim=0, dtype=torch.float32).to(grad.dtype) if need else None
            for need, grad in zip(need_bias, grads, strict=True)
        ]
        nothing = [None] * (2 * number)  # for codes and scales
        return None, None, None, *grad_inputs, *nothing, *grad_proxies, *grad_biases


# Below, modules are looked up where they are kept: it is asked for hundreds of times a step.


def is_as_made(layers: Sequence[MeldedLinear]) -> bool:
    """Whether nobody replaced or watches a step that layers with one input are made of."""
    first = layers[0]
    quantize, of_gradient = map(first._modules.get, ("quantize_input", "quantize_gradient"))
    kinds = {type(quantize), type(of_gradient)}
    own = kinds <= {Quantize, PassThrough} and _has_own_steps(first, quantize)  # type: ignore[arg-type]
    return own and all(map(_has_own_proxy_grad, layers))


def _has_own_steps(first: MeldedLinear, quantize: nn.Module) -> bool:
    # Whoever replaced a step (tensor parallelism) or looks at one wants it to be called.
    names = ("quantize_gradient", "melded_matmul", "backbone_matmul")
    of_gradient, melded_matmul, backbone_matmul = map(first._modules.__getitem__, names)
    own = type(melded_matmul) is MeldedMatmul and type(backbone_matmul) is BackboneMatmul
    steps = (quantize, of_gradient, melded_matmul, backbone_matmul)
    return own and not any(map(has_hooks, steps))  # type: ignore[arg-type]


def _has_own_proxy_grad(layer: MeldedLinear) -> bool:
    step = layer._modules["proxy_grad"]
    return type(step) is ProxyGrad and not has_hooks(step)


def _as_rows(x: Tensor) -> Tensor:
    """[..., n] as [T, n]."""
    return x.reshape(-1, x.shape[-1])


def _scaled(proxy: Tensor, layer: MeldedLinear) -> Tensor:
    return proxy if layer.lora_scaling == 1 else proxy * layer.lora_scaling


def apply_melded(
    layers: Sequence[MeldedLinear], *inputs: Tensor, source: nn.Module | None = None
) -> list[Tensor]:
    """Apply melded layers to one input: quantised once, one GEMM forward, one to the input.

    The first layer's modules and settings are used for all of them, so what layers can be a group
    is a question to `falqon.groups.reason_against`. A single layer is a group of one.

    Args:
        layers: one or more, of equal recipe and rank.
        inputs: [..., n]: the layers' input, or what `source` makes it from. Of those behind the
            first, one-dimensional ones (the weight of a norm) are passed on as they are.
        source: gives codes [T, in] and scale of the layers' input, and anything more that its
            `backward` takes after the gradient and the inputs.

    Returns:
        [..., out_i] for each layer, in the dtype of the input.

    Raises:
        ValueError: if the input does not have the layers' number of features.
    """
    first, x = layers[0], inputs[0]
    if x.shape[-1] != first.in_features:
        raise ValueError(
            f"input has {x.shape[-1]} features, the layer takes {first.in_features} "
            f"(input shape {tuple(x.shape)})"
        )
    parameters = (
        *(layer.codes for layer in layers),
        *(layer.scale for layer in layers),
        *(layer.B for layer in layers),
        *(layer.bias for layer in layers),
    )
    arguments = (layers, source, len(inputs), *inputs, *parameters)
    if not torch.is_autocast_enabled(x.device.type):
        return list(_MeldedFunction.apply(*arguments))
    # It would turn float32 operands into 16-bit ones; the input's dtype decides here.
    with torch.autocast(x.device.type, enabled=False):
        return list(_MeldedFunction.apply(*arguments))


class MeldedLinear(nn.Module):
    """A linear layer whose FP8 weight carries a LoRA adapter already (paper eq. 9 to 15).

    `DQ(codes[:out])` is read as the original weight plus an adapter whose B is implied by the
    quantisation error; `DQ(codes[out:])` is its A, used for gradients. B, the only trainable
    tensor, is a buffer of changes that `falqon.proxy.ProxyUpdate` writes into the codes; it takes
    no part in the forward pass unless the layer is `live`.

    Make one from an `nn.Linear` with `falqon.meld.meld_linear`; a new one has zero weights.

    Args:
        in_features, out_features: as in `nn.Linear`.
        rank: r.
        bias: have a bias (frozen).
        recipe: FP8 recipe.
        device: of the parameters.
        dtype: of the bias.
        lora_scaling: factor of B A, LoRA's alpha / r.

    Attributes:
        codes: uint8 [out + r, in], frozen (with `emulate: none` float32): E4M3 bytes of the
            backbone, then of A.
        scale: float32 [1], frozen: value = code value / scale.
        B: float32 [out, r], trainable, zero at first.
        bias: [out] or None, frozen.
        live: the change that B holds acts in forward and backward: `O + O_A B^T`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        recipe: Fp8Recipe | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        lora_scaling: float = 1.0,
    ) -> None:
        super().__init__()
        recipe = recipe or Fp8Recipe()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.recipe = recipe
        self.lora_scaling = lora_scaling
        self.live = False
        exact = recipe.emulate == "none"

        def parameter(
            shape: tuple[int, ...], kind: torch.dtype, train: bool = False
        ) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=kind, device=device), requires_grad=train)

        self.codes = parameter(
            (out_features + rank, in_features), torch.float32 if exact else torch.uint8
        )
        self.scale = parameter((1,), torch.float32)
        self.scale.data.fill_(1.0)
        self.B = parameter((out_features, rank), torch.float32, train=True)
        self.bias = parameter((out_features,), dtype) if bias else None

        delayed = recipe.scaling == "delayed"
        self.quantize_input: nn.Module = PassThrough()
        self.quantize_gradient: nn.Module = PassThrough()
        if recipe.emulate == "fp8":
            self.quantize_input = Quantize(E4M3, recipe.activations, recipe.scale_rounding, delayed)
            self.quantize_gradient = Quantize(
                E5M2, recipe.gradients, recipe.scale_rounding, delayed
            )
        exact_scales = recipe.weight_scale_rounding == recipe.scale_rounding == "power_of_two"
        self.melded_matmul = MeldedMatmul(rank, exact_scales)
        self.backbone_matmul = BackboneMatmul(rank, exact_scales)
        self.proxy_grad = ProxyGrad()

    def forward(self, x: Tensor, *more: Tensor, source: nn.Module | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in], bfloat16, float16 or float32.
            more, source: as `apply_melded` takes them, where `source` makes the input.

        Returns:
            [..., out] in the dtype of `x`.

        Raises:
            ValueError: if the last dimension of `x` is not `in`.
        """
        return apply_melded((self,), x, *more, source=source)[0]

    @torch.no_grad()
    def pending(self) -> Tensor:
        """B times the LoRA scaling, float32 [out, r]: the pending change is this times A."""
        return self.B.detach() * self.lora_scaling

    @torch.no_grad()
    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The backbone's values, [out, in]: what is served. The change that B holds is not in."""
        return self._values(self.codes[: self.out_features], dtype)

    @torch.no_grad()
    def dequantized_adapter(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A as it acts on inputs, [r, in]."""
        return self._values(self.codes[self.out_features :], dtype)

    def _values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if codes.dtype != torch.uint8:
            return codes.to(dtype, copy=True)  # as with FP8, never a view of the live weight
        return dequantize(codes, self.scale, E4M3, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeldedLinear:
        # model.to(bfloat16) and the like must not round the scale, B or exact weights.
        kept = {
            name: (p.data, None if p.grad is None else p.grad.detach())
            for name, p in self.named_parameters(recurse=False)
            if name != "bias"
        }
        super()._apply(fn, recurse)
        for name, (before, grad) in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = state_dict.get(prefix + "codes")
        if codes is not None and codes.dtype != self.codes.dtype:
            # copy_ would convert the numbers, not the bytes, without a word.
            raise ValueError(
                f"{prefix}codes is {codes.dtype} in the state dict and {self.codes.dtype} in the "
                "layer: it belongs to another recipe, or float8 codes need .view(torch.uint8)."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, codes={str(self.codes.dtype).removeprefix('torch.')}"
        )
