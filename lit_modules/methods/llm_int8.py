"""LoRA over LLM.int8 weights (arXiv:2208.07339), from bitsandbytes and peft."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import Weights
from lit_modules.methods.layers import check_rank, swap_linears
from lit_modules.methods.lora import LoRA
from lit_modules.methods.qlora import bitsandbytes, merge_lora


def int8_linear(bnb: Any, linear: nn.Linear, threshold: float, device: torch.device) -> nn.Module:
    """A frozen layer with int8 codes and one scale a row; inputs are quantised a token at a time.

    Args:
        bnb: The package.
        linear: Its weight in 16 or 32 bits.
        threshold: Input features with a magnitude above it are multiplied in 16 bits.
        device: Where to quantise and to stay.
    """
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
        )
    layer.weight = bnb.nn.Int8Params(
        linear.weight.detach(), has_fp16_weights=False, requires_grad=False
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer.to(device)


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] of int8 codes, float32: codes times the row's amax / 127."""
    state = layer.state
    codes = layer.weight.data if state.CB is None else state.CB
    scales = layer.weight.SCB if state.SCB is None else state.SCB
    return codes.float() * scales.float()[:, None] / 127


class LLMInt8LoRA(LoRA):
    """LoRA over a base with int8 weights and inputs, outlier features in 16 bits.

    Settings: as LoRA's, with the frozen linear layers in int8. bitsandbytes quantises inputs from
    float16 and computes the backward pass with decoded weights.

    Args:
        rank: r.
        alpha: The product is multiplied by alpha / r.
        threshold: Input features above this magnitude are outliers; 0 for none.
        adapters: What A and B are kept in, `fp32` or `bf16`.
        seed: Of the start of A.
    """

    name = "llm_int8"

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        threshold: float = 6.0,
        adapters: Weights = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(rank, alpha, adapters, seed)
        if threshold < 0:
            raise InputError(f"method.threshold is {threshold}; it must not be negative.")
        self.threshold = threshold

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Quantise the linear layers one by one, then put the adapters in."""
        bnb = bitsandbytes(self.name)
        check_rank(model, self.rank)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
        layers = swap_linears(model, lambda _, x: int8_linear(bnb, x, self.threshold, self.device))
        setattr(model, "is_loaded_in_8bit", True)  # so peft takes its layers for these  # noqa: B010
        return self.wrap(model, list(layers))

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Decode the codes and add alpha / r B A, in the dtype of the embeddings.

        The merged model does not round inputs to int8 any more: that is all it differs in.
        """
        return merge_lora(model, dequantized)


def _is_news(record: logging.LogRecord) -> bool:
    """Not the line that bitsandbytes logs for every single matmul with bfloat16 inputs."""
    return "inputs will be cast from" not in record.msg
