"""QLoRA (arXiv:2305.14314): LoRA over NF4 weights with quantised scales, from bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.layers import check_rank, plain_linear, swap_linears
from lit_modules.methods.lora import LoRA


def bitsandbytes(method: str) -> Any:
    """The package, or an error that says how to get it.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise InputError(
            f"the method {method} needs bitsandbytes: pip install 'falqon[methods]'."
        ) from error
    return bnb


def nf4_linear(bnb: Any, weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Module:
    """A frozen layer of NF4 codes in blocks of 64, scales in 8 bits in blocks of 256.

    Its matmul is in the weight's dtype. The layout that bitsandbytes switches to in evaluation mode
    on CPUs with AVX512-BF16 is switched off: it rounds the scales, cannot be undone exactly, and
    gives the input no gradient when training goes on after a validation.

    Args:
        bnb: The package.
        weight: [out, in] in 16 or 32 bits.
        bias: [out], or None.
        device: Where to quantise and to stay.
    """
    with torch.device("meta"):
        linear = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    linear.weight = bnb.nn.Params4bit(
        weight.detach(),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=linear,
    )
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    linear.support_avx512bf16_for_cpu = False
    return linear.to(device)


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] that a layer of NF4 codes stands for, in the dtype it computes in."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def merge_lora(model: Any, dequantize: Any) -> nn.Module:
    """Replace peft's LoRA layers over quantised ones by plain layers with the merged weight.

    Args:
        model: peft's wrapper; it is used up.
        dequantize: From a quantised layer to its weight [out, in].
    """
    from peft.tuners.lora import LoraLayer

    plain = model.get_base_model()
    dtype = plain.get_input_embeddings().weight.dtype
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            weight = dequantize(base).float() + layer.get_delta_weight("default").float()
            plain.set_submodule(name, plain_linear(weight.to(dtype), base.bias))
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(plain, flag, False)
    return plain


class QLoRA(LoRA):
    """LoRA over a base in NF4 with double quantisation, computing in bfloat16 (eq. 5 of the paper).

    Settings: as LoRA's, with the frozen linear layers in NF4 (4.127 bits a weight). On a CPU
    bitsandbytes decodes each weight to bfloat16 and multiplies there.
    """

    name = "qlora"

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Quantise the linear layers one by one, then put the adapters in."""
        bnb = bitsandbytes(self.name)
        check_rank(model, self.rank)
        layers = swap_linears(model, lambda _, x: nf4_linear(bnb, x.weight, x.bias, self.device))
        setattr(model, "is_loaded_in_4bit", True)  # so peft takes its layers for these  # noqa: B010
        return self.wrap(model, list(layers))

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Decode the codes and add alpha / r B A, in the dtype of the embeddings.

        Not peft's own merge, which quantises the sum again.
        """
        return merge_lora(model, dequantized)
