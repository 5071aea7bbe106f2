"""Melded layers that share one input, as q/k/v and gate/up do: run together, or one by one.

The members of a group stay modules of their own, with their own parameters. `tie` lays their codes
one behind the other in memory; the kernels then see one matrix without a copy. Nothing depends on
it but speed: where the codes lie is looked at whenever they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, Format
from falqon.kernels import RmsNormQuantize, SwigluQuantize
from falqon.kernels.operands import are_consecutive
from falqon.linear import MeldedLinear, apply_melded, has_hooks
from falqon.recipe import Fp8Recipe


def reason_against(layers: Sequence[nn.Module]) -> str | None:
    """Why layers with one input cannot be a group; None if they can."""
    if not all(type(layer) is MeldedLinear for layer in layers):
        return "not all of its layers are melded"
    kinds = {(m.recipe, m.rank, m.in_features) for m in layers if isinstance(m, MeldedLinear)}
    return None if len(kinds) == 1 else "its layers differ in recipe, rank or input"


def fuses_quantizer(recipe: Fp8Recipe) -> bool:
    """Whether what makes a layer's input can quantise it at once: one dynamic scale a token.

    A scale for the whole tensor is known only when all of it is made. A recipe that rounds weights
    alone has nothing to quantise, and what makes the input is one operation all the same.
    """
    kind = (recipe.emulate, recipe.activations, recipe.scaling)
    return recipe.emulate == "weights" or kind == ("fp8", "per_token", "dynamic")


def _format(recipe: Fp8Recipe) -> Format | None:
    return E4M3 if recipe.emulate == "fp8" else None


def norm_quantizer(layer: MeldedLinear, eps: float) -> RmsNormQuantize | None:
    """RMSNorm and quantiser in one for a layer's input; None if its recipe does not allow it."""
    if not fuses_quantizer(layer.recipe):
        return None
    return RmsNormQuantize(eps, _format(layer.recipe), layer.recipe.scale_rounding)


def swiglu_quantizer(layer: MeldedLinear) -> SwigluQuantize | None:
    """SwiGLU and quantiser in one for a layer's input; None if its recipe does not allow it."""
    if not fuses_quantizer(layer.recipe):
        return None
    return SwigluQuantize(_format(layer.recipe), layer.recipe.scale_rounding)


def run_together(layers: Sequence[nn.Module]) -> bool:
    """Whether layers, which were once found to be a group, can be run as one now.

    Layers that were wrapped or replaced since, or that have hooks (which observe inputs or gather
    shards), have to be called one by one.
    """
    return (
        all(type(layer) is MeldedLinear and not has_hooks(layer) for layer in layers)
        and len({layer.live for layer in layers}) == 1
    )


def apply_group(
    layers: Sequence[nn.Module],
    x: Tensor,
    norm: nn.Module | None = None,
    quantizer: RmsNormQuantize | None = None,
) -> list[Tensor]:
    """Outputs of layers with one input.

    Forward results are those of the layers one by one, to the last bit wherever the GEMM adds up in
    the same order (`native.products` takes a group if it takes all of its layers, and rounds
    pending changes otherwise than torch). The gradient of the input is one GEMM over all layers: it
    is rounded once and not once a layer, and with scales that are not powers of two its FP8
    rounding differs, too.

    With delayed scaling the first layer's quantisers serve, and observe for, the group: the input
    is the same for all, and gradients are in units of its weight scale. The others keep no history.

    Args:
        layers: what `reason_against` found nothing against.
        x: [..., in], their input; with `norm`, what is normed first.
        norm: RMSNorm before the layers, with `weight`.
        quantizer: norm and quantiser in one, with the norm's epsilon; None to norm first.

    Returns:
        [..., out_i] for each layer, in the dtype of `x`.
    """
    if run_together(layers):
        melded: Sequence[MeldedLinear] = layers  # type: ignore[assignment]
        if norm is not None and quantizer is not None and _is_fusible(norm, x):
            return apply_melded(melded, x, norm.weight, source=quantizer)  # type: ignore[arg-type]
        return apply_melded(melded, x if norm is None else norm(x))
    x = x if norm is None else norm(x)
    return [layer(x) for layer in layers]


def _is_fusible(norm: nn.Module, x: Tensor) -> bool:
    """The fused norm calls no module, has no gradient for the weight, and knows one dtype."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.dtype == x.dtype and not weight.requires_grad and not has_hooks(norm)


_TIES = ContextVar("ties", default=True)


@contextmanager
def untied() -> Iterator[None]:
    """Within it codes stay where they are: what is going to be cut up need not be laid together."""
    token = _TIES.set(False)
    try:
        yield
    finally:
        _TIES.reset(token)


@torch.no_grad()
def tie(layers: Sequence[nn.Module]) -> bool:
    """Lay the codes of a group's layers one behind the other, in one piece of memory.

    Their parameters stay the objects they are; copying into them keeps the tie. Casts, copies of
    the module and moves to another device do not, so call it after these. Not for parameters that
    somebody else keeps the memory of, such as shards: those are left alone.

    Args:
        layers: what `reason_against` found nothing against.

    Returns:
        Whether the codes are consecutive now.
    """
    codes = [layer.codes for layer in layers if isinstance(layer, MeldedLinear)]
    plain = all(type(c) is nn.Parameter and type(c.data) is Tensor for c in codes)
    if len(codes) != len(layers) or not plain or codes[0].is_meta or not _TIES.get():
        return False
    if len({(c.device, c.dtype) for c in codes}) > 1:
        return False
    if not are_consecutive(codes):
        parts = torch.cat([c.data for c in codes]).split([len(c) for c in codes])
        for parameter, part in zip(codes, parts, strict=True):
            parameter.data = part
    return True
